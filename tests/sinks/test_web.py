from __future__ import annotations

import io
import json
import logging
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from sinks_live import Feed, picture

pytest.importorskip("aiohttp", reason="the live page needs aiohttp")

from inflight_edge import Decision, OptionError, SinkError
from inflight_edge.colour import check_frame, to_rgb
from inflight_edge.sinks import _live, web
from inflight_edge.sinks._live import FLAGGED, POINTS, LiveView, coarse, encode
from inflight_edge.sinks.web import MAX_VIEWERS, WebSink


@pytest.fixture
def feed() -> Feed:
    return Feed()


@pytest.fixture
def sink(feed: Feed) -> Iterator[WebSink]:
    sink = WebSink("127.0.0.1:0")
    sink.open(feed.context)
    yield sink
    sink.close()


def get(url: str, headers: dict[str, str] | None = None) -> tuple[int, dict[str, str], bytes]:
    request = urllib.request.Request(url, headers=headers or {})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, dict(error.headers), error.read()


def first_event(url: str, headers: dict[str, str] | None = None) -> dict[str, Any]:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers or {}), timeout=10) as answer:
        line = answer.readline()
    assert line.startswith(b"data: ")
    message: dict[str, Any] = json.loads(line[6:])
    return message


def test_the_page_is_whole_without_any_other_server(sink: WebSink) -> None:
    for name, kind in (("", "text/html"), ("app.js", "text/javascript"), ("app.css", "text/css")):
        status, headers, body = get(sink.url + name)
        assert (status, headers["Content-Type"]) == (200, f"{kind}; charset=utf-8")
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert b"//" not in body.replace(b"// ", b"").replace(b"http://www.w3.org/2000/svg", b"")


def test_a_verdict_reaches_the_browser(sink: WebSink, feed: Feed) -> None:
    sink.write(feed.outcome(Decision.ACCEPT, pixels=picture()))
    sink.write(feed.outcome(Decision.TRIGGER, pixels=picture(), margin=12.5))
    message = first_event(sink.url + "events")
    assert [point["decision"] for point in message["points"]] == ["accept", "trigger"]
    newest = message["newest"]["front"]
    assert (newest["index"], newest["predicted"], newest["source"], newest["margin"]) == (
        1,
        "east",
        "<b>west</b>",
        12.5,
    )
    assert message["flagged"][0]["log_likelihoods"] == {"north": -300, "east": -600, "south": -350, "<b>west</b>": -250}
    assert message["status"]["decisions"] == {"accept": 1, "trigger": 1, "unguarded": 0, "invalid": 0}
    assert sum(n for _, n in message["latency"]) == 2


@pytest.mark.parametrize(
    ("pixels", "colour", "size"),
    [
        (picture(), "rgb", (640, 480)),
        (picture(shape=(48, 64, 1)), "rgb", (640, 480)),
        (picture(shape=(720, 1280, 3)), "rgb", (640, 360)),
        (np.zeros((72, 64), np.uint8), "nv12-bt601", (640, 480)),
    ],
    ids=["small", "grey", "large", "nv12"],
)
def test_pictures_are_jpeg_of_a_useful_size(
    sink: WebSink, feed: Feed, pixels: Any, colour: Any, size: tuple[int, int]
) -> None:
    from dataclasses import replace

    from PIL import Image

    outcome = feed.outcome(Decision.TRIGGER, pixels=pixels)
    sink.write(replace(outcome, frame=replace(outcome.frame, colour=colour)))
    status, headers, body = get(sink.url + "frame/front")
    assert (status, headers["Content-Type"]) == (200, "image/jpeg")
    assert Image.open(io.BytesIO(body)).size == size
    number = first_event(sink.url + "events")["flagged"][0]["number"]
    assert max(Image.open(io.BytesIO(get(f"{sink.url}flagged/{number}")[2])).size) <= 320


def test_a_frame_without_pixels_is_shown_as_such(sink: WebSink, feed: Feed) -> None:
    sink.write(feed.outcome(Decision.INVALID, pixels=None))
    sink.write(feed.outcome(Decision.INVALID, pixels=np.zeros((4, 4, 2), np.uint8)))
    message = first_event(sink.url + "events")
    assert [entry["picture"] for entry in message["flagged"]] == [False, False]
    assert message["newest"]["front"]["reason"] == "engine onnxruntime: it failed"
    assert get(sink.url + "frame/front")[0] == 404


@pytest.mark.parametrize("path", ["frame/back", "flagged/7", "app.html", "flagged/-1", "page/app.js", "..%2fweb.py"])
def test_what_is_not_there_is_404(sink: WebSink, path: str) -> None:
    assert get(sink.url + path)[0] == 404


def test_memory_is_bounded(feed: Feed) -> None:
    view = LiveView(feed.context)
    for _ in range(3 * POINTS):
        view.add(feed.outcome(Decision.TRIGGER, pixels=picture(shape=(8, 8, 3))))
    message, cursor = view.news(0)
    assert cursor == 3 * POINTS
    assert len(view._points) == POINTS
    assert len(message["flagged"]) == FLAGGED
    assert view.news(cursor)[0]["points"] == []
    assert view.flagged_picture(1) is None


def test_another_host_name_is_refused_on_loopback(sink: WebSink) -> None:
    assert get(sink.url, {"Host": "attacker.example"})[0] == 403
    assert get(sink.url, {"Host": "localhost:1"})[0] == 200


def test_off_loopback_a_token_is_demanded(feed: Feed, caplog: pytest.LogCaptureFixture) -> None:
    sink = WebSink("0.0.0.0:0")
    with caplog.at_level(logging.WARNING):  # a quiet log names it too
        sink.open(feed.context)
    try:
        address = sink.url.replace("0.0.0.0", "127.0.0.1")
        token = caplog.text.partition("?token=")[2].split()[0]
        for path in ("", "app.js", "events", "frame/front", "flagged/1", "nothing"):
            assert get(address + path)[0] == 401
            assert get(f"{address}{path}?token={token}x")[0] == 401
        assert get(address, {"Authorization": f"Bearer {token}"})[0] == 200
        assert get(address, {"Authorization": "Bearer \xff"})[0] == 401
        assert get(address + "?token=%FF")[0] == 401
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        with opener.open(f"{address}?token={token}", timeout=10) as answer:
            assert answer.url == address  # the token has left the address bar
        with opener.open(address + "app.js", timeout=10) as answer:
            assert answer.status == 200
    finally:
        sink.close()


def test_own_token_is_asked_for_on_loopback_and_never_logged(feed: Feed, caplog: pytest.LogCaptureFixture) -> None:
    token = "a-token-of-the-owner"
    sink = WebSink("127.0.0.1:0", token=token)
    with caplog.at_level(logging.DEBUG):
        sink.open(feed.context)
    try:
        assert get(sink.url)[0] == 401
        assert get(sink.url, {"Authorization": f"Bearer {token}"})[0] == 200
        assert token not in caplog.text
    finally:
        sink.close()


@pytest.mark.parametrize("address", ["8080", "127.0.0.1", "127.0.0.1:x", "127.0.0.1:70000", "http://a:1", "u@a:1", ""])
def test_bad_address_is_refused(address: str) -> None:
    with pytest.raises(OptionError, match="expected HOST:PORT"):
        WebSink(address)


@pytest.mark.parametrize("token", ["short", "sixteen letters\n", "äöüäöüäöüäöüäöüäöü"])
def test_weak_token_is_refused(token: str) -> None:
    with pytest.raises(OptionError, match="at least 16 printable"):
        WebSink("127.0.0.1:0", token=token)


def test_a_taken_port_is_one_clear_error(feed: Feed) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        sink = WebSink(f"127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(SinkError, match=r"cannot be served: .*address already in use.*; choose another port"):
            sink.open(feed.context)
        sink.close()


def test_close_ends_open_streams_and_may_be_repeated(feed: Feed) -> None:
    sink = WebSink("127.0.0.1:0")
    sink.open(feed.context)
    with urllib.request.urlopen(sink.url + "events", timeout=10) as answer:
        answer.readline()
        closer = threading.Thread(target=sink.close)
        closer.start()
        while answer.readline():
            pass
        closer.join(10)
    sink.close()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", int(sink.url.rpartition(":")[2][:-1])), 2)


def test_viewers_are_limited_and_come_back(sink: WebSink) -> None:
    streams = [urllib.request.urlopen(sink.url + "events", timeout=10) for _ in range(MAX_VIEWERS)]
    for stream in streams:
        stream.readline()
    assert get(sink.url + "events")[0] == 503
    for stream in streams:
        stream.close()
    for _ in range(50):
        try:
            assert "status" in first_event(sink.url + "events")
        except urllib.error.HTTPError as error:
            error.close()
            threading.Event().wait(0.1)
            continue
        return
    pytest.fail("no place became free")


def test_a_browser_that_does_not_read_holds_nothing_up(sink: WebSink, feed: Feed) -> None:
    port = int(sink.url.rpartition(":")[2][:-1])
    with socket.create_connection(("127.0.0.1", port)) as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        lazy.sendall(b"GET /events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        for _ in range(200):
            sink.write(feed.outcome(Decision.TRIGGER, pixels=picture(shape=(8, 8, 3))))
        assert first_event(sink.url + "events")["status"]["captured"] == 200


def test_histogram_in_few_bars_keeps_every_frame(feed: Feed) -> None:
    for whole_us in (100, 110, 500, 90_000):
        feed.outcome(Decision.ACCEPT, whole_us=whole_us)
    bars = coarse(feed.whole)
    assert sum(n for _, n in bars) == 4
    assert bars[0][0] >= 100
    assert bars[-1][0] >= 90_000 > bars[-2][0]
    assert len(bars) < 50


@pytest.mark.parametrize("colour", ["nv12-bt601", "nv12-bt709-full"])
def test_large_nv12_frame_is_thinned_with_its_chroma(colour: Any) -> None:
    """What stays are the pixels of every third chroma value: the conversion of the whole picture, thinned."""
    rng = np.random.default_rng(0)
    height, width = 44, 62  # no multiples of the step
    frame = rng.integers(0, 256, (height * 3 // 2, width), np.uint8)
    thin = _live._thin(frame, colour, 10)
    whole = to_rgb(frame, colour).reshape(height // 2, 2, width // 2, 2, 3)
    expected = whole[::3, :, ::3].reshape(2 * 8, 2 * 11, 3)
    np.testing.assert_array_equal(to_rgb(check_frame(thin, colour), colour), expected)


def test_many_who_ask_for_the_newest_picture_get_one_that_is_made_once(
    feed: Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    view, made = LiveView(feed.context), []

    def slow(frame: Any, longest: int) -> bytes:
        made.append(longest)
        time.sleep(0.1)
        return b"picture"

    view.add(feed.outcome(Decision.ACCEPT, pixels=picture(shape=(8, 8, 3))))
    monkeypatch.setattr(_live, "encode", slow)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(view.latest, ["front"] * 8)) == [b"picture"] * 8
    assert len(made) == 1


def test_idle_connection_is_closed(feed: Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "_IDLE_S", 0.3)
    sink = WebSink("127.0.0.1:0")
    sink.open(feed.context)
    try:
        port = int(sink.url.rstrip("/").rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), 10) as idle:
            assert idle.recv(1) == b""
    finally:
        sink.close()


def test_encode_gives_none_for_what_is_no_picture(feed: Feed) -> None:
    for pixels in (None, np.zeros((4, 4, 2), np.uint8), np.zeros((4, 4), np.float32)):
        assert encode(feed.outcome(Decision.INVALID, pixels=pixels).frame, 64) is None  # type: ignore[arg-type]
