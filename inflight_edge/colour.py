"""Colour of a frame's bytes: what each layout means, and its conversion to RGB."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from inflight_edge.errors import DataError, OptionError

__all__ = ["COLOURS", "Colour", "check_frame", "nv12_matrix", "to_rgb"]

# nv12: matrix of ITU-R BT.601 or BT.709; limited range (luma 16..235, chroma 16..240) unless "full" (0..255).
Colour = Literal["rgb", "bgr", "nv12-bt601", "nv12-bt601-full", "nv12-bt709", "nv12-bt709-full"]
COLOURS: tuple[Colour, ...] = get_args(Colour)

# No camera's frame has more values; what has would only exhaust the memory.
MAX_FRAME = 1 << 28

# Weights of red and blue in luma: BT.601-7 and BT.709-6, section 3.
_LUMA_WEIGHTS = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722)}


def check_frame(frame: object, colour: Colour) -> NDArray[np.uint8]:
    """The frame itself, once it is a non-empty uint8 array of the axes its colour asks for.

    rgb, bgr: (H, W) grey or (H, W, channels).  nv12: (H * 3 / 2, W), H and W even: luma, then interleaved U and V.
    Raises OptionError for an unknown colour, DataError for a frame that does not fit.
    """
    if colour not in COLOURS:
        raise OptionError(f"colour: expected one of {', '.join(COLOURS)}, got {colour!r}")
    if isinstance(frame, np.ndarray):
        frame = np.asarray(frame)  # sub-classes such as numpy.matrix index in other ways
    if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8:
        kind = frame.dtype if isinstance(frame, np.ndarray) else type(frame).__name__
        raise DataError(f"frame: expected a uint8 array, got {kind}; convert it to 8-bit pixels 0..255")
    if colour.startswith("nv12"):
        if frame.ndim != 2 or 0 in frame.shape or frame.shape[0] % 3 or frame.shape[1] % 2:
            raise DataError(f"frame: expected NV12 of shape (H * 3 / 2, W), H and W even, got {frame.shape}")
    elif frame.ndim not in (2, 3) or 0 in frame.shape:
        raise DataError(f"frame: expected shape (H, W) or (H, W, channels), got {frame.shape}")
    if frame.size > MAX_FRAME:
        raise DataError(f"frame: expected at most {MAX_FRAME} values, got shape {frame.shape}; shrink it before")
    return frame


def nv12_matrix(colour: Colour) -> tuple[bool, bool]:
    """(BT.709, full range) of an nv12 colour."""
    return "bt709" in colour, colour.endswith("full")


def to_rgb(frame: NDArray[np.uint8], colour: Colour) -> NDArray[np.float32]:
    """Checked frame as (H, W, channels) float32 pixels 0..255, not rounded; grey keeps its one channel.

    NV12: each 2 x 2 block shares its chroma; R, G and B are clamped to 0..255.
    """
    if not colour.startswith("nv12"):
        image = frame[:, :, None] if frame.ndim == 2 else frame
        if colour == "bgr" and image.shape[2] == 3:
            image = image[:, :, ::-1]
        return image.astype(np.float32)
    bt709, full = nv12_matrix(colour)
    red, blue = _LUMA_WEIGHTS["bt709" if bt709 else "bt601"]
    green = 1.0 - red - blue
    height = frame.shape[0] // 3 * 2
    luma = frame[:height].astype(np.float64)
    chroma = frame[height:].astype(np.float64).reshape(height // 2, -1, 2) - 128.0
    if not full:
        luma, chroma = (luma - 16.0) * (255.0 / 219.0), chroma * (255.0 / 224.0)
    u, v = (chroma[:, :, i].repeat(2, axis=0).repeat(2, axis=1) for i in (0, 1))
    r = luma + 2.0 * (1.0 - red) * v
    g = luma - 2.0 * blue * (1.0 - blue) / green * u - 2.0 * red * (1.0 - red) / green * v
    b = luma + 2.0 * (1.0 - blue) * u
    return np.clip(np.stack([r, g, b], axis=2), 0.0, 255.0).astype(np.float32)
