"""What the GStreamer source and the element share: the bindings, and a buffer's pixels as a frame.

The element itself is ``python/inflightdetect.py`` below PLUGIN_PATH, where GStreamer looks for it.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inflight_edge._optional import require
from inflight_edge.colour import Colour
from inflight_edge.detector import Detector
from inflight_edge.errors import DataError, DependencyError, InflightError
from inflight_edge.events import Frame
from inflight_edge.verdict import Decision, Verdict

__all__ = [
    "CAPS",
    "MESSAGE",
    "META",
    "PLUGIN_PATH",
    "Layout",
    "attach",
    "judge",
    "load",
    "register",
    "verdict_fields",
    "verdict_of",
]

PLUGIN_PATH = os.path.dirname(os.path.abspath(__file__))
CAPS = "video/x-raw,format={RGB,BGR,GRAY8,NV12}"
# Name of the element's message on the bus, and of the metadata (GstCustomMeta) on a buffer: the same fields in both.
MESSAGE = "inflight-verdict"
META = "InflightVerdictMeta"

_CHANNELS = {"RGB": 3, "BGR": 3, "GRAY8": 1, "NV12": 1}
_REMEDY = (
    "apt install python3-gi python3-gst-1.0 gir1.2-gst-plugins-base-1.0 gstreamer1.0-plugins-good, and make the "
    "environment with `python3 -m venv --system-site-packages` so that it sees them"
)
# Grey of limited range, as cameras send it, to 0..255.
_FULL_RANGE = np.clip(np.rint((np.arange(256) - 16) * (255 / 219)), 0, 255).astype(np.uint8)


@functools.cache
def load() -> tuple[Any, Any]:
    """(Gst, GstVideo) of GStreamer 1.20 or newer, initialised.  Raises DependencyError."""
    gi = require("gi", _REMEDY)
    try:
        for name in ("Gst", "GstApp", "GstBase", "GstVideo"):
            gi.require_version(name, "1.0")
    except ValueError as error:
        raise DependencyError(f"GStreamer: {error}; {_REMEDY}") from error
    gst = require("gi.repository.Gst", _REMEDY)
    require("gi.repository.GstApp", _REMEDY)  # gives an appsink its methods
    require("gi.overrides._gi_gst", _REMEDY)  # of python3-gst-1.0: without it a buffer is copied byte by byte
    gst.init(None)
    return gst, require("gi.repository.GstVideo", _REMEDY)


def register() -> None:
    """Make the element known to this process alone, which then needs no GST_PLUGIN_PATH.  Raises DependencyError."""
    gst, _ = load()
    if gst.ElementFactory.find("inflightdetect") is None:
        path = os.path.join(PLUGIN_PATH, "python", "inflightdetect.py")
        spec = importlib.util.spec_from_file_location("inflightdetect", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        gst.Element.register(None, "inflightdetect", gst.Rank.NONE, module.InflightDetect)


@dataclass(frozen=True, slots=True)
class Layout:
    """How the bytes of a buffer lie, from its caps.

    colour  of the frame.   limited  grey of 16..235 that is stretched to 0..255.
    stride, offset  bytes, of each plane, where the buffer does not say otherwise.
    """

    format: str
    width: int
    height: int
    colour: Colour
    limited: bool
    stride: tuple[int, ...]
    offset: tuple[int, ...]

    @classmethod
    def of(cls, caps: Any) -> Layout:
        """Layout of fixed caps.  Raises DataError for a format, matrix or size that no frame has."""
        _, video = load()
        info = video.VideoInfo.new_from_caps(caps)
        name = info.finfo.name if info is not None else ""
        if name not in _CHANNELS:
            raise DataError(f"caps: expected {CAPS}, got {caps.to_string()}; put `videoconvert` before")
        size = f"{info.width}x{info.height}"
        full = info.colorimetry.range.value_nick != "16-235"
        colour: Colour = "bgr" if name == "BGR" else "rgb"
        if name == "NV12":
            if info.width % 2 or info.height % 2:
                raise DataError(f"caps: expected an even width and height with NV12, got {size}; convert it to RGB")
            matrices: dict[Any, tuple[Colour, Colour]] = {
                video.VideoColorMatrix.BT601: ("nv12-bt601", "nv12-bt601-full"),
                video.VideoColorMatrix.BT709: ("nv12-bt709", "nv12-bt709-full"),
            }
            if info.colorimetry.matrix not in matrices:
                got = info.colorimetry.to_string()
                raise DataError(f"caps: expected BT.601 or BT.709 with NV12, got {got}; convert it to RGB")
            colour = matrices[info.colorimetry.matrix][full]
        planes = 2 if name == "NV12" else 1
        return cls(
            name,
            info.width,
            info.height,
            colour,
            name == "GRAY8" and not full,
            tuple(info.stride[:planes]),
            tuple(info.offset[:planes]),
        )

    def frame(self, buffer: Any) -> Frame:
        """The buffer's pixels, copied, stamped now.  A buffer that is damaged or too small is a frame with a problem."""
        gst, video = load()
        now = time.monotonic_ns()
        flags = buffer.get_flags()
        if flags & (gst.BufferFlags.CORRUPTED | gst.BufferFlags.GAP):
            return Frame(None, now, self.colour, problem="buffer is marked as corrupt or as a gap")
        stride, offset = self.stride, self.offset
        if (meta := video.buffer_get_video_meta(buffer)) is not None:
            stride, offset = tuple(meta.stride[: len(stride)]), tuple(meta.offset[: len(offset)])
        try:
            with buffer.map(gst.MapFlags.READ) as mapped:
                pixels = self._pixels(np.frombuffer(mapped.data, np.uint8), stride, offset)
        except (ValueError, gst.MapError) as error:
            text = " ".join(str(error).split())
            return Frame(None, now, self.colour, problem=f"buffer holds no {self.width}x{self.height} image: {text}")
        return Frame(_FULL_RANGE[pixels] if self.limited else pixels, now, self.colour)

    def _pixels(self, data: NDArray[np.uint8], stride: tuple[int, ...], offset: tuple[int, ...]) -> NDArray[np.uint8]:
        """One copy out of the buffer, without the padding of its rows.  Raises ValueError when it is too small."""
        row = self.width * _CHANNELS[self.format]
        rows = [self.height, self.height // 2][: len(stride)]
        image = np.empty((sum(rows), row), np.uint8)
        top = 0
        for n, step, start in zip(rows, stride, offset, strict=True):
            end = start + step * (n - 1) + row
            if step < row or start < 0 or end > data.size:
                raise ValueError(f"expected {max(end, 0)} bytes, got {data.size}")
            plane = np.lib.stride_tricks.as_strided(data[start:end], (n, row), (step, 1), writeable=False)
            image[top : top + n] = plane
            top += n
        return image.reshape(self.height, self.width, 3) if self.format in ("RGB", "BGR") else image


def judge(detector: Detector, frame: Frame) -> Verdict:
    """Verdict on one frame, in its colour; INVALID for one with a problem, and when anything fails."""
    if frame.pixels is None:
        return Verdict(Decision.INVALID, reason=frame.problem)
    try:
        logits, features = detector.engine.run(detector.bundle.preprocess(frame.pixels, frame.colour)[None])
        return detector.score(features[0], logits[0])
    except Exception as error:  # noqa: BLE001 - whatever an engine raises, the frame must not pass
        text = " ".join(str(error).split())
        known = isinstance(error, InflightError)
        return Verdict(Decision.INVALID, reason=text if known else f"{type(error).__name__}: {text}")


def verdict_fields(verdict: Verdict, class_names: Sequence[str]) -> dict[str, Any]:
    """A verdict as the fields of a GstStructure: text, integers, floats and booleans; what there is none of is left out."""
    fields: dict[str, Any] = {"decision": verdict.decision.value, "passes": verdict.passes}
    for key, index in (("predicted", verdict.predicted), ("source", verdict.source)):
        if index is not None:
            fields |= {key: index, f"{key}-name": class_names[index]}
    if math.isfinite(verdict.margin):
        fields["margin"] = verdict.margin
    if verdict.reason:
        fields["reason"] = verdict.reason
    return fields


def verdict_of(buffer: Any) -> dict[str, Any] | None:
    """Fields that ``inflightdetect`` put on a buffer; None on one that it did not judge.

    decision, passes, frame, pts; where there are such: predicted, predicted-name, source, source-name, margin, reason.
    """
    _metadata()
    meta = buffer.get_custom_meta(META)
    if meta is None:
        return None
    structure = meta.get_structure()
    names = [structure.nth_field_name(i) for i in range(structure.n_fields())]
    return {name: structure.get_value(name) for name in names}


def attach(buffer: Any, fields: Mapping[str, Any]) -> None:
    """Put a verdict's fields, each a GObject.Value, on a buffer.  Raises RuntimeError when it does not hold them then."""
    library = _metadata()
    if buffer.get_custom_meta(META) is not None:
        raise RuntimeError("the buffer carries one already: use one inflightdetect in a row")
    meta = buffer.add_custom_meta(META)
    if meta is None:
        raise RuntimeError("the buffer is not writable")
    # The bindings give a copy of the structure, which cannot be filled in.  The hash of a binding is its C address.
    structure = library.gst_custom_meta_get_structure(hash(meta))
    for name, value in fields.items():
        library.gst_structure_set_value(structure, name.encode(), hash(value))
    if verdict_of(buffer) != {name: value.get_value() for name, value in fields.items()}:
        raise RuntimeError("the metadata does not hold it")


@functools.cache
def _metadata() -> ctypes.CDLL:
    """GStreamer's library, once the metadata is registered."""
    gst, _ = load()
    if gst.Meta.get_info(META) is None:
        gst.Meta.register_custom(META, [], None, None, None)
    library = ctypes.CDLL("libgstreamer-1.0.so.0")
    library.gst_custom_meta_get_structure.argtypes = [ctypes.c_void_p]
    library.gst_custom_meta_get_structure.restype = ctypes.c_void_p
    library.gst_structure_set_value.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    library.gst_structure_set_value.restype = None
    return library
