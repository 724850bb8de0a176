"""The live page in a real browser, by keyboard too."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from sinks_live import Feed, picture

from inflight_edge import Decision
from inflight_edge.sinks.web import WebSink

pytest.importorskip("aiohttp", reason="the live page needs aiohttp")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromium-driver")

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    yield driver
    driver.quit()


@pytest.fixture
def feed() -> Feed:
    return Feed(("front", "back"))


@pytest.fixture
def sink(feed: Feed, browser: webdriver.Chrome) -> Iterator[WebSink]:
    sink = WebSink("127.0.0.1:0")
    sink.open(feed.context)
    browser.set_window_size(1200, 900)
    yield sink
    browser.get("about:blank")
    sink.close()


def wait(browser: webdriver.Chrome, condition: Callable[[], Any]) -> None:
    WebDriverWait(browser, 15, poll_frequency=0.05).until(lambda _: condition())


def text(browser: webdriver.Chrome, name: str) -> str:
    return browser.find_element(By.ID, name).text


def overflow(browser: webdriver.Chrome) -> int:
    width: int = browser.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
    return width


def test_empty_stream_says_so(browser: webdriver.Chrome, sink: WebSink) -> None:
    browser.get(sink.url)
    wait(browser, lambda: text(browser, "connection") == "live")
    wait(browser, lambda: "frames captured" in text(browser, "counts"))
    assert text(browser, "no-picture").startswith("No frame yet")
    assert text(browser, "no-flagged") == "None so far."
    assert not browser.find_element(By.ID, "alarm").is_displayed()


def test_verdicts_counts_margins_and_alarm_are_shown(browser: webdriver.Chrome, sink: WebSink, feed: Feed) -> None:
    browser.get(sink.url)
    for _ in range(5):
        sink.write(feed.outcome(Decision.ACCEPT, pixels=picture()))
    wait(browser, lambda: text(browser, "verdict") == "Accepted: east")
    feed.alarms = frozenset(["front"])
    sink.write(feed.outcome(Decision.TRIGGER, pixels=picture(3)))
    wait(browser, lambda: text(browser, "verdict") == "Trigger: looks like <b>west</b>, classifier says east")
    assert browser.find_element(By.ID, "frame").get_attribute("class") == "trigger"
    wait(browser, lambda: text(browser, "alarm") == "Alarm: front")
    assert len(browser.find_elements(By.CSS_SELECTOR, "#margins circle")) == 6
    assert browser.find_elements(By.CSS_SELECTOR, "#latency rect")
    assert "6 guarded frames, 1 of them triggers" in text(browser, "margins-text")
    image = browser.find_element(By.ID, "picture")
    wait(browser, lambda: browser.execute_script("return arguments[0].naturalWidth", image) == 640)
    sink.write(feed.outcome(Decision.INVALID))
    wait(browser, lambda: text(browser, "verdict") == "Invalid: not judged")
    assert "engine onnxruntime: it failed" in text(browser, "detail")
    assert text(browser, "no-picture") == "This frame has no picture."
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_flagged_frame_opens_and_closes_by_keyboard(
    browser: webdriver.Chrome, sink: WebSink, feed: Feed, tmp_path: Path
) -> None:
    sink.write(feed.outcome(Decision.TRIGGER, pixels=picture(3)))
    browser.get(sink.url)
    wait(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#flagged button"))
    active = browser.switch_to.active_element
    for _ in range(10):
        active.send_keys(Keys.TAB)
        active = browser.switch_to.active_element
        if active.find_elements(By.XPATH, "self::button[ancestor::*[@id='flagged']]"):
            break
    active.send_keys(Keys.ENTER)
    wait(browser, lambda: browser.find_element(By.ID, "dialog").is_displayed())
    assert "<b>west</b>" in text(browser, "dialog-title")
    rows = [row.text for row in browser.find_elements(By.CSS_SELECTOR, "#dialog-likelihoods tr")]
    assert rows[0] == "<b>west</b> -250.00"
    assert rows[-1] == "east -600.00"
    browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    wait(browser, lambda: not browser.find_element(By.ID, "dialog").is_displayed())


def test_pause_holds_the_page_and_goes_on(browser: webdriver.Chrome, sink: WebSink, feed: Feed) -> None:
    browser.get(sink.url)
    sink.write(feed.outcome(Decision.ACCEPT, pixels=picture()))
    wait(browser, lambda: text(browser, "verdict") == "Accepted: east")
    browser.find_element(By.ID, "pause").send_keys(Keys.SPACE)
    assert browser.find_element(By.ID, "pause").get_attribute("aria-pressed") == "true"
    sink.write(feed.outcome(Decision.TRIGGER, pixels=picture()))
    wait(browser, lambda: browser.execute_script("return state.points.length") == 2)
    assert text(browser, "verdict") == "Accepted: east"
    browser.find_element(By.ID, "pause").send_keys(Keys.SPACE)
    wait(browser, lambda: text(browser, "verdict").startswith("Trigger"))


def test_cameras_are_told_apart(browser: webdriver.Chrome, sink: WebSink, feed: Feed) -> None:
    sink.write(feed.outcome(Decision.ACCEPT, pixels=picture()))
    sink.write(feed.outcome(Decision.TRIGGER, camera="back", pixels=picture()))
    browser.get(sink.url)
    wait(browser, lambda: text(browser, "verdict") == "Accepted: east")
    browser.find_element(By.ID, "camera").send_keys("back")
    wait(browser, lambda: text(browser, "verdict").startswith("Trigger"))


@pytest.mark.parametrize("width", [320, 500])
def test_narrow_screen_has_no_sideways_scrolling(
    browser: webdriver.Chrome, sink: WebSink, feed: Feed, width: int
) -> None:
    sink.write(feed.outcome(Decision.TRIGGER, pixels=picture()))
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 640, "deviceScaleFactor": 1, "mobile": True}
    )
    try:
        browser.get(sink.url)
        wait(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#flagged button"))
        assert overflow(browser) <= 0
        browser.find_element(By.CSS_SELECTOR, "#flagged button").click()
        wait(browser, lambda: browser.find_element(By.ID, "dialog").is_displayed())
        assert overflow(browser) <= 0
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_server_that_has_gone_is_noticed_and_its_return_too(browser: webdriver.Chrome, feed: Feed) -> None:
    first = WebSink("127.0.0.1:0")
    first.open(feed.context)
    browser.get(first.url)
    wait(browser, lambda: text(browser, "connection") == "live")
    first.close()
    wait(browser, lambda: "no connection" in text(browser, "connection"))
    second = WebSink(first.url[len("http://") : -1])
    second.open(feed.context)
    try:
        wait(browser, lambda: text(browser, "connection") == "live")
    finally:
        browser.get("about:blank")
        second.close()
