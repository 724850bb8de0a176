"""Frames between capture and inference: bounded per camera, with a named policy for what comes too fast."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import Literal, get_args

from inflight_edge.errors import OptionError
from inflight_edge.events import Frame

__all__ = ["POLICIES", "FrameQueue", "Keep"]

# newest: the oldest waiting frame makes place.  oldest: the arriving frame is dropped.  all: the source waits.
Keep = Literal["newest", "oldest", "all"]
POLICIES: tuple[Keep, ...] = get_args(Keep)


class FrameQueue:
    """At most ``size`` frames wait per camera; cameras are served in turn.

    keep  policy by camera.  Frames of a camera that keeps ``all`` are taken only while ``room()`` says that what
          follows has place for their outcomes: so a slow sink holds back a file, and never another camera.
    """

    def __init__(self, keep: Mapping[str, Keep], size: int, room: Callable[[], bool]) -> None:
        if size < 1:
            raise OptionError(f"queue: expected at least 1 frame, got {size}")
        if unknown := [policy for policy in keep.values() if policy not in POLICIES]:
            raise OptionError(f"keep: expected one of {', '.join(POLICIES)}, got {unknown[0]!r}")
        self._keep = dict(keep)
        self._size = size
        self._room = room
        self._waiting: dict[str, deque[Frame]] = {camera: deque() for camera in keep}
        self._turn = deque(keep)
        self._lock = threading.Lock()
        self._filled = threading.Condition(self._lock)
        self._freed = threading.Condition(self._lock)
        self._unbounded = self.closed = False

    def put(self, frame: Frame) -> Frame | None:
        """Add a frame of its camera; returns the one that was dropped for it, which may be the frame itself.

        A closed queue takes no frame.
        """
        waiting, keep = self._waiting[frame.camera], self._keep[frame.camera]
        with self._lock:
            while keep == "all" and len(waiting) >= self._size and not self._unbounded:
                self._freed.wait()
            if self.closed:
                return frame
            dropped = None
            if keep != "all" and len(waiting) >= self._size:
                if keep == "oldest":
                    return frame
                dropped = waiting.popleft()
            waiting.append(frame)
            self._filled.notify()
        return dropped

    def take(self, most: int) -> list[Frame]:
        """Up to ``most`` frames, one of each camera in turn; waits for the first.  Empty: closed, and none is left."""
        with self._lock:
            while True:
                patient = self._room()
                taken: list[Frame] = []
                while len(taken) < most and (frame := self._next(patient)):
                    taken.append(frame)
                if taken or (self.closed and not len(self)):
                    return taken
                self._filled.wait()

    def _next(self, patient: bool) -> Frame | None:
        for _ in range(len(self._turn)):
            camera = self._turn[0]
            self._turn.rotate(-1)
            waiting = self._waiting[camera]
            if waiting and (patient or self._keep[camera] != "all"):
                if self._keep[camera] == "all":
                    self._freed.notify_all()
                return waiting.popleft()
        return None

    def nudge(self) -> None:
        """There is room again."""
        with self._lock:
            self._filled.notify()

    def release(self) -> None:
        """Let sources that wait put their frame, beyond the size if need be: they are to end."""
        with self._lock:
            self._unbounded = True
            self._freed.notify_all()

    def close(self) -> None:
        """No frame follows; ``take`` gives those that wait."""
        with self._lock:
            self.closed = True
            self._filled.notify_all()

    def clear(self) -> list[Frame]:
        """Remove and return all frames that wait."""
        with self._lock:
            frames = [frame for waiting in self._waiting.values() for frame in waiting]
            for waiting in self._waiting.values():
                waiting.clear()
            self._filled.notify_all()
        return frames

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))
