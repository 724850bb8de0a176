"""Region of interest: the part of a frame that is judged."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from inflight_edge.colour import Colour, check_frame
from inflight_edge.errors import DataError, OptionError

__all__ = ["Region"]


@dataclass(frozen=True, slots=True)
class Region:
    """A rectangle in pixels: left, top, width, height.  Raises OptionError when it is empty or starts below 0."""

    x: int
    y: int
    width: int
    height: int

    def __post_init__(self) -> None:
        if self.x < 0 or self.y < 0 or self.width < 1 or self.height < 1:
            raise OptionError(f"region: expected x, y >= 0 and width, height >= 1, got {self}")

    @classmethod
    def parse(cls, text: str) -> Region:
        """From ``x,y,width,height``.  Raises OptionError."""
        parts = text.split(",")
        if len(parts) != 4 or not all(part.isascii() and part.isdigit() and len(part) < 8 for part in parts):
            raise OptionError(f"region: expected x,y,width,height in pixels such as 0,0,224,224, got {text!r}")
        return cls(*map(int, parts))

    def __str__(self) -> str:
        return f"{self.x},{self.y},{self.width},{self.height}"

    def crop(self, pixels: NDArray[np.uint8], colour: Colour) -> NDArray[np.uint8]:
        """The region of a frame, in the layout of its colour; a view of the frame unless that is NV12.

        Raises DataError for a frame that does not hold the region, or NV12 with an odd edge; OptionError for a colour.
        """
        frame = check_frame(pixels, colour)
        nv12 = colour.startswith("nv12")
        height, width = (frame.shape[0] // 3 * 2 if nv12 else frame.shape[0]), frame.shape[1]
        if self.x + self.width > width or self.y + self.height > height:
            raise DataError(f"frame: expected one that holds the region {self}, got {width}x{height}")
        columns = slice(self.x, self.x + self.width)
        if not nv12:
            return frame[self.y : self.y + self.height, columns]
        if (self.x | self.y | self.width | self.height) & 1:
            raise DataError(f"frame: expected a region of even numbers for NV12, got {self}")
        chroma = height + self.y // 2
        return np.concatenate(
            [frame[self.y : self.y + self.height, columns], frame[chroma : chroma + self.height // 2, columns]]
        )
