"""Sources and sinks for tests of the pipeline; nothing here is a test."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from bundles import tiny_bundle

from inflight_edge import Detector, Frame, Outcome, SourceError
from inflight_edge.events import Context

FloatArray = np.ndarray[Any, np.dtype[np.float32]]
UNTIL_S = 20.0


class StubEngine:
    """Logits and features are the pixels; ``before`` is called with each batch."""

    name = "stub"

    def __init__(self, before: Callable[[FloatArray], object] = lambda batch: None) -> None:
        self.before = before

    def run(self, batch: FloatArray) -> tuple[FloatArray, FloatArray]:
        self.before(batch)
        flat = batch.reshape(len(batch), -1)
        return flat, flat.copy()


def stub_detector(before: Callable[[FloatArray], object] = lambda batch: None, **changes: Any) -> Detector:
    """The tiny bundle's detector without ONNX Runtime."""
    return Detector(tiny_bundle(**changes), engine=StubEngine(before))


class ListSource:
    """Gives frames of a list, or what a generator makes; an exception among them is raised."""

    def __init__(
        self, items: Iterable[Any], *, name: str = "list", live: bool = False, pace_s: float = 0.0, hold: bool = False
    ) -> None:
        """pace_s: at least so long between frames.  hold: after the last one wait to be closed."""
        self.name, self.live = name, live
        self._items: Iterator[Any] = iter(items)
        self._pace_s, self._hold = pace_s, hold
        self._next_s = 0.0
        self.closed = threading.Event()
        self.n_opened = 0

    def open(self) -> None:
        self.n_opened += 1

    def read(self) -> Frame | None:
        if self._pace_s:
            now = time.monotonic()
            self._next_s = max(self._next_s, now - 1.0) + self._pace_s if self._next_s else now
            if self._next_s > now:
                self.closed.wait(self._next_s - now)
        for item in self._items:
            if isinstance(item, Exception):
                raise item
            return item if isinstance(item, Frame) else Frame(item, time.monotonic_ns())
        if self._hold:
            self.closed.wait(UNTIL_S)
            raise SourceError("closed")
        return None

    def close(self) -> None:
        self.closed.set()


class ListSink:
    """Keeps everything; ``before`` is called with each outcome and may wait or raise."""

    def __init__(self, *, name: str = "kept", before: Callable[[Outcome], object] = lambda outcome: None) -> None:
        self.name = name
        self.before = before
        self.outcomes: list[Outcome] = []
        self.context: Context | None = None
        self.calls: list[str] = []
        self.threads: set[int] = set()

    def open(self, context: Context) -> None:
        self._note("open")
        self.context = context

    def write(self, outcome: Outcome) -> None:
        self.threads.add(threading.get_ident())
        self.before(outcome)
        self.outcomes.append(outcome)

    def flush(self) -> None:
        self._note("flush")

    def close(self) -> None:
        self._note("close")

    def _note(self, call: str) -> None:
        self.threads.add(threading.get_ident())
        self.calls.append(call)

    def indices(self, camera: str | None = None) -> list[int]:
        return [o.frame.index for o in self.outcomes if camera in (None, o.frame.camera)]

    def decisions(self) -> list[str]:
        return ["" if o.verdict is None else o.verdict.decision.value for o in self.outcomes]


def until(condition: Callable[[], object], what: str = "condition") -> None:
    """Wait for it; fails after UNTIL_S."""
    end = time.monotonic() + UNTIL_S
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {UNTIL_S} s"
        time.sleep(0.002)


def exactly_one_outcome_each(outcomes: Iterable[Outcome], captured: dict[str, int]) -> None:
    """Every index of every camera, once."""
    found: dict[str, list[int]] = {camera: [] for camera in captured}
    for outcome in outcomes:
        found[outcome.frame.camera].append(outcome.frame.index)
    assert {camera: sorted(indices) for camera, indices in found.items()} == {
        camera: list(range(n)) for camera, n in captured.items()
    }
