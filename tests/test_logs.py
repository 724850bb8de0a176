"""The log of the run command: lines for people or machines, written by a thread that stalls nobody."""

from __future__ import annotations

import io
import json
import logging
import sys
import threading
import time
from datetime import datetime

import pytest

from inflight_edge import counters, logs
from inflight_edge.counters import Trouble

LOGGER = logging.getLogger("inflight_edge")


def test_json_has_the_fields_of_extra_and_the_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    listener = logs.configure("json", quiet=False)
    log = logging.getLogger("inflight_edge.capture")
    log.info("camera %s: away", "cam\nera", extra={"camera": "cam\nera", "event": "away"})
    try:
        raise ValueError("bug")
    except ValueError:
        log.exception("failed")
    listener.stop()
    first, second = map(json.loads, sys.stderr.getvalue().splitlines())  # type: ignore[attr-defined]
    assert datetime.fromisoformat(first.pop("time")).tzinfo is not None
    assert first == {
        "level": "info", "logger": "inflight_edge.capture", "message": "camera cam\nera: away", "camera": "cam\nera",
        "event": "away",
    }  # fmt: skip
    assert second["level"] == "error"
    assert "ValueError: bug" in second["exception"]


def test_text_and_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    listener = logs.configure("text", quiet=True)
    logging.getLogger("inflight_edge.x").info("not this")
    logging.getLogger("inflight_edge.x").warning("this")
    listener.stop()
    (line,) = sys.stderr.getvalue().splitlines()  # type: ignore[attr-defined]
    assert line.endswith("WARNING this")


def test_name_of_a_camera_cannot_drive_the_terminal_nor_make_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    listener = logs.configure("text", quiet=False)
    try:
        raise ValueError("bug")
    except ValueError:
        logging.getLogger("inflight_edge.x").exception("camera %s: away", "a\x1b[2J\nb")
    listener.stop()
    first, *traceback = sys.stderr.getvalue().splitlines()  # type: ignore[attr-defined]
    assert first.endswith(r"ERROR camera a\x1b[2J\nb: away")
    assert traceback[-1] == "ValueError: bug"


def test_terminal_that_takes_nothing_stalls_no_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()

    class Stuck(io.StringIO):
        def write(self, text: str) -> int:
            go_on.wait(20)
            return super().write(text)

    monkeypatch.setattr(sys, "stderr", Stuck())
    monkeypatch.setattr(logs, "MAX_WAITING", 50)
    listener = logs.configure("text", quiet=False)
    started = time.monotonic()
    for i in range(1000):
        logging.getLogger("inflight_edge.x").info("line %d", i)
    assert time.monotonic() - started < 5
    go_on.set()
    while listener.queue.full():
        time.sleep(0.001)
    listener.stop()
    assert 50 <= sys.stderr.getvalue().count("line") < 1000  # type: ignore[attr-defined]


def test_trouble_is_told_at_once_then_every_ten_seconds_and_when_it_is_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0]
    monkeypatch.setattr(counters.time, "monotonic_ns", lambda: now[0])
    caplog.set_level(logging.INFO, "inflight_edge")
    trouble = Trouble("sink x", {"sink": "x"})
    trouble.over()
    assert not caplog.records
    for i in range(250):  # 25 seconds
        now[0] = i * 100_000_000
        trouble.happened("full")
    assert trouble.active
    trouble.over()
    assert not trouble.active
    trouble.happened("full")
    assert [r.getMessage() for r in caplog.records] == [
        "sink x: full (1 since the last line)",
        "sink x: full (100 since the last line)",
        "sink x: full (100 since the last line)",
        "sink x: works again, after 250 times",
        "sink x: full (1 since the last line)",
    ]
    assert caplog.records[1].__dict__["sink"] == "x"
    assert (caplog.records[1].__dict__["count"], caplog.records[1].__dict__["total"]) == (100, 101)


def test_trouble_that_comes_and_goes_does_not_flood_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [1]
    monkeypatch.setattr(counters.time, "monotonic_ns", lambda: now[0])
    caplog.set_level(logging.INFO, "inflight_edge")
    trouble = Trouble("sink x", {"sink": "x"})
    for _ in range(100):  # 2 seconds
        trouble.happened("full")
        trouble.over()
        now[0] += 20_000_000
    assert [r.getMessage() for r in caplog.records] == [
        "sink x: full (1 since the last line)",
        "sink x: works again, after 1 times",
        "sink x: full (50 since the last line)",
        "sink x: works again, after 51 times",
    ]
    assert not trouble.active
