"""Any GStreamer pipeline that ends in an appsink, and presets for cameras."""

from __future__ import annotations

import re
import threading
import time
from typing import Any

from inflight_edge.errors import DataError, OptionError, SourceError
from inflight_edge.events import Frame
from inflight_edge.gstreamer import CAPS, Layout, load
from inflight_edge.uri import Uri, one_of, real_number, whole_number, without_secrets

__all__ = ["GStreamerSource", "csi_pipeline", "from_uri", "preset_from_uri", "usb_pipeline"]

# How often a read that waits looks for errors and for a close: a frame itself is handed over at once.
_POLL_S = 0.05
# Buffers that wait in an appsink that drops nothing; then the pipeline waits.
_WAITING = 4


class GStreamerSource:
    """Frames of a pipeline as gst-launch-1.0 takes it.

    pipeline   ends in ``appsink``, or in a source of raw video, behind which ``videoconvert ! appsink`` is put.  An
               appsink without caps gets RGB, BGR, GRAY8 or NV12; one without a limit of buffers keeps the newest one
               where live, else holds the pipeline back.
    live       None: expected to be live, and an error when it is not, because a pipeline that reads a file would lose
               the frames that there is no time for.
    timeout_s  to start, and to wait for a frame, each.
    Frames are stamped when they leave the appsink.  The end of a live pipeline is a SourceError: a camera has none.
    """

    def __init__(self, pipeline: str, *, live: bool | None = None, timeout_s: float = 10.0, name: str = "gst") -> None:
        if not pipeline.strip():
            raise OptionError("gst: expected a pipeline, got none; write gst:ELEMENT ! ... ! appsink")
        if not 0.0 < timeout_s <= 3600.0:
            raise OptionError(f"timeout: expected seconds above 0, at most 3600, got {timeout_s}")
        self.name, self.live = name, live is not False
        self._text = pipeline if re.search(r"\bappsink\b", pipeline) else f"{pipeline} ! videoconvert ! appsink"
        self._declared, self._timeout_s = live, timeout_s
        self._pipeline: Any = None
        self._sink: Any = None
        self._caps: Any = None
        self._layout: Layout | DataError | None = None
        self._failure: SourceError | None = None
        self._closed = False
        self._changing = threading.Lock()

    def open(self) -> None:
        """Build the pipeline and start it.  Raises OptionError, SourceError, DependencyError."""
        gst, _ = load()
        self.close()
        with self._changing:
            self._closed = False
            self._pipeline, self._sink = pipeline, _ = self._build(gst)
            self._caps = self._layout = self._failure = None
        try:
            self._start(gst, pipeline)
        except BaseException:
            self.close()
            raise

    def _start(self, gst: Any, pipeline: Any) -> None:
        """Pause it, which tells live from not, then let it run.  Raises SourceError, OptionError."""
        change = gst.StateChangeReturn
        deadline = time.monotonic() + self._timeout_s
        reached = pipeline.set_state(gst.State.PAUSED)
        while reached == change.ASYNC and not self._closed:
            reached, _, _ = pipeline.get_state(int(_POLL_S * gst.SECOND))
            if reached == change.ASYNC:
                if (error := self._error(gst)) is not None:
                    raise error
                if time.monotonic() > deadline:
                    raise SourceError(f"{self.name}: the pipeline did not start within {self._timeout_s:g} s")
        # An error from here on waits for its turn behind the frames that came before it.
        if not self._closed and reached != change.FAILURE:
            if self._declared is None and reached != change.NO_PREROLL:
                raise OptionError(
                    f"{self.name}: the pipeline is not live: it waits for its reader; say #live=0 to judge every frame, "
                    "or #live=1 to drop those for which there is no time"
                )
            reached = pipeline.set_state(gst.State.PLAYING)
        if self._closed or reached == change.FAILURE:
            text = "closed while it was opened" if self._closed else "the pipeline cannot start"
            raise self._error(gst) or SourceError(f"{self.name}: {text}")

    def _build(self, gst: Any) -> tuple[Any, Any]:
        try:
            pipeline = gst.parse_launch(self._text)
        except Exception as error:  # GLib.Error, known only once gi is loaded
            if type(error).__name__ != "Error":
                raise
            raise OptionError(f"{self.name}: not a pipeline: {_line(getattr(error, 'message', error))}") from None
        if not isinstance(pipeline, gst.Bin):
            raise OptionError(f"{self.name}: expected a source of video before the appsink, got one element")
        sinks = [e for e in _elements(pipeline) if e.get_factory() and e.get_factory().get_name() == "appsink"]
        if len(sinks) != 1:
            raise OptionError(f"{self.name}: expected one appsink in the pipeline, got {len(sinks)}")
        (sink,) = sinks
        if sink.get_property("caps") is None:
            sink.set_property("caps", gst.Caps.from_string(CAPS))
        if sink.get_property("max-buffers") == 0:
            sink.set_property("max-buffers", 1 if self.live else _WAITING)
            sink.set_property("drop", self.live)
            # Not the clock decides when a frame is there, but the camera or the reader.
            sink.set_property("sync", False)
        return pipeline, sink

    def read(self) -> Frame | None:
        """The next frame; None at the end, which a live one has not, or once closed.  Raises SourceError."""
        gst, _ = load()
        with self._changing:
            sink = self._sink
        deadline = time.monotonic() + self._timeout_s
        while sink is not None and not self._closed:
            sample = sink.try_pull_sample(int(_POLL_S * gst.SECOND))
            # Also when there is a frame, since messages that nobody takes would pile up.
            self._failure = self._failure or self._error(gst)
            if sample is not None:
                return self._frame(sample)
            if self._closed:
                break
            if self._failure is not None:
                sample = sink.try_pull_sample(0)  # one that came just before the error
                if sample is not None:
                    return self._frame(sample)
                raise self._failure
            if sink.is_eos() and self.live:
                raise SourceError(f"{self.name}: the pipeline ended its stream")
            if sink.is_eos():
                return None
            if time.monotonic() > deadline:
                raise SourceError(f"{self.name}: no frame within {self._timeout_s:g} s")
        return None

    def _frame(self, sample: Any) -> Frame:
        caps = sample.get_caps()
        if self._layout is None or not caps.is_equal(self._caps):
            self._caps = caps
            try:
                self._layout = Layout.of(caps)
            except DataError as error:
                self._layout = error
        if isinstance(self._layout, DataError):
            return Frame(None, time.monotonic_ns(), problem=str(self._layout))
        return self._layout.frame(sample.get_buffer())

    def _error(self, gst: Any) -> SourceError | None:
        """The first error on the bus, whose other messages go."""
        with self._changing:
            pipeline = self._pipeline
        message = pipeline and pipeline.get_bus().pop_filtered(gst.MessageType.ERROR)
        if not message:
            return None
        error, debug = message.parse_error()
        # The first line of the debug text is a place in the element's source, the second its reason.
        detail = _line((debug or "").strip().partition("\n")[2])
        hint = "; put `videoconvert` before the appsink" if "not-negotiated" in detail else ""
        text = f"{_line(error.message)} {detail}".strip()
        return SourceError(f"{self.name}: {message.src.get_name()}: {text}{hint}")

    def close(self) -> None:
        """Stop the pipeline; a read that waits ends at once."""
        with self._changing:
            self._closed = True
            pipeline, self._pipeline, self._sink = self._pipeline, None, None
        if pipeline is not None:
            gst, _ = load()
            pipeline.set_state(gst.State.NULL)


def _elements(pipeline: Any) -> list[Any]:
    """All elements of a pipeline, those of its bins too."""
    found: list[Any] = []
    iterator = pipeline.iterate_recurse()
    while True:
        result, element = iterator.next()
        if int(result) != 1:  # GST_ITERATOR_OK
            return found
        found.append(element)


def csi_pipeline(sensor: int, *, width: int = 1280, height: int = 720, fps: int = 30) -> str:
    """Pipeline of a CSI camera on a Jetson.  Not yet run on hardware."""
    return (
        f"nvarguscamerasrc sensor-id={sensor} "
        f"! video/x-raw(memory:NVMM),format=NV12,width={width},height={height},framerate={fps}/1 "
        "! nvvidconv ! video/x-raw,format=NV12 ! appsink drop=true max-buffers=1 sync=false"
    )


def usb_pipeline(device: int, *, width: int = 640, height: int = 480, fps: int = 30) -> str:
    """Pipeline of a USB camera, raw or MJPEG.  Not yet run on hardware."""
    size = f"width={width},height={height},framerate={fps}/1"
    return (
        f'v4l2src device=/dev/video{device} ! capsfilter caps="video/x-raw,{size};image/jpeg,{size}" '
        "! decodebin ! videoconvert ! video/x-raw,format=RGB ! appsink drop=true max-buffers=1 sync=false"
    )


def from_uri(address: Uri) -> GStreamerSource:
    """Source of ``gst:PIPELINE#live=0&timeout=10&name=NAME``.  Raises OptionError."""
    address.text = "gst:..."  # for messages: a pipeline may hold a password
    live = address.take("live", one_of(("0", "1")), "")
    return GStreamerSource(
        address.rest,
        live=None if not live else live == "1",
        timeout_s=address.take("timeout", real_number(0.1, 3600.0), 10.0),
        name=address.take("name", str, "gst"),
    )


def preset_from_uri(address: Uri) -> GStreamerSource:
    """Source of ``csi:0#width=1280&height=720&fps=30`` or ``usb:0#...``.  Raises OptionError."""
    try:
        number = whole_number(0, 63)(address.rest)
    except ValueError as error:
        raise OptionError(f"{address.text}: number of the camera: {error}") from None
    make, width, height = (csi_pipeline, 1280, 720) if address.scheme == "csi" else (usb_pipeline, 640, 480)
    pipeline = make(
        number,
        width=address.take("width", whole_number(1, 16384), width),
        height=address.take("height", whole_number(1, 16384), height),
        fps=address.take("fps", whole_number(1, 1000), 30),
    )
    return GStreamerSource(
        pipeline,
        live=True,
        timeout_s=address.take("timeout", real_number(0.1, 3600.0), 10.0),
        name=address.take("name", str, f"{address.scheme}:{number}"),
    )


def _line(text: object) -> str:
    return without_secrets(" ".join(str(text).split()))[:300]
