"""Delivery: one thread and one bounded queue per sink, so that a slow or failing sink holds up nobody else."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from queue import Empty, SimpleQueue

from inflight_edge.affinity import pin
from inflight_edge.capture import describe
from inflight_edge.counters import Trouble
from inflight_edge.errors import SinkError
from inflight_edge.events import Context, Outcome
from inflight_edge.latency import Histogram
from inflight_edge.sinks import Sink

__all__ = ["MAX_WAITING_BYTES", "Delivery"]

FLUSH_NS = 1_000_000_000
# Pixels that may wait for one sink: 40 frames of 1080p.
MAX_WAITING_BYTES = 256 << 20


class Delivery(threading.Thread):
    """Opens a sink, writes every outcome to it, flushes it about once a second, and closes it.

    ``offer`` never waits.  An outcome beyond the queue's size is lost and counted, unless its sender saw to it before
    that there was room (``has_room``), as those of files do.

    nudge   called when a full queue has room again.
    opened  is set once the sink is open, or could not be opened: ``error``.
    latency verdict until written.
    """

    def __init__(
        self, sink: Sink, name: str, size: int, *, nudge: Callable[[], None], cpus: frozenset[int] = frozenset()
    ) -> None:
        super().__init__(name=f"sink {name}", daemon=True)
        self.sink = sink
        self.label = name
        self.opened = threading.Event()
        self.error: Exception | None = None
        self.latency = Histogram()
        self._queue: SimpleQueue[tuple[Outcome, int] | None] = SimpleQueue()
        self._size = size
        self._nudge = nudge
        self._cpus = cpus
        self._context: Context | None = None
        self._bytes_in = 0  # written by the inference thread, the only one whose outcomes have pixels
        self._bytes_out = 0  # written by this thread
        self._full = Trouble(f"sink {name}", {"sink": name, "event": "full"})
        self._failing = Trouble(f"sink {name}", {"sink": name, "event": "failing"})
        self._full_lock = threading.Lock()  # several threads find the queue full
        self._n_failed = 0
        self._failed_by = ""
        self._awaited = False

    def begin(self, context: Context) -> None:
        """Start the thread; wait for ``opened`` then."""
        self._context = context
        self.start()

    def __len__(self) -> int:
        return self._queue.qsize()

    @property
    def lost(self) -> int:
        """Outcomes that the sink did not take."""
        return self._full.total + self._n_failed

    def has_room(self) -> bool:
        """Whether one more outcome has place; if not, ``nudge`` will be called when it has.  For one thread only."""
        self._awaited = True  # before looking: the sink may take an outcome in between
        room = self._room()
        if room:
            self._awaited = False
        return room

    def _room(self) -> bool:
        return self._queue.qsize() < self._size and self._bytes_in - self._bytes_out < MAX_WAITING_BYTES

    def offer(self, outcome: Outcome, *, patient: bool) -> None:
        """Queue an outcome.  patient: its sender waited for room; it is never lost for want of it."""
        if not (patient or self._room()):
            with self._full_lock:
                self._full.happened("its queue is full, outcomes are lost")
            return
        if weight := _weight(outcome):  # other threads, whose outcomes have none, must not write it
            self._bytes_in += weight
        self._queue.put((outcome, time.monotonic_ns()))

    def finish(self) -> None:
        """Nothing follows: write what waits, flush, close, end."""
        self._queue.put(None)

    def abandon(self) -> None:
        """The sink does not come back: what waits for it is lost, and so may be what it kept."""
        # With the end of the queue in it, less the outcome in hand; empty while the sink closes.
        self._n_failed += max(1, self._queue.qsize())
        self._failing.happened("did not end in time")

    def run(self) -> None:
        """Thread."""
        assert self._context is not None
        try:
            pin(self._cpus)
            self.sink.open(self._context)
        except Exception as error:  # noqa: BLE001 - reported to whoever waits for ``opened``
            self.error = error
            return
        finally:
            self.opened.set()
        next_flush = time.monotonic_ns() + FLUSH_NS
        while True:
            now = time.monotonic_ns()
            if now >= next_flush:
                self._attempt(self.sink.flush, "flush")
                next_flush = now + FLUSH_NS
            try:
                item = self._queue.get(timeout=max(0, next_flush - now) / 1e9)
            except Empty:
                continue
            if item is None:
                break
            self._write(*item)
        self._attempt(self.sink.flush, "flush")
        self._attempt(self.sink.close, "close")

    def _write(self, outcome: Outcome, queued_ns: int) -> None:
        self._attempt(partial(self.sink.write, outcome), "write")
        self._bytes_out += _weight(outcome)
        self.latency.record(time.monotonic_ns() - queued_ns)
        if self._awaited and self._room():
            self._awaited = False
            self._nudge()
        if self._full.active and self._queue.qsize() <= self._size // 2:
            with self._full_lock:
                self._full.over()

    def _attempt(self, call: Callable[[], None], what: str) -> None:
        """Call the sink; a failure counts what is lost with it, and is over when the same call succeeds."""
        try:
            call()
        except Exception as error:  # noqa: BLE001 - a library behind a sink may raise anything
            self._n_failed += error.lost if isinstance(error, SinkError) else 1
            self._failed_by = what
            self._failing.happened(describe(error))
        else:
            # What keeps outcomes for later takes one more whatever became of those before: its flush says that.
            if self._failed_by == what:
                self._failing.over()


def _weight(outcome: Outcome) -> int:
    return 0 if outcome.frame.pixels is None else outcome.frame.pixels.nbytes
