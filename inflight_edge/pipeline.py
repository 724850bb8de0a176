"""The real-time loop: capture, inference and every sink in threads of their own, and one outcome for every frame."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TypeVar

from inflight_edge.actions import Alarm, AlarmRule
from inflight_edge.capture import Backoff, Capture, describe
from inflight_edge.counters import Counters, Trouble, summaries
from inflight_edge.delivery import Delivery
from inflight_edge.detector import Detector
from inflight_edge.errors import InflightError, OptionError
from inflight_edge.events import Context, Frame, Outcome, Status
from inflight_edge.frame_queue import FrameQueue, Keep
from inflight_edge.inference import Inference
from inflight_edge.region import Region
from inflight_edge.sinks import Sink
from inflight_edge.sources import Source

Running = TypeVar("Running", bound=threading.Thread)

__all__ = ["Pipeline"]

log = logging.getLogger(__name__)


class Pipeline:
    """Judges the frames of sources and hands the outcomes to sinks.

        pipeline = Pipeline(detector, [source], [sink])
        status = pipeline.run()                 # until the sources end, or `stop` from another thread

    keep            what happens to frames that come too fast, see frame_queue; None: ``newest`` for a live source,
                    ``all`` for others.
    queue           frames that may wait per source.    sink_queue  outcomes that may wait per sink.
    batch           frames per call of the engine, of whatever sources wait; None: one per source.
    max_frames      stop after so many frames of all sources together.     max_seconds  stop after this time.
    repair          the label of a trigger is its source class, instead of none.
    alarm           when the alarm of a camera is on.
    region          the part of each frame that is judged; None: all of it.
    cpus            processors by role: capture, inference, sinks.
    backoff         waiting times in seconds before a live source is opened again: first, longest.
    stop_seconds    how long ``stop`` lets each of sources, engine and sinks end, before it goes on without them.
    bundle          the bundle's folder, for sinks to show.

    errors: what ended sources before their time, as (camera, error).  Raises OptionError.
    """

    def __init__(
        self,
        detector: Detector,
        sources: Sequence[Source],
        sinks: Sequence[Sink] = (),
        *,
        keep: Keep | None = None,
        queue: int = 4,
        sink_queue: int = 256,
        batch: int | None = None,
        max_frames: int | None = None,
        max_seconds: float | None = None,
        repair: bool = False,
        alarm: AlarmRule = AlarmRule(),  # noqa: B008 - immutable
        region: Region | None = None,
        cpus: Mapping[str, frozenset[int]] | None = None,
        backoff: tuple[float, float] = (0.5, 30.0),
        stop_seconds: float = 10.0,
        bundle: str = "",
    ) -> None:
        if not sources:
            raise OptionError("sources: expected at least one, got none")
        for name, value in (("batch", batch), ("sink queue", sink_queue), ("max frames", max_frames)):
            if value is not None and value < 1:
                raise OptionError(f"{name}: expected at least 1, got {value}")
        batch, cpus = batch or len(sources), cpus or {}
        self._max_frames, self._max_seconds = max_frames, max_seconds
        self._stop_seconds = stop_seconds
        self._bundle = bundle
        cameras = _unique([source.name for source in sources])
        self._keep: dict[str, Keep] = {
            camera: keep or ("newest" if source.live else "all")
            for camera, source in zip(cameras, sources, strict=True)
        }
        self._counters = Counters()
        self._drops = {camera: Trouble(f"camera {camera}", {"camera": camera, "event": "drop"}) for camera in cameras}
        self._alarms = {camera: Alarm(alarm) for camera in cameras}
        self._stopping, self._done = threading.Event(), threading.Event()
        self._stop_at_ns: int | None = None
        self._lock = threading.Lock()
        self._n_admitted = self._n_ended = 0
        self._started_ns = 0
        self.errors: list[tuple[str, Exception]] = []
        self._frames = FrameQueue(self._keep, max(queue, batch) if queue > 0 else queue, self._room)
        self._deliveries = [
            Delivery(sink, name, sink_queue, nudge=self._frames.nudge, cpus=cpus.get("sinks", frozenset()))
            for name, sink in zip(_unique([sink.name for sink in sinks]), sinks, strict=True)
        ]
        self._captures = [
            Capture(
                source,
                camera,
                stopping=self._stopping,
                deliver=self._deliver,
                reconnects=self._counters.reconnects,
                failed=partial(self._failed, camera),
                ended=self._ended,
                backoff=Backoff(*backoff),
                cpus=cpus.get("capture", frozenset()),
            )
            for camera, source in zip(cameras, sources, strict=True)
        ]
        self._inference = Inference(
            detector,
            self._frames,
            batch=batch,
            region=region,
            repair=repair,
            alarms=self._alarms,
            counters=self._counters,
            emit=self._emit,
            failed=partial(self._failed, "inference"),
            cpus=cpus.get("inference", frozenset()),
        )

    # --- from outside

    def start(self) -> None:
        """Open the sinks, then start to judge.  Raises what a sink's ``open`` raises: then nothing runs."""
        self._started_ns = time.monotonic_ns()
        context = Context(self._inference.class_names, tuple(self._keep), self._bundle, self.status)
        for delivery in self._deliveries:
            delivery.begin(context)
        for delivery in self._deliveries:
            delivery.opened.wait()
        errors = [delivery.error for delivery in self._deliveries if delivery.error]
        if errors:
            for delivery in self._deliveries:
                delivery.finish()
            for delivery in self._deliveries:
                delivery.join(self._stop_seconds)
            raise errors[0]
        self._inference.start()
        for capture in self._captures:
            capture.start()
        threading.Thread(target=self._supervise, name="supervisor", daemon=True).start()

    def run(self) -> Status:
        """Start, wait for the end, and return the final counts.  Ctrl-C stops it as ``stop`` does.

        Raises the first of ``errors``, once all outcomes are delivered.
        """
        self.start()
        try:
            self._done.wait()
        except KeyboardInterrupt:
            self.stop()
            self._done.wait()
            raise
        if self.errors:
            raise self.errors[0][1]
        return self.status()

    def stop(self) -> None:
        """Ask for the end; what was read is judged and delivered.  Any thread, but no signal handler, may call it."""
        self._stop_at_ns = self._stop_at_ns or time.monotonic_ns()
        self._stopping.set()

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the end, at most ``timeout`` seconds; whether it has come."""
        return self._done.wait(timeout)

    def replace(self, detector: Detector) -> None:
        """Judge by another detector from the next batch on.  The caller has verified it, see reload.load_verified.

        Raises BundleError when its classes are others: the sinks were told these, and an index would change meaning.
        """
        self._inference.replace(detector)

    def status(self) -> Status:
        """A snapshot of the counts."""
        counters = self._counters
        sinks = self._deliveries
        return Status(
            captured={camera: counters.captured[camera] for camera in self._keep},  # those that gave none too
            judged=dict(counters.judged),
            dropped=dict(counters.dropped),
            decisions=dict(counters.decisions),
            reconnects=dict(counters.reconnects),
            alarms=frozenset(camera for camera, alarm in self._alarms.items() if alarm.on),
            queues={"frames": len(self._frames), **{f"sink {d.label}": len(d) for d in sinks}},
            lost={delivery.label: delivery.lost for delivery in sinks},
            stages=summaries({**counters.stages, **{f"sink {d.label}": d.latency for d in sinks}}),
            uptime_ns=time.monotonic_ns() - self._started_ns if self._started_ns else 0,
        )

    def stalled_ns(self) -> int:
        """How long inference has been at the present batch, 0 when it waits for frames: for a watchdog."""
        return self._inference.stalled_ns()

    # --- capture threads

    def _deliver(self, frame: Frame) -> None:
        self._counters.captured[frame.camera] += 1
        with self._lock:
            self._n_admitted += 1
            n = self._n_admitted
        if self._max_frames is not None and n >= self._max_frames:
            self._stopping.set()
            if n > self._max_frames:
                self._drop(frame, "limit")
                return
        dropped = self._frames.put(frame)
        if dropped is not None:
            self._drop(dropped, "stop" if self._frames.closed else "late")

    def _drop(self, frame: Frame, reason: str) -> None:
        self._counters.dropped[frame.camera, reason] += 1
        if reason != "limit":
            self._drops[frame.camera].happened(f"frame {frame.index} dropped: {reason}")
        bare = Frame(None, frame.captured_ns, frame.colour, frame.name, frame.problem, frame.camera, frame.index)
        self._emit(Outcome(bare, None, reason, alarm=self._alarms[frame.camera].on, wall_ns=time.time_ns()))

    def _ended(self) -> None:
        with self._lock:
            self._n_ended += 1
            if self._n_ended == len(self._captures):
                self._stopping.set()

    # --- any of the threads

    def _emit(self, outcome: Outcome) -> None:
        # Frames that wait for room do so before they are judged; their drops and those of others wait for nothing.
        patient = not outcome.drop and self._keep[outcome.frame.camera] == "all"
        for delivery in self._deliveries:
            delivery.offer(outcome, patient=patient)

    def _room(self) -> bool:
        return all(delivery.has_room() for delivery in self._deliveries)

    def _failed(self, camera: str, error: Exception, for_all: bool) -> None:
        trace = None if isinstance(error, InflightError) else error  # this package's own errors say all in a line
        log.error("%s: %s", camera, describe(error), extra={"camera": camera}, exc_info=trace)
        self.errors.append((camera, error))
        if for_all:
            self._stopping.set()

    # --- supervisor thread

    def _supervise(self) -> None:
        """The stop sequence; see ARCHITECTURE.md."""
        if not self._stopping.wait(self._max_seconds):
            log.info("%g seconds are over", self._max_seconds, extra={"event": "limit"})
        self._stopping.set()
        self._frames.release()
        closers = [
            threading.Thread(target=self._close, args=(capture,), name=f"close {capture.camera}", daemon=True)
            for capture in self._captures
        ]
        for closer in closers:
            closer.start()
        for capture in self._await(self._captures, patient=False):
            log.error("camera %s: did not end in time", capture.camera, extra={"camera": capture.camera})
        for capture, closer in zip(self._captures, closers, strict=True):
            if not capture.is_alive():  # no close comes after the end, when the source may be used again
                closer.join(0.5)
        self._frames.close()
        if self._await([self._inference]):
            log.error("the engine did not end in time", extra={"event": "stop"})
            for frame in [*self._inference.take_in_hand(), *self._frames.clear()]:
                self._drop(frame, "stop")
        for delivery in self._deliveries:
            delivery.finish()
        for delivery in self._await(self._deliveries):
            delivery.abandon()
        self._done.set()

    def _close(self, capture: Capture) -> None:
        """Thread, since a library's call may hang: close a source until nobody reads it, for it may open once more."""
        failed = False
        while capture.is_alive() and not self._done.is_set():
            try:
                capture.source.close()
            except Exception as error:  # noqa: BLE001 - a library behind a source may raise anything
                if not failed:
                    log.warning("camera %s: %s", capture.camera, describe(error), extra={"camera": capture.camera})
                failed = True
            capture.join(0.1)

    def _await(self, threads: Sequence[Running], *, patient: bool = True) -> list[Running]:
        """Wait for threads, all together: patiently while nobody asked to stop, else ``stop_seconds``; those that did not end."""
        start = time.monotonic_ns()
        while alive := [thread for thread in threads if thread.is_alive()]:
            asked_ns = self._stop_at_ns if patient else start
            if asked_ns is not None and time.monotonic_ns() - max(asked_ns, start) > self._stop_seconds * 1e9:
                return alive
            alive[0].join(0.1)
        return []


def _unique(names: Sequence[str]) -> list[str]:
    """The names, with a number behind those that come again."""
    found: list[str] = []
    for name in names:
        number, unique = 1, name
        while unique in found:
            number += 1
            unique = f"{name}-{number}"
        found.append(unique)
    return found
