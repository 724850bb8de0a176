"""Frame to network input on an NVIDIA GPU, in one launch on the stream that the engine and the scorer use.

Checked without a GPU: the kernel on the CPU, this module through a double of the driver.  It has not run on a device.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from inflight_edge._optional import require
from inflight_edge.colour import Colour, check_frame, nv12_matrix
from inflight_edge.errors import DataError, OptionError, ScoreError
from inflight_edge.preprocess import Preprocess
from inflight_edge.scoring.device import Device

__all__ = ["CudaPreprocess"]

# The structs of csrc/inflight.h; pointers are device addresses.  A test compares sizes and offsets with C's.
IMAGE = np.dtype(
    [(name, "i4") for name in ("pixels", "height", "width", "bt709", "full_range")]
    + [(name, "u8") for name in ("stride", "samples", "chroma")],
    align=True,
)
INPUT = np.dtype(
    [(name, "i4") for name in ("channels", "height", "width")]
    + [("scale", "f4"), ("mean", "f4", (3,)), ("deviation", "f4", (3,))],
    align=True,
)
_PIXELS = ("grey", "rgb", "bgr", "nv12")
_REMEDY = "install inflight-edge again where nvcc is on the PATH, or preprocess on the CPU"


class CudaPreprocess:
    """Preprocess for frames in device memory, or in host memory mapped into the device: enqueued, not waited for.

    preprocess   the constants; the network has 1 or 3 channels.
    frame_shape  of every frame: (H, W), (H, W, 1) or (H, W, 3); NV12: (H * 3 / 2, W), see colour.check_frame.
    colour       what a frame's bytes mean.
    device       its stream is used.  Its owner closes it.
    stride       bytes from one row to the next, of either plane; None: rows follow each other without a gap.

    Any thread may call it, one at a time.  Raises OptionError for an unknown colour or a stride too short, DataError
    for a shape that does not fit, DependencyError without the binding.
    """

    def __init__(
        self,
        preprocess: Preprocess,
        frame_shape: tuple[int, ...],
        colour: Colour = "rgb",
        *,
        device: Device,
        stride: int | None = None,
    ) -> None:
        channels = preprocess.input_shape[0]
        frame = check_frame(np.broadcast_to(np.uint8(0), frame_shape), colour)  # takes no memory
        form = colour.partition("-")[0]
        if form != "nv12":
            form = "grey" if frame.ndim == 2 or frame.shape[2] == 1 else form
            if form != "grey" and frame.shape[2] != 3:
                raise DataError(f"frame: expected 1 or 3 channels, got shape {frame_shape}; convert it before")
        if channels not in (1, 3):
            raise OptionError(f"input shape: expected 1 or 3 channels on a GPU, got {channels}; preprocess on the CPU")
        height, width = frame.shape[0] // 3 * 2 if form == "nv12" else frame.shape[0], frame.shape[1]
        packed = width * (3 if form in ("rgb", "bgr") else 1)
        if stride is not None and stride < packed:
            raise OptionError(f"stride: expected at least the {packed} bytes of a row, got {stride}")
        self.device = device
        self._binding: Any = require("inflight_edge.scoring._cuda", _REMEDY)
        image, wanted = np.zeros((), IMAGE), np.zeros((), INPUT)
        image["pixels"], image["height"], image["width"] = _PIXELS.index(form), height, width
        image["bt709"], image["full_range"] = nv12_matrix(colour)
        image["stride"] = packed if stride is None else stride
        wanted["channels"], wanted["height"], wanted["width"] = preprocess.input_shape
        wanted["scale"] = preprocess.scale
        wanted["mean"][:channels], wanted["deviation"][:channels] = preprocess.mean, preprocess.std
        self._image, self._input = image, wanted
        self._has_chroma = form == "nv12"

    def enqueue(self, frame: int, tensor: int, chroma: int | None = None) -> None:
        """Enqueue one frame's preprocessing; returns at once.  May be captured into a graph, addresses as they are.

        frame: address of its first byte.  tensor: of (channels, height, width) float32.  chroma: of NV12's first row of
        U and V, where the planes lie apart; None: it follows the last row of luma.
        Raises ScoreError when the launch fails.
        """
        if chroma is None:
            chroma = frame + int(self._image["height"]) * int(self._image["stride"])
        self._image["samples"] = frame
        self._image["chroma"] = chroma if self._has_chroma else 0
        image, wanted = int(self._image.ctypes.data), int(self._input.ctypes.data)
        with self.device.current():
            status = self._binding.preprocess(image, wanted, tensor, self.device.stream)
        if status:
            text = self._binding.error_text(status)
            raise ScoreError(f"preprocess: expected success, got CUDA error {status}: {text}; run doctor")
