"""Frame to network input: the one place that resizes and normalises, on the workstation and on the device."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from inflight_edge.colour import Colour, check_frame, nv12_matrix, to_rgb
from inflight_edge.errors import DataError, OptionError

_native: Callable[..., NDArray[np.float32]] | None
try:
    from inflight_edge._preprocess import preprocess as _native
except ImportError:  # built without a C compiler: NumPy does the same, slower
    _native = None

__all__ = ["Preprocess", "resize_bilinear"]

# ITU-R BT.601 luma, what Pillow's convert("L") uses as well.
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)

# No classifier's input is larger; what is would only exhaust the memory.
MAX_INPUT = 1 << 26
# Constants outside are no preprocessing, and would overflow in float32.
_LEAST, _MOST = 1e-37, 1e37


@dataclass(frozen=True, slots=True)
class Preprocess:
    """Constants that turn a frame into the network's input.

    input_shape  (channels, height, width) of the network's input.
    scale        multiplies the pixel value 0..255.
    mean, std    one number for all channels or one per channel, in units of the scaled pixel; std > 0.

    input = (pixel * scale - mean) / std.  Raises OptionError when a constant is out of range.
    """

    input_shape: tuple[int, int, int]
    scale: float = 1.0 / 255.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if len(self.input_shape) != 3 or any(size < 1 for size in self.input_shape):
            raise OptionError(
                f"input shape: expected (channels, height, width), each at least 1, got {self.input_shape}"
            )
        if math.prod(self.input_shape) > MAX_INPUT:
            raise OptionError(f"input shape: expected at most {MAX_INPUT} numbers in all, got {self.input_shape}")
        if not _LEAST <= self.scale <= _MOST:
            raise OptionError(f"scale: expected a number > 0 such as 1/255, got {self.scale}")
        channels = self.input_shape[0]
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, channels):
                raise OptionError(
                    f"{name}: expected one number, or one for each of {channels} channels, got {len(values)}"
                )
            if not all(abs(value) <= _MOST for value in values):
                raise OptionError(f"{name}: expected finite numbers, got {values}")
        if not all(value >= _LEAST for value in self.std):
            raise OptionError(f"std: expected numbers > 0, got {self.std}")

    def pixels(self, frame: NDArray[np.uint8], colour: Colour = "rgb") -> NDArray[np.float32]:
        """Fit a frame to the network's channels and size, still in pixel units.

        frame: (H, W), (H, W, channels) or NV12 uint8, see colour.check_frame.  Grey becomes equal channels; colour
        becomes BT.601 luma for a one-channel network.  Bilinear, half-pixel centres, no antialiasing, not rounded.
        Returns (channels, height, width) float32 in 0..255.  Raises DataError for another dtype or shape, OptionError
        for an unknown colour.
        """
        planes = to_rgb(check_frame(frame, colour), colour)
        channels, height, width = self.input_shape
        if planes.shape[2] != channels:
            if planes.shape[2] == 1:
                planes = np.repeat(planes, channels, axis=2)
            elif planes.shape[2] == 3 and channels == 1:
                planes = (planes @ _LUMA)[:, :, None]
            else:
                raise DataError(
                    f"frame: expected {channels} channels, got shape {frame.shape}; the network has {channels}, and a frame's "
                    "last axis is that of channels"
                )
        return np.ascontiguousarray(resize_bilinear(planes, height, width).transpose(2, 0, 1))

    def normalise(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Pixel units to the network's input.  pixels: (..., channels, height, width) float32 in 0..255."""
        mean = np.asarray(self.mean, dtype=np.float32)[:, None, None]
        std = np.asarray(self.std, dtype=np.float32)[:, None, None]
        result: NDArray[np.float32] = (pixels * np.float32(self.scale) - mean) / std
        return result

    def __call__(self, frame: NDArray[np.uint8], colour: Colour = "rgb") -> NDArray[np.float32]:
        """Frame to network input: (channels, height, width) float32.  See ``pixels`` for the frame and what it raises.

        In C where the extension is there and the network has 1 or 3 channels: within 1e-5 of
        ``normalise(pixels(frame, colour))``, its definition, for pixels scaled to 0..1.
        """
        if _native is None or self.input_shape[0] not in (1, 3):
            return self.normalise(self.pixels(frame, colour))
        image = np.ascontiguousarray(check_frame(frame, colour))
        form = colour.partition("-")[0]
        if image.ndim == 3 and image.shape[2] == 1:
            image = image[:, :, 0]
        if form != "nv12" and image.ndim == 2:
            form = "grey"
        elif form != "nv12" and image.shape[2] != 3:
            return self.normalise(self.pixels(frame, colour))  # says what it expected
        return _native(image, form, *nv12_matrix(colour), self.input_shape, self.scale, self.mean, self.std)


def resize_bilinear(image: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """Resize (H, W, channels) float32 to (height, width, channels): half-pixel centres, edges clamped.

    The convention of torch's interpolate(mode="bilinear", align_corners=False, antialias=False).
    """
    axes = [(0, height), (1, width)]
    if width / image.shape[1] < height / image.shape[0]:
        axes.reverse()  # the one that shrinks more first: between the two the image is not larger than it must be
    for axis, size in axes:
        length = image.shape[axis]
        if length == size:
            continue
        position = np.clip((np.arange(size) + 0.5) * (length / size) - 0.5, 0, length - 1)
        low = np.minimum(position.astype(np.int64), length - 1)
        high = np.minimum(low + 1, length - 1)
        shape = (size, 1, 1) if axis == 0 else (1, size, 1)
        weight = (position - low).astype(np.float32).reshape(shape)
        lower, upper = np.take(image, low, axis=axis), np.take(image, high, axis=axis)
        image = lower + (upper - lower) * weight
    return image
