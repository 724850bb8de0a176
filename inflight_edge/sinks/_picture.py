"""A frame's pixels as a picture that people can look at."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from inflight_edge.colour import check_frame, to_rgb
from inflight_edge.events import Frame

__all__ = ["picture"]


def picture(frame: Frame) -> NDArray[np.uint8]:
    """(H, W) grey, (H, W, 3) RGB or (H, W, 4) RGBA uint8; of other numbers of channels the first one.

    Exact but for NV12, whose conversion is rounded.  Raises DataError for a frame without pixels, or whose pixels do
    not fit its colour.
    """
    pixels = check_frame(frame.pixels, frame.colour)
    if frame.colour.startswith("nv12"):
        return np.rint(to_rgb(pixels, frame.colour)).astype(np.uint8)
    if pixels.ndim == 3 and pixels.shape[2] not in (3, 4):
        pixels = pixels[:, :, 0]
    elif frame.colour == "bgr" and pixels.ndim == 3 and pixels.shape[2] == 3:
        pixels = pixels[:, :, ::-1]
    return np.ascontiguousarray(pixels)
