"""The `run` command: a pipeline under signals and a service manager, its progress and its summary."""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any

from inflight_edge._arguments import check_file
from inflight_edge._text import printable, table
from inflight_edge.affinity import pin
from inflight_edge.capture import describe
from inflight_edge.detector import Detector
from inflight_edge.events import Status
from inflight_edge.logs import configure
from inflight_edge.pipeline import Pipeline
from inflight_edge.reload import load_verified
from inflight_edge.sd_notify import Notifier
from inflight_edge.settings import Settings

__all__ = ["EXIT_ERROR", "EXIT_LOST", "Service", "serve", "status_record", "summary"]

log = logging.getLogger(__name__)

EXIT_ERROR, EXIT_LOST = 2, 3
_TICK_S = 1.0


def serve(settings: Settings, *, json_path: Path | None = None, quiet: bool = False) -> int:
    """Run until the sources end or a signal asks to stop; returns the exit code.

    SIGINT, SIGTERM  stop: what was read is judged and delivered.  A second one ends the process at once.
    SIGHUP           load the bundle again.
    Raises InflightError when it cannot start.
    """
    if json_path is not None:
        check_file("--json", json_path, bundle=settings.bundle)
    from inflight_edge.sinks import make_sink
    from inflight_edge.sources import make_source

    logs = configure(settings.log_format, quiet=quiet)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the bundle is being loaded: nothing to load again yet
    try:
        pipeline = Pipeline(
            _load(settings),
            [make_source(text) for text in settings.source],
            [make_sink(text) for text in settings.sinks],
            keep=settings.keep,
            queue=settings.queue,
            sink_queue=settings.sink_queue,
            batch=settings.batch,
            max_frames=settings.max_frames,
            max_seconds=settings.max_seconds,
            repair=settings.repair,
            alarm=settings.alarm_rule,
            region=settings.region_of_interest,
            cpus=settings.processors,
            bundle=settings.bundle,
        )
        progress = sys.stderr.isatty() and not quiet
        status = Service(pipeline, lambda: _load(settings), Notifier(), progress=progress).run()
    finally:
        logs.stop()  # what it still holds comes before the summary
        signal.signal(signal.SIGHUP, signal.SIG_DFL if before is None else before)
    if not quiet:
        print(summary(status), file=sys.stderr)
    errors = [f"{camera}: {describe(error)}" for camera, error in pipeline.errors[:1]]
    if json_path is not None:
        try:
            json_path.write_text(json.dumps(status_record(status), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            errors.append(f"--json: {json_path}: cannot be written: {error.strerror or error}")
    for text in errors:
        print(f"inflight-edge: error: {printable(text)}", file=sys.stderr)
    if errors:
        return EXIT_ERROR
    return EXIT_LOST if any(status.lost.values()) else 0


def _load(settings: Settings) -> Detector:
    """The detector, made where it will run: an engine's own threads have the processors of the thread that made them."""
    cpus = settings.processors.get("inference", frozenset())
    with ThreadPoolExecutor(1, initializer=pin, initargs=(cpus,)) as executor:
        return executor.submit(_verified, settings, len(cpus)).result()


def _verified(settings: Settings, n_cpus: int) -> Detector:
    # ONNX Runtime pins the threads whose number it chooses itself to processors that it chooses too.
    counted = n_cpus if n_cpus and settings.engine != "tensorrt" else None
    return load_verified(
        settings.bundle,
        engine=settings.engine,
        scorer=settings.scorer,
        threads=settings.threads or counted,
        options=settings.engine_options,
        precision=settings.precision,
        key=settings.key,
        alpha=settings.alpha,
    )


class Service:
    """Runs a pipeline in the main thread's name: signals, reloads, watchdog, progress.

    load  makes a verified detector, for a reload.
    """

    def __init__(
        self, pipeline: Pipeline, load: Callable[[], Detector], notifier: Notifier, *, progress: bool = False
    ) -> None:
        self._pipeline = pipeline
        self._load = load
        self._notifier = notifier
        self._progress = progress
        # Its put may be called in a signal handler, whatever this thread is doing.
        self._events: SimpleQueue[int] = SimpleQueue()
        self._reloading = threading.Lock()
        self._reload_again = threading.Event()

    def run(self) -> Status:
        """Start, serve until the end, and give the final counts.  For the main thread.  Raises what start raises."""
        handlers = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        try:
            self._pipeline.start()
            threading.Thread(target=self._announce_end, name="end", daemon=True).start()
            self._notifier.ready()
            log.info("running", extra={"event": "ready"})
            try:
                self._serve()
            except BaseException:
                self._pipeline.stop()  # what was read is delivered first
                self._pipeline.join()
                raise
        finally:
            for number, handler in handlers.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
        return self._pipeline.status()

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if number in (signal.SIGINT, signal.SIGTERM):
            for stop in (signal.SIGINT, signal.SIGTERM):  # the next one is the kernel's: it ends the process
                signal.signal(stop, signal.SIG_DFL)
        self._events.put(number)

    def _announce_end(self) -> None:
        self._pipeline.join()
        self._events.put(0)

    def _serve(self) -> None:
        tick_s = min(_TICK_S, self._notifier.interval_ns / 1e9 or _TICK_S)
        while True:
            try:
                event = self._events.get(timeout=tick_s)
            except Empty:
                self._tick()
                continue
            if event == 0:
                return
            if event == signal.SIGHUP:
                self._reload_again.set()
                threading.Thread(target=self._reload, name="reload", daemon=True).start()
            else:
                log.info("%s: stopping", signal.Signals(event).name, extra={"event": "stopping"})
                self._notifier.stopping()
                self._pipeline.stop()

    def _tick(self) -> None:
        limit_ns = 2 * self._notifier.interval_ns
        if limit_ns and self._pipeline.stalled_ns() < limit_ns:
            self._notifier.alive()
        if self._progress:
            status = self._pipeline.status()
            try:
                print(f"{progress_line(status)}\x1b[K", end="\r", file=sys.stderr, flush=True)
            except OSError:
                self._progress = False  # the terminal has gone, the cameras have not

    def _reload(self) -> None:
        """Load the bundle and hand it over; the old one stays when anything is wrong with the new one."""
        with self._reloading:
            if not self._reload_again.is_set():
                return  # a reload that began after this request has seen to it
            self._reload_again.clear()
            self._notifier.reloading()
            try:
                self._pipeline.replace(self._load())
            except Exception as error:  # noqa: BLE001 - whatever is wrong with it, the old one goes on
                log.error("the bundle stays as it was: %s", describe(error), extra={"event": "reload refused"})
            self._notifier.ready()


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def progress_line(status: Status) -> str:
    """Counts in one short line."""
    seconds = max(status.uptime_ns / 1e9, 1e-9)
    judged, dropped = sum(status.judged.values()), sum(status.dropped.values())
    flagged = sum(n for (_, decision, _), n in status.decisions.items() if decision in ("trigger", "invalid"))
    alarms = f", alarm: {' '.join(sorted(status.alarms))}" if status.alarms else ""
    return f"{judged} judged ({judged / seconds:.1f}/s), {flagged} flagged, {dropped} dropped{alarms}"


def summary(status: Status) -> str:
    """Tables of frames, latencies and sinks, for people."""
    decisions = ("accept", "trigger", "unguarded", "invalid")
    frames = []
    for camera in sorted({*status.captured, *status.reconnects}):
        by_decision = [
            sum(n for (c, d, _), n in status.decisions.items() if (c, d) == (camera, decision))
            for decision in decisions
        ]
        dropped = sum(n for (c, _), n in status.dropped.items() if c == camera)
        counts = (status.captured.get(camera, 0), status.judged.get(camera, 0), *by_decision, dropped)
        frames.append((camera, *counts, status.reconnects.get(camera, 0)))
    parts = [table(frames, ("camera", "captured", "judged", *decisions, "dropped", "reconnects"))]
    stages = [
        (name, s.count, *(f"{ns / 1000:.1f}" for ns in (s.p50_ns, s.p99_ns, s.p999_ns, s.max_ns)))
        for name, s in status.stages.items()
    ]
    if stages:
        parts.append(table(stages, ("stage", "frames", "p50 us", "p99 us", "p99.9 us", "max us")))
    if any(status.lost.values()):
        parts.append(table(sorted(status.lost.items()), ("sink", "lost")))
    return "\n\n".join(parts)


def status_record(status: Status) -> dict[str, Any]:
    """The counts as plain values for JSON: nested dictionaries instead of tuples."""
    dropped: dict[str, dict[str, int]] = {}
    for (camera, reason), n in status.dropped.items():
        dropped.setdefault(camera, {})[reason] = n
    decisions: dict[str, dict[str, dict[str, int]]] = {}
    for (camera, decision, name), n in status.decisions.items():
        decisions.setdefault(camera, {}).setdefault(decision, {})[name] = n
    return {
        "captured": dict(status.captured),
        "judged": dict(status.judged),
        "dropped": dropped,
        "decisions": decisions,
        "reconnects": dict(status.reconnects),
        "alarms": sorted(status.alarms),
        "queues": dict(status.queues),
        "lost": dict(status.lost),
        "stages": {name: asdict(stage) for name, stage in status.stages.items()},
        "seconds": status.uptime_ns / 1e9,
    }
