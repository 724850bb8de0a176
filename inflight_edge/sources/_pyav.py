"""Video through FFmpeg's libraries (PyAV): open, demultiplex, decode; what is damaged is said, never passed on."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping
from typing import Any

from inflight_edge._optional import require
from inflight_edge.colour import MAX_FRAME
from inflight_edge.errors import SourceError
from inflight_edge.events import Frame

__all__ = ["REMEDY", "frames_of", "open_video", "reason"]

REMEDY = "pip install 'inflight-edge[video]'"

# Errors in a row after which a stream is given up: one that cannot be read on fails for ever.
_MAX_ERRORS = 100
# What a player assumes of a stream that does not say: BT.601 below this height, BT.709 from it on.
_HD_HEIGHT = 720
# FFmpeg's AVColorSpace to the matrix's name; others are judged by the height.
_MATRICES = {1: "ITU709", 4: "FCC", 5: "ITU601", 6: "ITU601", 7: "SMPTE240M", 9: "BT2020", 10: "BT2020"}


def open_video(
    path: str,
    name: str,
    *,
    demuxer: str | None = None,
    options: Mapping[str, str] | None = None,
    timeout_s: tuple[float, float] | None = None,
) -> Any:
    """PyAV's container, with a video stream in it.

    demuxer  FFmpeg's name; None: found out.   options  FFmpeg's.     timeout_s  to open, and to wait for data.
    Raises SourceError, whose text never holds the address (it may hold a password), and DependencyError.
    """
    av = require("av", REMEDY)
    began = time.monotonic()
    try:
        container = av.open(
            path, format=demuxer, options=dict(options or {}), timeout=timeout_s, metadata_errors="replace"
        )
    except (av.error.FFmpegError, OSError, ValueError) as error:
        # A time-out while it reads an answer is "invalid data" to FFmpeg.
        late = timeout_s is not None and time.monotonic() - began >= timeout_s[0]
        text = f"no answer within {timeout_s[0]:g} s" if timeout_s is not None and late else reason(error)
        # `from None` here and below: FFmpeg's own text holds the address.
        raise SourceError(f"{name}: cannot be opened: {text}") from None
    problem = "" if container.streams.video else "expected a video, got no video stream"
    if not problem and container.streams.video[0].codec_context is None:
        problem = "expected a video that FFmpeg decodes, got an unknown codec"
    if problem:
        container.close()
        raise SourceError(f"{name}: {problem}")
    return container


def frames_of(container: Any, name: str) -> Generator[Frame, None, None]:
    """Frames of the first video stream, RGB, in the order they are shown; closes the container at the end.

    A packet that cannot be decoded, and a frame that the decoder had to make up in part, are frames with a problem.
    So are those after them until the next key frame, which are predicted from them.
    Raises SourceError when the stream broke off: a read error, or an end before its announced end.
    """
    av = require("av", REMEDY)
    stream = container.streams.video[0]
    context = stream.codec_context
    context.thread_type = "SLICE"  # threads by frame would delay each frame by the number of threads
    context.options = {"max_pixels": str(MAX_FRAME // 3)}
    convert = av.video.reformatter.VideoReformatter().reformat
    tail = _Tail(container, stream)
    damage = ""
    try:
        for packet in _packets(container, av, name):
            if isinstance(packet, str):
                damage = packet
                yield _damaged(damage)
                continue
            tail.add(packet)
            if packet.stream is not stream:
                continue
            broken = packet.is_corrupt
            try:
                decoded = packet.decode()
            except av.error.FFmpegError as error:
                damage = f"packet cannot be decoded: {reason(error)}"
                yield _damaged(damage)
                continue
            for picture in decoded:
                if broken or picture.is_corrupt:
                    damage = "frame arrived incomplete"
                elif picture.key_frame:
                    damage = ""
                if damage:
                    yield _damaged(damage)
                    continue
                try:
                    yield _frame(convert, picture)
                except (av.error.FFmpegError, ValueError) as error:
                    yield _damaged(f"{picture.format.name} cannot be converted to RGB: {reason(error)}")
        if missing := tail.missing():
            raise SourceError(f"{name}: {missing}")
    finally:
        container.close()


def _packets(container: Any, av: Any, name: str) -> Iterator[Any]:
    """Packets of all streams; a text in place of what could not be read.  Raises SourceError when nothing follows."""
    errors = 0
    while errors < _MAX_ERRORS:
        try:
            for packet in container.demux():
                errors = 0
                yield packet
        except av.error.InvalidDataError as error:
            errors += 1
            if errors == 1:
                yield f"stream is damaged: {reason(error)}"
        except (av.error.FFmpegError, OSError) as error:
            raise SourceError(f"{name}: broke off: {reason(error)}") from None
        except IndexError:  # of PyAV, at the end, when damage looked like the begin of another stream
            raise SourceError(f"{name}: broke off: the stream is damaged") from None
        else:
            return
    raise SourceError(f"{name}: broke off: {_MAX_ERRORS} errors in a row")


class _Tail:
    """Whether a file ended where its header says: by number of frames, else by time."""

    def __init__(self, container: Any, stream: Any) -> None:
        self._stream, self._expected = stream, int(stream.frames or 0)
        self._duration = (container.duration or 0) / 1e6
        self._begin = (container.start_time or 0) / 1e6
        self._packets, self._end = 0, 0.0
        self._rate = float(stream.average_rate or 0)

    def add(self, packet: Any) -> None:
        if packet.size == 0:
            return
        if packet.stream is self._stream:
            self._packets += 1
        if packet.pts is not None and packet.time_base is not None:
            self._end = max(self._end, float((packet.pts + (packet.duration or 0)) * packet.time_base))

    def missing(self) -> str:
        if self._packets < self._expected:
            return f"ended after {self._packets} of {self._expected} frames: truncated or damaged"
        # A duration may be rounded, and a last frame may have none: two frames, or half a second, are no truncation.
        short = self._duration - (self._end - self._begin)
        if not self._expected and self._end and short > max(0.5, 2.0 / self._rate if self._rate else 0.0):
            return f"ended {short:.1f} s before its announced {self._duration:.1f} s: truncated or damaged"
        return ""


def _frame(convert: Any, picture: Any) -> Frame:
    matrix = _MATRICES.get(int(picture.colorspace)) or ("ITU709" if picture.height >= _HD_HEIGHT else "ITU601")
    # threads=1: swscale's threads cost more than they save (640x480: .27 ms against .12 ms).  Its fast path is within
    # 3 levels of 255 of the exact colours, 1 too dark on average; its exact path takes 12 times as long.
    image = convert(picture, format="rgb24", src_colorspace=matrix, threads=1)
    return Frame(image.to_ndarray(), time.monotonic_ns())


def _damaged(problem: str) -> Frame:
    return Frame(None, time.monotonic_ns(), problem=problem)


def reason(error: BaseException) -> str:
    """What went wrong in FFmpeg, without the address that its text ends with."""
    if type(error).__name__ == "ExitError":
        return "no answer in time"
    text = getattr(error, "strerror", None) or type(error).__name__
    if type(error).__name__.startswith("HTTP"):
        return f"the server refuses: {text}"
    return str(text)
