"""The loop: one outcome for every frame, in order, under back-pressure, drops, several cameras, and a clean stop."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from bundles import CLEAN_EAST, CLEAN_NORTH, CLEAN_WEST, TRIGGERED_NORTH, TRIGGERED_SOUTH, tiny_bundle
from pipelines import ListSink, ListSource, exactly_one_outcome_each, stub_detector, until

from inflight_edge import Decision, Detector, Frame, OptionError, Pipeline, SinkError
from inflight_edge.actions import AlarmRule
from inflight_edge.region import Region

FRAMES = [CLEAN_WEST, TRIGGERED_NORTH, TRIGGERED_SOUTH, CLEAN_EAST, CLEAN_NORTH]


def test_verdicts_are_those_of_the_detector_in_order() -> None:
    detector = Detector(tiny_bundle(), threads=1)
    sink, other = ListSink(), ListSink()
    status = Pipeline(detector, [ListSource(FRAMES * 20)], [sink, other]).run()
    expected = detector.run(FRAMES * 20)
    for kept in (sink, other):
        assert [o.verdict for o in kept.outcomes] == expected
        assert kept.indices() == list(range(100))
    assert (status.captured, status.judged, status.dropped) == ({"list": 100}, {"list": 100}, {})
    assert status.decisions == {
        ("list", "accept", "west"): 20, ("list", "accept", "north"): 20, ("list", "unguarded", "east"): 20,
        ("list", "trigger", "west"): 40,
    }  # fmt: skip
    assert status.lost == {"kept": 0, "kept-2": 0}
    assert status.queues == {"frames": 0, "sink kept": 0, "sink kept-2": 0}
    for stage in ("queue", "preprocess", "engine", "guard", "whole", "sink kept"):
        assert status.stages[stage].count == 100, stage
    assert set(sink.outcomes[0].stages) == {"queue", "preprocess", "engine", "guard", "whole"}
    assert sink.outcomes[0].stages["whole"] >= sum(sink.outcomes[0].stages[s] for s in ("queue", "engine", "guard"))


def test_sink_is_opened_first_flushed_and_closed_last_by_one_thread_of_its_own() -> None:
    sink = ListSink()
    Pipeline(stub_detector(), [ListSource([CLEAN_WEST])], [sink], bundle="here").run()
    assert sink.calls[0] == "open"
    assert sink.calls[-2:] == ["flush", "close"]
    assert len(sink.threads) == 1
    assert sink.threads != {threading.get_ident()}
    assert sink.context is not None
    assert (sink.context.cameras, sink.context.bundle) == (("list",), "here")
    assert sink.context.status().judged == {"list": 1}


def test_sink_is_flushed_about_once_a_second_even_without_frames() -> None:
    sink = ListSink()
    Pipeline(stub_detector(), [ListSource([], hold=True)], [sink], max_seconds=2.3).run()
    assert sink.calls == ["open", "flush", "flush", "flush", "close"]


def test_file_waits_for_a_slow_engine_and_nothing_is_dropped() -> None:
    sink = ListSink()
    detector = stub_detector(lambda batch: time.sleep(0.001))
    status = Pipeline(detector, [ListSource(FRAMES * 40)], [sink], queue=1).run()
    assert sink.indices() == list(range(200))
    assert not status.dropped


def test_file_waits_for_a_slow_sink_in_bounded_memory() -> None:
    ahead = []
    source_given = [0]

    def frames():  # type: ignore[no-untyped-def]
        for _ in range(300):
            source_given[0] += 1
            yield CLEAN_WEST

    def slowly(outcome: object) -> None:
        ahead.append(source_given[0] - len(ahead))
        time.sleep(0.0005)

    slow, fast = ListSink(name="slow", before=slowly), ListSink(name="fast")
    status = Pipeline(stub_detector(), [ListSource(frames())], [slow, fast], queue=2, sink_queue=8, batch=2).run()
    assert slow.indices() == fast.indices() == list(range(300))
    assert not any(status.lost.values())
    # At most 8 + a batch wait for the sink, 2 for the engine, and one is in each hand.
    assert max(ahead) <= 8 + 2 + 2 + 2 + 2


@pytest.mark.parametrize("keep", ["newest", "oldest"])
def test_live_frames_that_come_too_fast_are_dropped_counted_and_logged(
    keep: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "inflight_edge")
    first_is_in, go_on = threading.Event(), threading.Event()

    def wait(batch: object) -> None:
        first_is_in.set()
        go_on.wait(20)

    def frames():  # type: ignore[no-untyped-def]
        yield CLEAN_WEST
        first_is_in.wait(20)
        yield from [CLEAN_EAST] * 9
        go_on.set()

    sink = ListSink()
    source = ListSource(frames(), live=True, name="cam")
    status = Pipeline(stub_detector(wait), [source], [sink], keep=None if keep == "newest" else "oldest", queue=3).run()  # type: ignore[arg-type]
    dropped = [o.frame.index for o in sink.outcomes if o.drop]
    assert sorted(dropped) == ([1, 2, 3, 4, 5, 6] if keep == "newest" else [4, 5, 6, 7, 8, 9])
    exactly_one_outcome_each(sink.outcomes, {"cam": 10})
    assert {(o.drop, o.verdict, o.label, o.frame.pixels) for o in sink.outcomes if o.drop} == {
        ("late", None, None, None)
    }
    assert status.dropped == {("cam", "late"): 6}
    lines = [r for r in caplog.records if "dropped: late" in r.getMessage()]
    assert len(lines) == 1, "one line at once, further ones at most every ten seconds"
    assert lines[0].levelno == logging.WARNING


def test_camera_that_never_gave_a_frame_is_in_the_status() -> None:
    sources = [ListSource(FRAMES, name="file"), ListSource([], name="dark")]
    assert Pipeline(stub_detector(), sources, []).run().captured == {"file": 5, "dark": 0}


def test_source_that_was_closed_by_the_stop_is_not_said_to_have_ended(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "inflight_edge")
    sink = ListSink()
    pipeline = Pipeline(stub_detector(), [ListSource(FRAMES, live=True, hold=True)], [sink])
    pipeline.start()
    until(lambda: len(sink.outcomes) == 5)
    pipeline.stop()
    assert pipeline.join(20)
    assert "end of the stream" not in caplog.text


def following(sink: ListSink, frames: list[Any], camera: str) -> Iterator[Any]:
    """Each frame once the sink has the one before: as fast as this machine can, never faster."""
    for i, frame in enumerate(frames):
        until(lambda i=i: len(sink.indices(camera)) == i)  # type: ignore[misc]
        yield frame


def test_slow_sink_never_holds_up_live_inference_and_says_what_it_lost(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "inflight_edge")
    stuck = threading.Event()
    slow, fast = ListSink(name="slow", before=lambda o: stuck.wait(20)), ListSink(name="fast")
    source = ListSource(following(fast, FRAMES * 40, "list"), live=True)
    pipeline = Pipeline(stub_detector(), [source], [slow, fast], sink_queue=10)
    pipeline.start()
    until(lambda: len(fast.outcomes) == 200)
    stuck.set()
    assert pipeline.join(20)
    status = pipeline.status()
    assert fast.indices() == list(range(200))
    assert status.lost == {"slow": 200 - len(slow.outcomes), "fast": 0}
    assert 10 <= len(slow.outcomes) <= 12
    messages = [r.getMessage() for r in caplog.records if "slow" in r.getMessage()]
    assert messages[0].partition(" (")[0] == "sink slow: its queue is full, outcomes are lost"
    assert len(messages) == 2, messages
    assert "works again" in messages[1]


def test_file_beside_a_camera_waits_for_a_stuck_sink_and_the_camera_does_not() -> None:
    stuck = threading.Event()
    slow, fast = ListSink(name="slow", before=lambda o: stuck.wait(20)), ListSink(name="fast")
    camera = ListSource(following(fast, [CLEAN_EAST] * 100, "cam"), live=True, name="cam")
    file = ListSource(following(fast, FRAMES * 20, "file"), name="file")  # a burst of it would fill fast's queue
    pipeline = Pipeline(stub_detector(), [camera, file], [slow, fast], sink_queue=10)
    pipeline.start()
    until(lambda: len(fast.indices("cam")) == 100)
    assert len(fast.indices("file")) < 20
    stuck.set()
    assert pipeline.join(20)
    assert fast.indices("file") == slow.indices("file") == list(range(100))
    assert pipeline.status().lost == {"slow": 100 - len(slow.indices("cam")), "fast": 0}


def test_failing_sink_is_counted_logged_once_per_change_and_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "inflight_edge")

    def fail(outcome: object) -> None:
        if 20 <= outcome.frame.index < 60:  # type: ignore[attr-defined]
            raise SinkError("broker gone") if outcome.frame.index % 2 else RuntimeError("library bug")  # type: ignore[attr-defined]

    bad, good = ListSink(name="bad", before=fail), ListSink(name="good")
    status = Pipeline(stub_detector(), [ListSource(FRAMES * 20)], [bad, good]).run()
    assert status.lost == {"bad": 40, "good": 0}
    assert good.indices() == list(range(100))
    assert bad.indices() == [*range(20), *range(60, 100)]
    messages = [r.getMessage() for r in caplog.records if "sink bad" in r.getMessage()]
    assert messages == [
        "sink bad: RuntimeError: library bug (1 since the last line)",
        "sink bad: works again, after 40 times",
    ]


def test_sink_that_cannot_be_opened_stops_the_start_and_closes_the_others() -> None:
    class Closed(ListSink):
        def open(self, context: object) -> None:
            raise SinkError("no such folder")

    good, source = ListSink(), ListSource(FRAMES)
    with pytest.raises(SinkError, match="no such folder"):
        Pipeline(stub_detector(), [source], [good, Closed()]).run()
    assert good.calls == ["open", "flush", "close"]
    assert source.n_opened == 0


def test_cameras_share_batches_and_keep_their_order() -> None:
    sizes = []
    sink = ListSink()
    detector = stub_detector(lambda batch: (sizes.append(len(batch)), time.sleep(0.002)))
    sources = [ListSource(FRAMES * 10, name="cam") for _ in range(3)]
    status = Pipeline(detector, sources, [sink]).run()
    assert status.judged == {"cam": 50, "cam-2": 50, "cam-3": 50}
    for camera in status.judged:
        assert sink.indices(camera) == list(range(50))
    assert max(sizes) == 3
    assert sizes.count(3) > 30
    by_frame = {f.tobytes(): detector(f) for f in FRAMES}
    assert all(o.verdict == by_frame[o.frame.pixels.tobytes()] for o in sink.outcomes)  # type: ignore[union-attr]


def test_fast_camera_takes_no_turn_of_a_slow_one() -> None:
    sink = ListSink()
    fast = ListSource([CLEAN_EAST] * 3000, live=True, name="fast")
    slow = ListSource([CLEAN_WEST] * 20, live=True, name="slow", pace_s=0.01)
    status = Pipeline(
        stub_detector(lambda batch: time.sleep(0.001)), [fast, slow], [sink], batch=1, queue=50, sink_queue=5000
    ).run()
    assert status.judged["slow"] == 20
    exactly_one_outcome_each(sink.outcomes, {"fast": 3000, "slow": 20})
    assert status.dropped["fast", "late"] + status.judged["fast"] == 3000


def test_max_frames_is_exact_and_what_was_read_beyond_it_is_a_counted_drop() -> None:
    sink = ListSink()
    status = Pipeline(stub_detector(), [ListSource(FRAMES * 100)], [sink], max_frames=7).run()
    assert status.judged == {"list": 7}
    assert sink.indices() == list(range(7))
    sink = ListSink()
    sources = [ListSource(FRAMES * 100, name=name) for name in "abc"]
    status = Pipeline(stub_detector(), sources, [sink], max_frames=50).run()
    assert sum(status.judged.values()) == 50
    exactly_one_outcome_each(sink.outcomes, dict(status.captured))
    assert {reason for _, reason in status.dropped} <= {"limit"}


def test_max_seconds_ends_a_camera_that_never_does() -> None:
    source = ListSource([CLEAN_WEST], live=True, hold=True)
    started = time.monotonic()
    status = Pipeline(stub_detector(), [source], [], max_seconds=0.3).run()
    assert 0.3 <= time.monotonic() - started < 5
    assert status.judged == {"list": 1}


def test_stop_judges_and_delivers_what_was_read() -> None:
    sink = ListSink(before=lambda o: time.sleep(0.0005))
    detector = stub_detector(lambda batch: time.sleep(0.002))

    def endless():  # type: ignore[no-untyped-def]
        while True:
            yield from FRAMES

    pipeline = Pipeline(detector, [ListSource(endless()), ListSource(endless(), live=True, pace_s=0.001)], [sink])
    pipeline.start()
    until(lambda: len(sink.outcomes) > 50)
    pipeline.stop()
    assert pipeline.join(20)
    status = pipeline.status()
    exactly_one_outcome_each(sink.outcomes, dict(status.captured))
    assert set(status.dropped) <= {("list-2", "late")}
    assert sink.calls[-1] == "close"


def test_stop_goes_on_without_a_sink_that_hangs_and_counts_its_loss() -> None:
    stuck = threading.Event()
    sink, good = ListSink(name="stuck", before=lambda o: stuck.wait(30)), ListSink(name="good")
    pipeline = Pipeline(stub_detector(), [ListSource(FRAMES, live=True, hold=True)], [sink, good], stop_seconds=0.3)
    pipeline.start()
    until(lambda: len(good.outcomes) == 5)
    pipeline.stop()
    assert pipeline.join(5)
    stuck.set()
    assert pipeline.status().lost == {"stuck": 5, "good": 0}


def test_stop_goes_on_without_an_engine_that_hangs_and_its_frames_are_drops() -> None:
    stuck = threading.Event()
    sink = ListSink()
    source = ListSource(FRAMES, live=True, hold=True)
    detector = stub_detector(lambda batch: stuck.wait(30))
    pipeline = Pipeline(detector, [source], [sink], stop_seconds=0.3, queue=9)
    pipeline.start()
    until(lambda: pipeline.stalled_ns() > 10_000_000 and pipeline.status().captured == {"list": 5})
    pipeline.stop()
    assert pipeline.join(5)
    stuck.set()
    time.sleep(0.05)
    exactly_one_outcome_each(sink.outcomes, {"list": 5})
    assert pipeline.status().dropped == {("list", "stop"): 5}


def test_label_is_refused_or_repaired() -> None:
    for repair, labels in ((False, [3, None, None, 1, 0, None]), (True, [3, 0, 2, 1, 0, None])):
        sink = ListSink()
        frames = [*FRAMES, Frame(None, time.monotonic_ns(), problem="half a JPEG")]
        Pipeline(stub_detector(), [ListSource(frames)], [sink], repair=repair).run()
        assert [o.label for o in sink.outcomes] == labels
        assert sink.outcomes[-1].verdict is not None
        assert sink.outcomes[-1].verdict.decision is Decision.INVALID
        assert sink.outcomes[-1].verdict.reason == "half a JPEG"


def test_alarm_is_each_cameras_own() -> None:
    sink = ListSink()
    bad, good = [TRIGGERED_NORTH] * 4 + [CLEAN_WEST] * 4, [CLEAN_WEST] * 8
    pipeline = Pipeline(
        stub_detector(), [ListSource(bad, name="a"), ListSource(good, name="b")], [sink], alarm=AlarmRule(2, 3)
    )
    pipeline.run()
    alarms = {name: [o.alarm for o in sink.outcomes if o.frame.camera == name] for name in "ab"}
    assert alarms == {"a": [False, True, True, True, True, False, False, False], "b": [False] * 8}
    assert pipeline.status().alarms == frozenset()


def test_region_is_judged_and_a_frame_that_does_not_hold_it_is_invalid() -> None:
    big = np.zeros((6, 8, 1), np.uint8)
    big[2:4, 3:5] = TRIGGERED_NORTH
    sink = ListSink()
    Pipeline(stub_detector(), [ListSource([big, CLEAN_WEST, big])], [sink], region=Region(3, 2, 2, 2)).run()
    assert sink.decisions() == ["trigger", "invalid", "trigger"]
    assert sink.outcomes[0].frame.pixels is big
    assert sink.outcomes[1].verdict is not None
    assert sink.outcomes[1].verdict.reason == "frame: expected one that holds the region 3,2,2,2, got 2x2"


def test_options_out_of_range_are_named() -> None:
    detector, source = stub_detector(), ListSource([])
    with pytest.raises(OptionError, match="sources: expected at least one, got none"):
        Pipeline(detector, [])
    with pytest.raises(OptionError, match="batch: expected at least 1, got 0"):
        Pipeline(detector, [source], batch=0)
    with pytest.raises(OptionError, match="queue: expected at least 1 frame, got 0"):
        Pipeline(detector, [source], queue=0)
    with pytest.raises(OptionError, match="sink queue: expected at least 1, got -1"):
        Pipeline(detector, [source], sink_queue=-1)
    with pytest.raises(OptionError, match="max frames: expected at least 1, got 0"):
        Pipeline(detector, [source], max_frames=0)
