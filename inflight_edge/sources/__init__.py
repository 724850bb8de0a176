"""Where frames come from: one protocol, one module per kind, imported on demand."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Protocol

from inflight_edge.errors import OptionError
from inflight_edge.events import Frame
from inflight_edge.images import IMAGE_SUFFIXES
from inflight_edge.sources.arrays import ArraySource, CallbackSource
from inflight_edge.uri import Uri

__all__ = ["SOURCE_FORMS", "ArraySource", "CallbackSource", "Source", "make_source"]


class Source(Protocol):
    """Gives one frame after another.  All methods are called by one thread, but ``close`` may come from any.

    name  short, for people and metrics, without secrets (no password of a URL).
    live  True for a camera: frames keep coming whether or not they are read, so that the newest one wins by default,
          and a break is followed by opening again.  False for files: nothing is dropped, the end is the end.
    """

    name: str
    live: bool

    def open(self) -> None:
        """Connect.  Raises SourceError (of a live source: worth another try), OptionError, DependencyError."""

    def read(self) -> Frame | None:
        """The next frame, or None when none will ever follow.  Waits for it, but not for more than a few seconds.

        A frame that arrived damaged is a Frame with a ``problem``.  Raises SourceError when the stream broke off: a
        live source whose server ended or fell silent raises it too, for it may come back.
        """

    def close(self) -> None:
        """Release everything; a ``read`` that waits returns or raises soon.  May be called twice.  Never raises."""


# What an address looks like, for messages; README has the options.
SOURCE_FORMS = (
    "FOLDER", "FILE (image, .npz, video)", "images:PATH", "video:FILE", "rtsp://HOST/PATH", "rtsps://HOST/PATH",
    "/dev/videoN", "v4l2:/dev/videoN", "csi:N", "usb:N", "gst:PIPELINE",
)  # fmt: skip


def make_source(text: str) -> Source:
    """The source of an address; nothing is opened yet.

    Raises OptionError for one that is not understood, or for an option that is not known.
    """
    address = Uri(text, frozenset(_MAKERS))
    maker = _MAKERS.get(address.scheme or _kind(text))
    if maker is None:
        forms = ", ".join(SOURCE_FORMS)
        got = "a file of unknown kind: write images:PATH or video:FILE" if os.path.exists(text) else "none, and no file"
        raise OptionError(f"{address.text}: expected the address of a source, one of: {forms}; got {got}")
    if address.scheme and not address.rest.strip("/"):
        raise OptionError(f"{address.text}: expected something behind {address.scheme}:, got nothing")
    source = maker(address)
    address.finish()
    return source


def _kind(path: str) -> str:
    """Scheme of a plain path, or ""."""
    from inflight_edge.sources.video import VIDEO_SUFFIXES

    if re.fullmatch(r"/dev/(video\d+|v4l/.+)", path):
        return "v4l2"
    if os.path.isdir(path):
        return "images"
    if path.lower().endswith(VIDEO_SUFFIXES):
        return "video"
    return "images" if path.lower().endswith((*IMAGE_SUFFIXES, ".npz")) else ""


def _images(address: Uri) -> Source:
    from inflight_edge.sources.images import from_uri

    return from_uri(address)


def _video(address: Uri) -> Source:
    from inflight_edge.sources.video import from_uri

    return from_uri(address)


def _rtsp(address: Uri) -> Source:
    from inflight_edge.sources.video import rtsp_from_uri

    return rtsp_from_uri(address)


def _v4l2(address: Uri) -> Source:
    from inflight_edge.sources.v4l2 import from_uri

    return from_uri(address)


def _gstreamer(address: Uri) -> Source:
    from inflight_edge.sources.gstreamer import from_uri, preset_from_uri

    return from_uri(address) if address.scheme == "gst" else preset_from_uri(address)


_MAKERS: dict[str, Callable[[Uri], Source]] = {
    "images": _images, "video": _video, "rtsp": _rtsp, "rtsps": _rtsp, "v4l2": _v4l2, "gst": _gstreamer,
    "csi": _gstreamer, "usb": _gstreamer,
}  # fmt: skip
