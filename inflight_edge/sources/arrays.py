"""Frames from Python: arrays that are there, or a function that is asked for each."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from inflight_edge.colour import COLOURS, Colour, check_frame
from inflight_edge.errors import DataError, OptionError, SourceError
from inflight_edge.events import Frame
from inflight_edge.sources._replay import Replay

__all__ = ["ArraySource", "CallbackSource"]


class ArraySource(Replay):
    """The arrays of a sequence, or of anything that can be iterated over.

    frames  uint8, of the shapes that ``colour`` takes, see colour.check_frame; what is none is a frame with a problem.
            They are handed on as they are, not copied.
    live    True where frames may be dropped when there is no time for them.
    fps     at most so many frames a second.       loop  begin again after the last one.
    """

    def __init__(
        self,
        frames: Iterable[NDArray[np.uint8]],
        *,
        live: bool = False,
        fps: float | None = None,
        loop: bool = False,
        colour: Colour = "rgb",
        name: str = "arrays",
    ) -> None:
        _check_colour(colour, name)

        def start() -> Iterator[Frame]:
            return (_frame(array, colour) for array in frames)

        super().__init__(start, name=name, live=live, fps=fps, loop=loop)


class CallbackSource:
    """Asks a function for every frame.

    function  called without arguments by the thread that reads; returns a uint8 array, a Frame (which may carry a
              problem), or None at the end.  An exception is a SourceError: the stream broke off.
    live      True where frames may be dropped when there is no time for them.
    stop      called by ``close``, from any thread: makes a function that waits return.
    """

    def __init__(
        self,
        function: Callable[[], NDArray[np.uint8] | Frame | None],
        *,
        live: bool = True,
        stop: Callable[[], object] | None = None,
        colour: Colour = "rgb",
        name: str = "callback",
    ) -> None:
        _check_colour(colour, name)
        self.name, self.live = name, live
        self._function, self._stop, self._colour = function, stop, colour
        self._closed = True

    def open(self) -> None:
        """Ready to be read, also again after ``close``."""
        self._closed = False

    def read(self) -> Frame | None:
        """What the function returns.  Raises SourceError."""
        if self._closed:
            return None
        try:
            given = self._function()
        except Exception as error:
            text = " ".join(str(error).split())
            raise SourceError(f"{self.name}: the function raised {type(error).__name__}: {text}") from error
        if given is None or self._closed:
            return None
        return given if isinstance(given, Frame) else _frame(given, self._colour)

    def close(self) -> None:
        """No frame comes after this; calls ``stop``, whose failure is logged."""
        was_open, self._closed = not self._closed, True
        if was_open and self._stop is not None:
            try:
                self._stop()
            except Exception:
                logging.getLogger(__name__).exception("%s: stop failed", self.name)


def _check_colour(colour: Colour, name: str) -> None:
    if colour not in COLOURS:
        raise OptionError(f"{name}: colour: expected one of {', '.join(COLOURS)}, got {colour!r}")


def _frame(array: object, colour: Colour) -> Frame:
    now = time.monotonic_ns()
    try:
        return Frame(check_frame(array, colour), now, colour)
    except DataError as error:
        return Frame(None, now, colour, problem=str(error))
