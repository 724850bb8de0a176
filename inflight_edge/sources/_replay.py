"""Frames of what has an end: paced, repeated, closed by any thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

from inflight_edge.errors import OptionError
from inflight_edge.events import Frame

__all__ = ["Replay"]

# A reader that is later than this gets the frames from now on, not the missed ones in a burst.
_PATIENCE_S = 1.0


class Replay:
    """Base of the sources that read what is there already.

    start  makes the frames anew; called by open, and again after the last frame where ``loop``.
    fps    at most so many frames a second, on a fixed schedule; None: as fast as they are read.
    loop   begin again after the last frame; a round without a frame is the end.
    """

    def __init__(
        self,
        start: Callable[[], Iterator[Frame]],
        *,
        name: str,
        live: bool = False,
        fps: float | None = None,
        loop: bool = False,
    ) -> None:
        if fps is not None and not 0.0 < fps <= 1e6:
            raise OptionError(f"{name}: fps: expected a number above 0, at most 1e6, got {fps}")
        self.name, self.live = name, live
        self._start, self._interval, self._loop = start, 1.0 / fps if fps else 0.0, loop
        self._frames: Iterator[Frame] | None = None
        self._due = 0.0
        self._closed = threading.Event()
        self._reading = threading.Lock()

    def open(self) -> None:
        """Start from the first frame."""
        self._closed.clear()
        self._frames = self._start()
        self._due = 0.0

    def read(self) -> Frame | None:
        """The next frame when its time has come; None at the end, or once closed."""
        try:
            with self._reading:
                self._wait()
                return None if self._closed.is_set() else self._next()
        finally:
            if self._closed.is_set():
                self._release()

    def _next(self) -> Frame | None:
        if self._frames is None:
            return None
        frame = next(self._frames, None)
        if frame is None and self._loop:
            self._frames = self._start()
            frame = next(self._frames, None)
        return frame

    def _wait(self) -> None:
        if not self._interval:
            return
        now = time.monotonic()
        if now - self._due > _PATIENCE_S:  # at the first frame too
            self._due = now
        elif self._closed.wait(self._due - now):
            return
        self._due += self._interval

    def close(self) -> None:
        """End a read that waits for its time, and release what the frames come from."""
        self._closed.set()
        self._release()

    def _release(self) -> None:
        # A generator that runs cannot be closed: then the read that runs it does so.
        if self._reading.acquire(blocking=False):
            try:
                close = getattr(self._frames, "close", None)
                self._frames = None
                if close is not None:
                    close()
            finally:
                self._reading.release()
