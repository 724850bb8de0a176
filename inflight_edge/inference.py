"""Inference: the one thread that judges, from the queue of frames to the outcomes."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping

from inflight_edge.actions import Alarm, label
from inflight_edge.affinity import pin
from inflight_edge.counters import Counters
from inflight_edge.detector import Detector
from inflight_edge.errors import BundleError
from inflight_edge.events import Frame, Outcome
from inflight_edge.frame_queue import FrameQueue
from inflight_edge.judging import judge_frames
from inflight_edge.region import Region
from inflight_edge.verdict import Verdict

__all__ = ["Inference"]

log = logging.getLogger(__name__)


class Inference(threading.Thread):
    """Takes batches of up to ``batch`` frames until the queue is closed and empty.

    emit    takes each outcome.
    failed  takes an error that should not have been: nothing is judged any more.
    """

    def __init__(
        self,
        detector: Detector,
        frames: FrameQueue,
        *,
        batch: int,
        region: Region | None,
        repair: bool,
        alarms: Mapping[str, Alarm],
        counters: Counters,
        emit: Callable[[Outcome], None],
        failed: Callable[[Exception, bool], None],
        cpus: frozenset[int],
    ) -> None:
        super().__init__(name="inference", daemon=True)
        self.class_names = detector.class_names
        self._detector = detector
        self._next: Detector | None = None
        self._frames = frames
        self._batch, self._region, self._repair = batch, region, repair
        self._alarms = alarms
        self._counters = counters
        self._emit, self._failed = emit, failed
        self._cpus = cpus
        self._lock = threading.Lock()
        self._in_hand: list[Frame] = []
        self._busy_since_ns = 0

    def replace(self, detector: Detector) -> None:
        """Judge by another detector from the next batch on.  Raises BundleError when its classes are others."""
        expected, got = self.class_names, detector.class_names
        if got != expected:
            raise BundleError(
                f"classes: expected the {len(expected)} as now ({', '.join(expected[:8])}), "
                f"got {len(got)} ({', '.join(got[:8])}); start the pipeline anew to change them"
            )
        self._next = detector

    def stalled_ns(self) -> int:
        """How long it has been at the present batch, 0 when it waits for frames."""
        since = self._busy_since_ns
        return time.monotonic_ns() - since if since else 0

    def take_in_hand(self) -> list[Frame]:
        """The batch being judged: the caller, and nobody else, makes its outcomes."""
        with self._lock:
            frames, self._in_hand = self._in_hand, []
        return frames

    def run(self) -> None:
        """Thread."""
        try:
            pin(self._cpus)
            while frames := self._frames.take(self._batch):
                self._in_hand = frames
                taken_ns = self._busy_since_ns = time.monotonic_ns()
                if self._next is not None:
                    self._detector, self._next = self._next, None
                    log.info("the new bundle judges from here on", extra={"event": "reloaded"})
                verdicts, stages = judge_frames(self._detector, frames, self._region)
                done_ns = time.monotonic_ns()
                if not self.take_in_hand():
                    return  # the stop went on without this thread
                for frame, verdict, times in zip(frames, verdicts, stages, strict=True):
                    # A source's clock may be wrong; a latency is never below 0.
                    times["queue"] = max(0, taken_ns - frame.captured_ns)
                    times["whole"] = max(0, done_ns - frame.captured_ns)
                    self._conclude(frame, verdict, times)
                self._busy_since_ns = 0
        except Exception as error:  # noqa: BLE001 - reported, and ends the run
            self._failed(error, True)

    def _conclude(self, frame: Frame, verdict: Verdict, times: dict[str, int]) -> None:
        camera, counters, alarm = frame.camera, self._counters, self._alarms[frame.camera]
        for stage, nanoseconds in times.items():
            counters.stages[stage].record(nanoseconds)
        name = "" if verdict.predicted is None else self.class_names[verdict.predicted]
        counters.decisions[camera, verdict.decision.value, name] += 1
        counters.judged[camera] += 1
        if alarm.update(verdict):
            state = "on" if alarm.on else "off"
            fields = {"camera": camera, "event": f"alarm {state}", "index": frame.index}
            log.info("camera %s: alarm %s at frame %d", camera, state, frame.index, extra=fields)
        emitted = label(verdict, repair=self._repair)
        self._emit(Outcome(frame, verdict, "", emitted, alarm.on, time.time_ns(), times))
