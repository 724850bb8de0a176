"""Webhook against a real server that fails, hangs, refuses, goes and comes back."""

from __future__ import annotations

import base64
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from http_receiver import Receiver
from outcomes import accepted, context, dropped, invalid, triggered, unguarded, unreadable
from waiting import wait_for

from inflight_edge import OptionError, SinkError
from inflight_edge.sinks import make_sink, webhook
from inflight_edge.sinks.record import record


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy, and shorter pauses."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(webhook, "_FIRST_DELAY_S", 0.02)
    monkeypatch.setattr(webhook, "_MAX_DELAY_S", 0.1)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.stop()


def opened(receiver: Receiver, options: str = "", path: str = "/hook/s3cret?key=s3cret") -> Any:
    sink = make_sink(f"http://127.0.0.1:{receiver.port}{path}{options}")
    sink.open(context())
    return sink


def test_flagged_outcomes_arrive_as_their_records(receiver: Receiver) -> None:
    sink = opened(receiver)
    outcomes = [accepted(0), triggered(1), unguarded(2), invalid(3), unreadable(4), dropped(5)]
    for outcome in outcomes:
        sink.write(outcome)
    sink.close()
    assert [body for _, _, body in receiver.requests] == [record(outcomes[i], context()) for i in (1, 3, 4)]
    path, headers, _ = receiver.requests[0]
    assert path == "/hook/s3cret?key=s3cret"
    assert headers["Content-Type"] == "application/json"
    assert "Authorization" not in headers
    assert sink.name == f"webhook:127.0.0.1:{receiver.port}"


def test_all_outcomes_or_changes_of_the_alarm(receiver: Receiver) -> None:
    sink = opened(receiver, "#send=all")
    for index, make in enumerate((accepted, triggered, dropped)):
        sink.write(make(index))
    sink.close()
    assert receiver.accepted == [0, 1, 2]
    sink = opened(receiver, "#send=alarm")
    for index, (camera, alarm) in enumerate([("a", 0), ("a", 1), ("b", 0), ("a", 1), ("b", 1), ("a", 0)]):
        sink.write(triggered(10 + index, alarm=bool(alarm), camera=camera))
        sink.write(replace(dropped(90 + index, camera=camera), alarm=not alarm))  # what another thread knew: no news
    sink.close()
    assert receiver.accepted == [0, 1, 2, 11, 14, 15]


@pytest.mark.parametrize("failure", [503, 429, 408, "drop", "hang"])
def test_a_server_that_fails_gets_everything_later_and_in_order(
    receiver: Receiver, failure: int | str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    receiver.answer = failure
    sink = opened(receiver, "#timeout_s=0.2")
    for index in range(5):
        sink.write(triggered(index))
    wait_for(lambda: len(receiver.requests) >= 3)
    assert {body["index"] for _, _, body in receiver.requests} == {0}  # the first one first
    receiver.answer = 204
    receiver.released.set()
    wait_for(lambda: len(receiver.accepted) == 5)
    sink.flush()
    sink.close()
    assert receiver.accepted == [0, 1, 2, 3, 4]
    assert caplog.text.count("trying again") == 1
    assert caplog.text.count("delivers again") == 1
    assert "s3cret" not in caplog.text


def test_a_server_that_is_gone_and_comes_back(receiver: Receiver) -> None:
    sink = opened(receiver)
    sink.write(triggered(0))
    wait_for(lambda: receiver.accepted == [0])
    receiver.stop()
    for index in range(1, 4):
        sink.write(triggered(index))
    time.sleep(0.1)
    back = Receiver(receiver.port)
    wait_for(lambda: back.accepted == [1, 2, 3])
    sink.close()
    back.stop()


def test_the_pauses_grow_to_a_limit(receiver: Receiver) -> None:
    receiver.answer = 500
    sink = opened(receiver, "#timeout_s=0.1")
    sink.write(triggered(0))
    wait_for(lambda: len(receiver.times) >= 6)
    pauses = [after - before for before, after in zip(receiver.times, receiver.times[1:], strict=False)]
    assert pauses[0] >= 0.02
    assert pauses[1] >= 0.04
    assert min(pauses[3:]) >= 0.1
    with pytest.raises(SinkError, match=r"1 outcome\(s\) lost: not delivered before the end"):
        sink.close()


def test_the_server_may_ask_for_a_longer_pause(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "_MAX_DELAY_S", 10.0)
    receiver.answer, receiver.headers = 429, {"Retry-After": "1"}
    sink = opened(receiver)
    sink.write(triggered(0))
    wait_for(lambda: len(receiver.times) >= 1)
    receiver.answer = 200
    wait_for(lambda: receiver.accepted == [0])
    assert receiver.times[1] - receiver.times[0] >= 1.0
    sink.close()


@pytest.mark.parametrize("answer", [404, 401, 301, 302])
def test_a_refusal_loses_the_outcome_and_is_told(receiver: Receiver, answer: int) -> None:
    receiver.headers = {"Location": f"http://127.0.0.1:{receiver.port}/elsewhere"}
    receiver.answer = answer
    sink = opened(receiver)
    sink.write(triggered(0))
    sink.write(triggered(1))
    wait_for(lambda: len(receiver.requests) == 2 and not sink._waiting)
    with pytest.raises(SinkError, match=rf"2 outcome\(s\) lost: refused with HTTP {answer}; check the URL") as raised:
        sink.flush()
    assert raised.value.lost == 2
    sink.flush()
    receiver.answer = 200
    sink.write(triggered(2))
    sink.close()
    assert receiver.accepted == [2]


def test_write_never_waits_and_the_buffer_is_bounded(receiver: Receiver) -> None:
    receiver.answer = "hang"
    sink = opened(receiver, "#buffer=50&timeout_s=0.3")
    begin = time.monotonic()
    lost = 0
    for index in range(500):
        try:
            sink.write(triggered(index))
        except SinkError as error:
            assert "outcome lost: 50 are waiting for the server" in str(error)
            lost += 1
    assert lost == 450
    sink.flush()
    assert time.monotonic() - begin < 2.0
    with pytest.raises(SinkError, match=r"50 outcome\(s\) lost") as raised:
        sink.close()
    assert raised.value.lost == 50
    assert time.monotonic() - begin < 6.0


def test_close_delivers_what_waits(receiver: Receiver) -> None:
    sink = opened(receiver)
    for index in range(100):
        sink.write(triggered(index))
    sink.close()
    assert receiver.accepted == list(range(100))


def test_close_tries_once_more(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "_FIRST_DELAY_S", 10.0)
    monkeypatch.setattr(webhook, "_MAX_DELAY_S", 10.0)
    receiver.answer = 503
    sink = opened(receiver)
    sink.write(triggered(0))
    wait_for(lambda: len(receiver.requests) == 1)
    receiver.answer = 200
    sink.close()
    assert receiver.accepted == [0]


def test_close_during_a_try_that_fails_tries_once_more(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[object] = []

    def post(self: webhook.WebhookSink, *_: object) -> tuple[str, bool, float]:
        tries.append(self)
        if len(tries) == 1:
            wait_for(lambda: self._deadline is not None)
            return "HTTP 503", False, 0.0
        return "", False, 0.0

    monkeypatch.setattr(webhook.WebhookSink, "_post", post)
    sink = opened(receiver)
    sink.write(triggered(0))
    wait_for(lambda: len(tries) == 1)
    sink.close()
    assert len(tries) == 2


def test_credentials_are_sent_and_never_shown(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = make_sink(f"http://line%20two:s3cret@127.0.0.1:{receiver.port}/")
    sink.open(context())
    sink.write(triggered(0))
    sink.close()
    monkeypatch.setenv("INFLIGHT_EDGE_WEBHOOK_TOKEN", "t0ken")
    bearer = opened(receiver)
    bearer.write(triggered(1))
    bearer.close()
    sent = [headers["Authorization"] for _, headers, _ in receiver.requests]
    assert sent == [f"Basic {base64.b64encode(b'line two:s3cret').decode()}", "Bearer t0ken"]
    assert "s3cret" not in sink.name
    with pytest.raises(OptionError) as raised:
        make_sink("http://line:s3cret@host/s3cret?s3cret#timeout_s=never")
    assert "option timeout_s: expected a number from 0.01 to 600, got 'never'" in str(raised.value)
    assert "s3cret@" not in str(raised.value)
    assert "?s3cret" not in str(raised.value)


@pytest.mark.parametrize("answer", [ValueError("Invalid header value b'Bearer t0ken'"), UnicodeError("label empty")])
def test_worker_goes_on_after_any_error_and_shows_nothing_of_it(
    answer: Exception, receiver: Receiver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Opener:
        def __init__(self) -> None:
            self.problems = [answer, answer]
            self.real = urllib.request.build_opener()

        def open(self, *arguments: Any, **options: Any) -> Any:
            if self.problems:
                raise self.problems.pop()
            return self.real.open(*arguments, **options)

    opener = Opener()
    monkeypatch.setattr(webhook.urllib.request, "build_opener", lambda *_: opener)
    sink = opened(receiver)
    sink.write(triggered(1))
    wait_for(lambda: receiver.accepted == [1])
    sink.close()
    assert f"no answer: {type(answer).__name__}; trying again" in caplog.text
    assert str(answer) not in caplog.text


@pytest.mark.parametrize("token", ["secret\n", "two words", "schlüssel", "\x00"])
def test_token_that_is_no_header_is_refused_and_not_shown(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="token: expected printable ASCII without spaces") as raised:
        webhook.WebhookSink("https://host/hook", token=token)
    assert token not in str(raised.value)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http:///path", "expected https://HOST/PATH"),
        ("https://host:x/", "expected https://HOST/PATH"),
        ("https://host/a b", "expected a URL of visible ASCII characters"),
        ("https://host/#send=some", "option send: expected one of flagged, alarm, all, got 'some'"),
        ("https://host/#buffer=0", "option buffer: expected an integer from 1 to 1000000"),
        ("https://host/#al=1", "unknown option al"),
    ],
)
def test_addresses_that_are_refused(address: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make_sink(address)
