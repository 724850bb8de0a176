"""Judged frames with their verdicts as a video file, encoded with PyAV."""

from __future__ import annotations

import contextlib
import os
import re
import time
from fractions import Fraction
from typing import Any, BinaryIO

from inflight_edge._optional import require
from inflight_edge.errors import InflightError, OptionError, SinkError
from inflight_edge.events import Context, Outcome
from inflight_edge.sinks._annotate import Annotator
from inflight_edge.uri import Uri, real_number

__all__ = ["VideoSink", "from_address"]

_TIME_BASE = Fraction(1, 1000)
# Of the canvas of a camera whose first frame cannot be read.
_HEIGHT, _WIDTH = 480, 640
# What a killed process loses at most: what came after the last key frame is not in the file yet.
_KEY_FRAME_MS = 1000
# After a failure, such as a full disk, seconds until the next file is tried.
_PAUSE_S = 5.0
# mp4 in fragments is readable without its end; Matroska always is.
_CONTAINERS = {
    ".mp4": ("mp4", {"movflags": "frag_keyframe+empty_moov+default_base_moof"}),
    ".mkv": ("matroska", {"cluster_time_limit": "1000"}),
}


class VideoSink:
    """One file per camera, H.264 where PyAV has libx264, else MPEG-4.  Drops are left out.

    A file that exists is never written over: the next free of FILE-1.mp4, FILE-2.mp4 ... is taken; with several
    cameras FILE-CAMERA.mp4.  The file grows as long as the pipeline runs.

    fps    0: each frame is shown when it was captured.  Else each for 1 / fps seconds, which suits files, since those
           are read faster or slower than they were recorded.
    codec  an encoder of FFmpeg instead, say h264_nvenc.
    """

    def __init__(self, path: str, *, fps: float = 0.0, codec: str = "") -> None:
        self._stem, self._suffix = os.path.splitext(path)
        if self._suffix not in _CONTAINERS or not os.path.basename(self._stem):
            raise OptionError(f"video: expected a file named .mp4 or .mkv, got {path!r}")
        self.name = f"video:{path}"
        self._fps, self._codec = fps, codec
        self._context: Context | None = None
        self._films: dict[str, _Film] = {}
        self._pause_until = 0.0

    def open(self, context: Context) -> None:
        """Check the encoder and the folder; a file is made with the first frame.  Raises SinkError, DependencyError."""
        self._av = require("av", "pip install 'inflight-edge[video]'")
        codec = self._codec or ("libx264" if "libx264" in self._av.codecs_available else "mpeg4")
        try:
            self._av.Codec(codec, "w")
        except (ValueError, self._av.FFmpegError) as error:
            raise OptionError(f"{self.name}: codec: expected an encoder of FFmpeg, got {codec!r}") from error
        folder = os.path.dirname(os.path.abspath(self._stem))
        if not os.access(folder, os.W_OK | os.X_OK):
            raise SinkError(f"{self.name}: expected a folder that can be written, got {folder}")
        self._films, self._pause_until = {}, 0.0
        self._encoder = codec
        self._context = context

    def write(self, outcome: Outcome) -> None:
        """Encode the frame.  Raises SinkError when it is lost; a new file is begun some seconds later."""
        if self._context is None:
            raise SinkError(f"{self.name}: not open; call open first")
        if outcome.verdict is None:
            return
        if time.monotonic() < self._pause_until:
            raise SinkError(f"{self.name}: frame lost: a new file is tried in a few seconds")
        camera = outcome.frame.camera
        try:
            if camera not in self._films:
                self._films[camera] = self._film(outcome, self._context)
            self._films[camera].add(outcome)
        except (OSError, self._av.FFmpegError) as error:
            self._pause_until = time.monotonic() + _PAUSE_S
            if film := self._films.pop(camera, None):
                film.abandon()
            raise SinkError(f"{self.name}: frame lost: {_cause(error)}") from error

    def _film(self, outcome: Outcome, context: Context) -> _Film:
        pixels = outcome.frame.pixels
        height, width = (_HEIGHT, _WIDTH) if pixels is None or pixels.ndim < 2 else pixels.shape[:2]
        if outcome.frame.colour.startswith("nv12"):
            height = height // 3 * 2
        annotator = Annotator(context, height, width)
        name = self._stem
        if len(context.cameras) > 1:
            name += "-" + re.sub(r"[^\w.]", "_", outcome.frame.camera, flags=re.ASCII)[:40]
        return _Film(self._av, self._new_file(name), self._suffix, self._encoder, annotator, self._fps)

    def _new_file(self, stem: str) -> BinaryIO:
        number = 0
        while True:
            path = f"{stem}-{number}{self._suffix}" if number else f"{stem}{self._suffix}"
            try:
                return open(path, "xb", buffering=0)
            except FileExistsError:
                number += 1

    def flush(self) -> None:
        """Nothing to do: a second of video is in the file when the next one begins."""

    def close(self) -> None:
        """End the files.  Raises SinkError when the last frames cannot be written."""
        self._context = None
        failures = []
        while self._films:
            _, film = self._films.popitem()
            try:
                film.close()
            except (OSError, self._av.FFmpegError) as error:
                film.abandon()
                failures.append(_cause(error))
        if failures:
            raise SinkError(f"{self.name}: the last frames are lost: {failures[0]}")


class _Film:
    """One file: its encoder and its clock."""

    def __init__(
        self, av: Any, file: BinaryIO, suffix: str, codec: str, annotator: Annotator, fps: float
    ) -> None:  # fmt: skip
        self._av, self._file, self._annotator, self._fps = av, file, annotator, fps
        self._start_ns, self._count = 0, 0
        self._last_ms, self._key_ms = -1, -_KEY_FRAME_MS
        container, options = _CONTAINERS[suffix]
        try:
            self._container = av.open(file, "w", format=container, options=options)
            self._stream = self._container.add_stream(codec, rate=30)
            self._stream.width, self._stream.height = annotator.size
            self._stream.pix_fmt = "yuv420p"
            self._stream.codec_context.time_base = _TIME_BASE
            self._stream.codec_context.thread_count = 1  # the other cores are the classifier's
            self._stream.codec_context.gop_size = 10_000  # key frames come by the clock
            if codec == "libx264":
                self._stream.options = {"preset": "ultrafast", "tune": "zerolatency", "crf": "20"}
            elif codec == "mpeg4":
                self._stream.options = {"qscale": "4"}
        except BaseException:
            file.close()
            os.unlink(file.name)
            raise

    def add(self, outcome: Outcome) -> None:
        frame = self._av.VideoFrame.from_ndarray(self._annotator.draw(outcome), format="rgb24")
        if not self._count:
            self._start_ns = outcome.frame.captured_ns
        elapsed_ms = (outcome.frame.captured_ns - self._start_ns) // 1_000_000
        if self._fps:
            elapsed_ms = round(1000 * self._count / self._fps)
        self._count += 1
        self._last_ms = max(self._last_ms + 1, elapsed_ms)  # two frames of one moment are shown one after the other
        frame.pts, frame.time_base = self._last_ms, _TIME_BASE
        if self._last_ms - self._key_ms >= _KEY_FRAME_MS:
            frame.pict_type = self._av.video.frame.PictureType.I
            self._key_ms = self._last_ms
        self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        self._container.mux(self._stream.encode(None))
        self._container.close()
        self._file.close()

    def abandon(self) -> None:
        """Release everything after a failure; what is in the file stays, an empty one goes."""
        with contextlib.suppress(OSError, self._av.FFmpegError, InflightError):
            self._container.close()  # fails again in the same way
        with contextlib.suppress(OSError):
            self._file.close()
            if os.path.getsize(self._file.name) == 0:
                os.unlink(self._file.name)


def _cause(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def from_address(address: Uri) -> VideoSink:
    """video:FILE.mp4 or video:FILE.mkv.  Raises OptionError."""
    sink = VideoSink(
        address.rest,
        fps=address.take("fps", real_number(0, 1000), 0.0),
        codec=address.take("codec", str, ""),
    )
    address.finish()
    return sink
