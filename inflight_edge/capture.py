"""Capture: one thread per source opens, reads and hands on, and opens a live source again when it broke off."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable

from inflight_edge.affinity import pin
from inflight_edge.errors import DependencyError, InflightError, OptionError, SourceError
from inflight_edge.events import Frame
from inflight_edge.sources import Source

__all__ = ["Backoff", "Capture", "describe"]

log = logging.getLogger(__name__)

# A connection that gives frames for so long is a good one.
PROVEN_NS = 10_000_000_000


class Backoff:
    """Waiting times in seconds: doubled from ``first`` to ``most``, each shortened by chance by up to a half.

    Chance keeps many devices from calling at a server at once when it comes back.
    """

    def __init__(self, first: float = 0.5, most: float = 30.0) -> None:
        self._first, self._most = first, most
        self._next = first

    def wait(self) -> float:
        """The next waiting time."""
        time, self._next = self._next, min(2.0 * self._next, self._most)
        return time * random.uniform(0.5, 1.0)

    def reset(self) -> None:
        """It works: start again from the first."""
        self._next = self._first


class Capture(threading.Thread):
    """Reads a source to its end.

    camera      the source's name in this pipeline.
    deliver     takes each frame, with camera and index; may wait.
    reconnects  counts how often a live source gave frames again after a break.
    failed      takes an error that ends this source; True when all is to stop: waiting will not mend it.
    ended       called last.
    """

    def __init__(
        self,
        source: Source,
        camera: str,
        *,
        stopping: threading.Event,
        deliver: Callable[[Frame], None],
        reconnects: Counter[str],
        failed: Callable[[Exception, bool], None],
        ended: Callable[[], None],
        backoff: Backoff,
        cpus: frozenset[int] = frozenset(),
    ) -> None:
        super().__init__(name=f"capture {camera}", daemon=True)
        self.source = source
        self.camera = camera
        self._stopping = stopping
        self._deliver, self._failed, self._ended = deliver, failed, ended
        self._reconnects = reconnects
        self._backoff = backoff
        self._cpus = cpus
        self._index = 0
        self._broken = False
        self._opened_ns = 0

    def run(self) -> None:
        """Thread: until the end of the stream, an error that waiting does not mend, or the stop."""
        try:
            pin(self._cpus)
            while not self._stopping.is_set() and not self._run_once():
                self._stopping.wait(self._backoff.wait())
        except Exception as error:  # noqa: BLE001 - reported, and ends the run
            self._failed(error, True)
        finally:
            self._ended()

    def _run_once(self) -> bool:
        """One connection; True when none is to follow."""
        try:
            self.source.open()
            self._opened_ns = time.monotonic_ns()
            while not self._stopping.is_set():
                frame = self.source.read()
                if frame is None:
                    if self._stopping.is_set():
                        return True  # the source was closed: that says nothing about its end
                    log.info("camera %s: end of the stream", self.camera, extra={"camera": self.camera})
                    return True
                self._hand_on(frame)
            return True
        except (OptionError, DependencyError) as error:
            self._failed(error, True)
            return True
        except Exception as error:  # noqa: BLE001 - a library behind a source may raise anything
            if self._stopping.is_set():
                return True  # the source was closed under a read
            if isinstance(error, SourceError) and error.final:
                self._failed(error, True)
                return True
            if not self.source.live:
                self._failed(error, False)
                return True
            self._broken = True
            log.warning("camera %s: %s", self.camera, describe(error), extra={"camera": self.camera})
            return False
        finally:
            self.source.close()

    def _hand_on(self, frame: Frame) -> None:
        # One that breaks off after a few frames, again and again, is not called at ever faster.
        if time.monotonic_ns() - self._opened_ns >= PROVEN_NS:
            self._backoff.reset()
        if self._broken:
            self._broken = False
            self._reconnects[self.camera] += 1
            log.info("camera %s: frames again", self.camera, extra={"camera": self.camera})
        index, self._index = self._index, self._index + 1
        self._deliver(
            Frame(
                frame.pixels,
                frame.captured_ns,
                frame.colour,
                frame.name,
                frame.problem,
                camera=self.camera,
                index=index,
            )
        )


def describe(error: Exception) -> str:
    """One line; with the type where the error is none of this package's."""
    text = " ".join(str(error).split())[:500]
    return text if isinstance(error, InflightError) else f"{type(error).__name__}: {text}"
