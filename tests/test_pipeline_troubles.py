"""What goes wrong in flight, done for real: nothing invalid is accepted, nothing is lost without a count."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import CLEAN_EAST, CLEAN_WEST, TRIGGERED_NORTH, TRIGGERED_SOUTH, tiny_bundle, tiny_guard, tiny_self_test
from hypothesis import given, settings
from hypothesis import strategies as st
from pipelines import ListSink, ListSource, StubEngine, exactly_one_outcome_each, stub_detector, until

from inflight_edge import (
    BundleError,
    Decision,
    DependencyError,
    Detector,
    EngineError,
    Frame,
    OptionError,
    Pipeline,
    SourceError,
    capture,
)
from inflight_edge.capture import Backoff

HOUR_NS = 3_600_000_000_000


def test_engine_that_fails_in_the_middle_makes_those_frames_invalid_and_goes_on() -> None:
    calls = [0]

    def fail(batch: object) -> None:
        calls[0] += 1
        if calls[0] in (4, 5):
            raise EngineError("device lost") if calls[0] == 4 else ZeroDivisionError("bug")

    sink = ListSink()
    Pipeline(stub_detector(fail), [ListSource([CLEAN_WEST] * 10)], [sink]).run()
    assert sink.decisions() == ["accept"] * 3 + ["invalid"] * 2 + ["accept"] * 5
    assert [o.verdict.reason for o in sink.outcomes[3:5] if o.verdict] == [
        "engine stub: device lost",
        "engine stub: ZeroDivisionError: bug",
    ]
    assert [o.label for o in sink.outcomes[3:5]] == [None, None]


def test_not_a_number_in_the_features_is_invalid() -> None:
    class Spoiled(StubEngine):
        def run(self, batch: Any) -> Any:
            logits, features = super().run(batch)
            features[features[:, 1] > 0] = np.nan
            return logits, features

    sink = ListSink()
    detector = Detector(tiny_bundle(), engine=Spoiled())
    Pipeline(detector, [ListSource([CLEAN_WEST, CLEAN_EAST, CLEAN_WEST])], [sink], repair=True).run()
    assert sink.decisions() == ["accept", "invalid", "accept"]
    assert sink.outcomes[1].label is None


def test_failure_outside_the_engine_is_invalid_too(monkeypatch: pytest.MonkeyPatch) -> None:
    detector = stub_detector()

    def fail(*arguments: object) -> None:
        raise ValueError("a bug of the detector")

    monkeypatch.setattr(detector, "judge", fail)
    sink = ListSink()
    Pipeline(detector, [ListSource([CLEAN_WEST] * 3)], [sink]).run()
    assert sink.decisions() == ["invalid"] * 3
    assert {o.verdict.reason for o in sink.outcomes if o.verdict} == {"ValueError: a bug of the detector"}


def test_size_and_format_may_change_in_the_stream() -> None:
    def scaled(frame: Any, n: int) -> Any:
        return frame.repeat(n, axis=0).repeat(n, axis=1)

    grey = TRIGGERED_NORTH[:, :, 0]
    nv12 = np.full((6, 4), 128, np.uint8)
    nv12[:4] = scaled(grey, 2)
    now = time.monotonic_ns()
    frames = [
        CLEAN_WEST,
        scaled(TRIGGERED_NORTH, 50),
        grey,
        TRIGGERED_NORTH.repeat(3, axis=2),
        Frame(TRIGGERED_NORTH.repeat(3, axis=2), now, "bgr"),
        Frame(nv12, now, "nv12-bt601-full"),
        TRIGGERED_NORTH.repeat(2, axis=2),
        TRIGGERED_NORTH.astype(np.float32),
        Frame(grey[:1], now, "nv12-bt601"),
        Frame(grey, now, "cmyk"),  # type: ignore[arg-type]
        np.zeros((0, 2), np.uint8),
        CLEAN_WEST,
    ]
    sink = ListSink()
    Pipeline(stub_detector(), [ListSource(frames)], [sink], batch=4).run()
    assert sink.decisions() == ["accept", *["trigger"] * 5, *["invalid"] * 5, "accept"]
    assert all(o.verdict.reason for o in sink.outcomes[6:11] if o.verdict)


def test_camera_that_goes_and_comes_back_goes_on_counting(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "inflight_edge")

    class Flaky(ListSource):
        def open(self) -> None:
            super().open()
            if self.n_opened in (1, 3, 4):
                raise SourceError("no route")

    items = [CLEAN_WEST, CLEAN_EAST, SourceError("unplugged"), CLEAN_WEST, RuntimeError("driver bug"), CLEAN_EAST]
    source, sink = Flaky(items, live=True, name="cam"), ListSink()
    status = Pipeline(stub_detector(), [source], [sink], backoff=(0.001, 0.01)).run()
    assert sink.indices() == [0, 1, 2, 3]
    assert source.n_opened == 6
    assert status.reconnects == {"cam": 3}, "the late start, and two breaks"
    messages = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert messages == [
        f"camera cam: {text}" for text in ("no route", "unplugged", "no route", "no route", "RuntimeError: driver bug")
    ]
    assert "camera cam: end of the stream" in [r.getMessage() for r in caplog.records]


def test_camera_that_breaks_off_after_a_frame_again_and_again_is_called_ever_more_rarely(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    items = [CLEAN_WEST, SourceError("gone")] * 4
    waits: list[float] = []
    real = Backoff.wait

    def noted(self: Backoff) -> float:
        waits.append(real(self))
        return waits[-1]

    monkeypatch.setattr(Backoff, "wait", noted)
    Pipeline(stub_detector(), [ListSource(items, live=True)], [], backoff=(0.001, 1.0)).run()
    assert len(waits) == 4
    assert all(later > earlier for earlier, later in zip(waits[:-2], waits[2:], strict=True))
    waits.clear()
    monkeypatch.setattr(capture, "PROVEN_NS", 0)  # as if it had lasted
    Pipeline(stub_detector(), [ListSource(items, live=True)], [], backoff=(0.001, 1.0)).run()
    assert len(waits) == 4
    assert max(waits) <= 0.001


def test_waiting_times_double_to_a_limit_and_vary() -> None:
    backoff = Backoff(0.5, 30.0)
    longest = [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    waits = [backoff.wait() for _ in longest]
    assert all(most / 2 <= wait <= most for wait, most in zip(waits, longest, strict=True))
    assert len({wait / most for wait, most in zip(waits, longest, strict=True)}) > 5
    backoff.reset()
    assert backoff.wait() <= 0.5


def test_stop_does_not_wait_for_a_camera_that_is_away() -> None:
    class Away(ListSource):
        def open(self) -> None:
            super().open()
            raise SourceError("no route")

    source = Away([], live=True)
    pipeline = Pipeline(stub_detector(), [source], [], backoff=(60.0, 60.0))
    pipeline.start()
    until(lambda: source.n_opened)
    pipeline.stop()
    assert pipeline.join(5)


def test_file_that_breaks_off_is_an_error_after_its_frames_are_delivered_and_others_go_on() -> None:
    sink = ListSink()
    broken = ListSource([CLEAN_WEST, CLEAN_WEST, SourceError("half a file")], name="broken")
    pipeline = Pipeline(stub_detector(), [broken, ListSource([CLEAN_WEST] * 50, name="whole")], [sink])
    with pytest.raises(SourceError, match="half a file"):
        pipeline.run()
    exactly_one_outcome_each(sink.outcomes, {"broken": 2, "whole": 50})
    assert sink.calls[-1] == "close"
    assert [camera for camera, _ in pipeline.errors] == ["broken"]


@pytest.mark.parametrize(
    "error",
    [OptionError("no such device"), DependencyError("av: not here"), SourceError("hangs in its driver", final=True)],
)
def test_camera_that_no_wait_will_mend_stops_everything(error: Exception) -> None:
    class Wrong(ListSource):
        def open(self) -> None:
            raise error

    other = ListSource([CLEAN_WEST], live=True, hold=True)
    with pytest.raises(type(error), match=str(error)):
        Pipeline(stub_detector(), [Wrong([], live=True), other], []).run()


def test_stop_goes_on_without_a_source_that_hangs_and_its_late_frame_is_a_drop() -> None:
    stuck = threading.Event()

    class Hanging(ListSource):
        def read(self) -> Frame | None:
            stuck.wait(30)
            return super().read()

    pipeline = Pipeline(stub_detector(), [Hanging([CLEAN_WEST], live=True)], [], stop_seconds=0.2)
    pipeline.start()
    pipeline.stop()
    assert pipeline.join(5)
    stuck.set()
    until(lambda: pipeline.status().dropped == {("list", "stop"): 1})
    assert pipeline.status().captured == {"list": 1}


def test_stop_goes_on_without_sources_whose_close_hangs_or_fails(caplog: pytest.LogCaptureFixture) -> None:
    """Several that hang cost the time of one; sinks are flushed and closed all the same."""
    stuck = threading.Event()

    class Hanging(ListSource):
        def close(self) -> None:
            if pipeline._stopping.is_set():
                stuck.wait(30)

    class Failing(ListSource):
        def close(self) -> None:
            super().close()
            if pipeline._stopping.is_set():
                raise RuntimeError("driver bug")

    sink = ListSink()
    sources = [Hanging([CLEAN_WEST], live=True, hold=True, name=f"hangs {i}") for i in range(4)]
    failing = Failing([CLEAN_WEST], live=True, hold=True, name="fails")
    pipeline = Pipeline(stub_detector(), [*sources, failing], [sink], stop_seconds=0.5)
    pipeline.start()
    until(lambda: len(sink.outcomes) == 5)
    began = time.monotonic()
    pipeline.stop()
    assert pipeline.join(5)
    assert time.monotonic() - began < 4 * 0.5
    stuck.set()
    assert sink.calls[-2:] == ["flush", "close"]
    assert "camera fails: RuntimeError: driver bug" in caplog.text
    assert "camera hangs 3: did not end in time" in caplog.text


def test_frame_stamped_in_the_future_or_by_another_clock_is_judged() -> None:
    sink = ListSink()
    now = time.monotonic_ns()
    frames = [Frame(CLEAN_WEST, now + HOUR_NS), Frame(CLEAN_WEST, -HOUR_NS), Frame(CLEAN_WEST, 1 << 80)]
    Pipeline(stub_detector(), [ListSource(frames)], [sink]).run()
    assert sink.decisions() == ["accept"] * 3
    assert sink.outcomes[0].stages["queue"] == sink.outcomes[0].stages["whole"] == 0
    assert sink.outcomes[1].stages["whole"] >= HOUR_NS


def test_wall_clock_that_jumps_by_hours_changes_nothing_but_what_people_read(monkeypatch: pytest.MonkeyPatch) -> None:
    real, jumps = time.time_ns, [0]

    def jumping() -> int:
        jumps[0] += 1
        return real() + (-1) ** jumps[0] * 5 * HOUR_NS

    monkeypatch.setattr(time, "time_ns", jumping)
    monkeypatch.setattr(time, "time", lambda: jumping() / 1e9)
    sink = ListSink()
    source = ListSource(
        [*[CLEAN_WEST] * 50, SourceError("gone"), *[CLEAN_WEST] * 50], live=True, pace_s=0.001, name="cam"
    )
    started = time.monotonic()
    status = Pipeline(stub_detector(), [source], [sink], backoff=(0.01, 0.02), max_seconds=20.0, queue=50).run()
    assert time.monotonic() - started < 10
    assert sink.indices() == list(range(100))
    assert max(stage.max_ns for stage in status.stages.values()) < 5_000_000_000
    assert 0 < status.uptime_ns < 10_000_000_000
    walls = np.diff([o.wall_ns for o in sink.outcomes])
    assert abs(walls).max() > 9 * HOUR_NS, "the jump was really there"


# --- the bundle is replaced while frames are judged


def unguarded_west() -> Detector:
    """Like the tiny bundle's detector, without the guard of west."""
    guards = (tiny_guard(0, "shared"),)
    return stub_detector(guards=guards, self_test=tiny_self_test(guards))


def test_bundle_replaced_in_flight_loses_no_frame_and_judges_none_by_half_of_each() -> None:
    old, new, sink = stub_detector(), unguarded_west(), ListSink()
    frames = [CLEAN_WEST, TRIGGERED_NORTH, TRIGGERED_SOUTH]
    pipeline = Pipeline(old, [ListSource(frames * 500, name=name) for name in "abc"], [sink], batch=3)
    pipeline.start()
    replaced = 0
    while not pipeline.join(0.002):
        pipeline.replace((new, old)[replaced % 2])
        replaced += 1
    assert replaced > 5
    exactly_one_outcome_each(sink.outcomes, dict.fromkeys("abc", 1500))
    by_old, by_new = (detector.run(frames) for detector in (old, new))
    kinds = [(o.verdict == by_old[o.frame.index % 3], o.verdict == by_new[o.frame.index % 3]) for o in sink.outcomes]
    assert all(a != b for a, b in kinds), "each verdict is one detector's"
    assert {a for a, _ in kinds} == {True, False}, "both have judged"


def test_bundle_of_other_classes_is_refused_and_the_old_one_goes_on() -> None:
    sink = ListSink()
    pipeline = Pipeline(stub_detector(), [ListSource([CLEAN_WEST], live=True, hold=True)], [sink])
    pipeline.start()
    other = stub_detector(class_names=("n", "e", "s", "w"))
    with pytest.raises(BundleError, match=r"expected the 4 as now \(north, east, .* got 4 \(n, e, s, w\); start the"):
        pipeline.replace(other)
    pipeline.stop()
    assert pipeline.join(5)
    assert sink.decisions() == ["accept"]


# --- memory

HUGE = """
import resource, sys, time
sys.path.insert(0, {tests!r})
import numpy as np
from pipelines import ListSink, ListSource, stub_detector
from bundles import CLEAN_WEST
from inflight_edge import Pipeline

used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (160 << 20),) * 2)
# 256 MiB once it is made contiguous, though it takes none as it is.
huge = np.broadcast_to(np.uint8(0), (1 << 14, 1 << 14))
sink = ListSink()
Pipeline(stub_detector(), [ListSource([CLEAN_WEST, huge, CLEAN_WEST])], [sink]).run()
print(*sink.decisions())
print(sink.outcomes[1].verdict.reason)
"""


def test_frame_for_which_the_memory_does_not_suffice_is_invalid() -> None:
    code = HUGE.format(tests=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    decisions, reason = done.stdout.splitlines()
    assert decisions == "accept invalid accept"
    assert "memory" in reason.lower()


# --- everything at once

DISASTERS = st.sampled_from(["good", "trigger", "broken", "no pixels", "wrong type", "engine", "nan", "gone"])


@settings(max_examples=40, deadline=None)
@given(plan=st.lists(DISASTERS, max_size=25), repair=st.booleans(), batch=st.integers(1, 4))
def test_invalid_never_becomes_accepted_whatever_happens(plan: list[str], repair: bool, batch: int) -> None:
    """The first pixel of each frame tells the engine what to do; values 1 and 2 leave the verdict as it is."""

    class Engine(StubEngine):
        def run(self, batch: Any) -> Any:
            logits, features = super().run(batch)
            marks = np.rint(batch[:, 0, 0, 1] * 255)
            if 1 in marks:
                raise EngineError("failed")
            features[marks == 2] = np.nan
            return logits, features

    def item(kind: str) -> Any:
        pixels = (TRIGGERED_NORTH if kind == "trigger" else CLEAN_WEST).copy()
        pixels[0, 1] = {"engine": 1, "nan": 2}.get(kind, 0)
        special = {
            "broken": Frame(pixels, time.monotonic_ns(), problem="half a frame"),
            "no pixels": Frame(None, time.monotonic_ns()),
            "wrong type": pixels.astype(float),
            "gone": SourceError("gone"),
        }
        return special.get(kind, pixels)

    sink = ListSink()
    source = ListSource([item(kind) for kind in plan], live=True)
    detector = Detector(tiny_bundle(), engine=Engine())
    Pipeline(detector, [source], [sink], repair=repair, batch=batch, queue=100, backoff=(1e-4, 1e-4)).run()
    kinds = [kind for kind in plan if kind != "gone"]
    assert sink.indices() == list(range(len(kinds)))
    for kind, outcome in zip(kinds, sink.outcomes, strict=True):
        assert outcome.verdict is not None
        decision = outcome.verdict.decision
        if kind in ("good", "trigger"):  # the engine may have failed with another frame of their batch
            expected = {Decision.ACCEPT if kind == "good" else Decision.TRIGGER, Decision.INVALID}
            assert decision in expected
        else:
            assert decision is Decision.INVALID
        if decision is Decision.INVALID:
            assert not outcome.verdict.passes
            assert outcome.label is None
            assert outcome.alarm
