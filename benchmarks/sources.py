"""Milliseconds per frame that sources take: ``python -m benchmarks.sources``.  Needs PyAV, GStreamer and an RTSP server.

Inside the intervals: from a sample of an appsink to a Frame; FFmpeg's decoding of H.264, and its picture to a Frame;
from the moment that a server on this machine made a frame until it is stamped.
"""

from __future__ import annotations

import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from inflight_edge import SourceError
from inflight_edge.sources import Source, make_source

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

SIZES = ((640, 480), (1280, 720))
H264 = "rtspsrc location={} protocols=tcp latency=0 ! rtph264depay ! avdec_h264 ! videoconvert ! video/x-raw,format=RGB"


def percentiles(name: str, seconds: list[float]) -> None:
    """Print p50 and p99 in milliseconds."""
    p50, p99 = np.percentile(seconds, (50, 99)) * 1e3
    print(f"{name:48} p50 {p50:8.3f} ms   p99 {p99:8.3f} ms")


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """Result and seconds of a call."""
    began = time.perf_counter()
    result = call()
    return result, time.perf_counter() - began


def gstreamer(width: int, height: int) -> None:
    """A sample of an appsink to a Frame."""
    for form in ("RGB", "NV12"):
        source: Any = make_source(
            f"gst:videotestsrc ! video/x-raw,format={form},width={width},height={height} ! appsink#live=0"
        )
        source.open()
        frame_of = functools.partial(source._frame, source._sink.pull_sample())
        percentiles(f"appsink, {form} {width}x{height}", [timed(frame_of)[1] for _ in range(300)])
        source.close()


def pyav(width: int, height: int, folder: str) -> None:
    """H.264 to pictures, and a picture to a Frame, as sources/_pyav.py does it."""
    import av

    from inflight_edge.sources._pyav import _frame

    path = os.path.join(folder, f"{width}.mkv")
    blocks = np.random.default_rng(0).integers(0, 255, (height // 16, width // 16, 3), np.uint8)
    image = blocks.repeat(16, axis=0).repeat(16, axis=1)
    with av.open(path, "w") as file:
        stream: Any = file.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(120):
            moved = np.ascontiguousarray(np.roll(image, 4 * i, axis=1))
            file.mux(stream.encode(av.VideoFrame.from_ndarray(moved, format="rgb24")))
        file.mux(stream.encode())
    convert = av.video.reformatter.VideoReformatter().reformat
    decoding, conversion = [], []
    with av.open(path) as file:
        file.streams.video[0].thread_type = "SLICE"
        pictures = file.decode(video=0)
        while (found := timed(lambda: next(pictures, None)))[0] is not None:
            decoding.append(found[1])
            conversion.append(timed(lambda: _frame(convert, found[0]))[1])
    percentiles(f"PyAV, decoding {width}x{height}", decoding)
    percentiles(f"PyAV, picture to RGB {width}x{height}", conversion)


def delay(name: str, codec: str, address: str) -> None:
    """From the making of a frame by a server of 30 frames/s until it is stamped; whole milliseconds."""
    from rtsp_streams import number_of, server

    os.environ["RTSP_NUMBERS"] = "clock"
    with server(codec, "120", fps=30) as (_, port):
        source: Source = make_source(address.format(f"rtsp://127.0.0.1:{port}/stream"))
        source.open()
        delays = []
        try:
            while (frame := source.read()) is not None and frame.pixels is not None:
                delays.append((frame.captured_ns // 1_000_000 - number_of(frame.pixels)) % (1 << 16) / 1e3)
        except SourceError:  # the server's end
            pass
        source.close()
    percentiles(name, delays[10:])


def main() -> None:
    """Measure and print."""
    import gstreamer_here

    if reason := gstreamer_here.missing(["x264enc"], ["GstRtspServer"]):
        raise SystemExit(reason)
    with tempfile.TemporaryDirectory() as folder:
        for width, height in SIZES:
            gstreamer(width, height)
            pyav(width, height, folder)
    delay("RTSP, MJPEG, PyAV: made to stamped", "mjpeg", "{}")
    delay("RTSP, H.264, PyAV: made to stamped", "h264", "{}")
    delay("RTSP, H.264, GStreamer: made to stamped", "h264", f"gst:{H264} ! appsink")


if __name__ == "__main__":
    main()
