"""A network camera through the whole pipeline: known frames in a known order, the server killed and back."""

from __future__ import annotations

import time

import gstreamer_here
import pytest
from bundles import tiny_bundle
from rtsp_server import PICTURES
from rtsp_streams import number_of, server

from inflight_edge import Decision, Detector, Pipeline
from inflight_edge.events import Context, Outcome
from inflight_edge.sources.video import RtspSource

pytest.importorskip("av", reason="PyAV is not installed: pip install 'inflight-edge[video]'")
gstreamer_here.need("x264enc", "rtpjpegpay", typelibs=["GstRtspServer"])


class Memory:
    """A sink that keeps outcomes and their frames' numbers."""

    name = "memory"

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []

    def open(self, context: Context) -> None:
        pass

    def write(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def wait_for(sink: Memory, n: int) -> None:
    deadline = time.monotonic() + 20
    while len(sink.outcomes) < n and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(sink.outcomes) >= n


def test_every_frame_is_judged_as_offline_and_the_stream_goes_on_after_its_server_was_killed() -> None:
    detector, sink = Detector(tiny_bundle()), Memory()
    with server(fps=30) as (process, port):
        source = RtspSource(f"rtsp://127.0.0.1:{port}/stream", timeout_s=2, name="line")
        pipeline = Pipeline(detector, [source], [sink], keep="all", backoff=(0.1, 0.3))
        pipeline.start()
        wait_for(sink, 30)
        process.kill()
        process.wait(10)
        before = len(sink.outcomes)
        time.sleep(0.5)
    with server(port=port, fps=30):
        wait_for(sink, before + 40)
        pipeline.stop()
        assert pipeline.join(10)
        status = pipeline.status()
    assert pipeline.errors == []
    assert status.reconnects == {"line": 1}
    outcomes = sink.outcomes
    assert [outcome.frame.index for outcome in outcomes] == list(range(len(outcomes)))
    assert status.captured["line"] == status.judged["line"] + sum(status.dropped.values()) == len(outcomes)
    judged = [outcome for outcome in outcomes if outcome.verdict is not None]
    numbers = []
    for outcome in judged:
        assert outcome.frame.pixels is not None
        assert outcome.verdict is not None
        number = number_of(outcome.frame.pixels)
        numbers.append(number)
        kind = PICTURES[number % len(PICTURES)]
        assert outcome.verdict.predicted == 3
        assert outcome.verdict.decision is (Decision.ACCEPT if kind == PICTURES[0] else Decision.TRIGGER)
        assert outcome.verdict.source == {PICTURES[0]: None, PICTURES[1]: 0, PICTURES[2]: 2}[kind]
        assert outcome.verdict == detector(outcome.frame.pixels)
    # In order and without a gap, from each of the two servers.
    breaks = [i for i in range(1, len(numbers)) if numbers[i] != numbers[i - 1] + 1]
    assert len(breaks) == 1
    assert numbers[breaks[0]] < numbers[breaks[0] - 1] + 1
