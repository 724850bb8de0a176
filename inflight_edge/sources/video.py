"""Video files and network cameras (RTSP), through PyAV."""

from __future__ import annotations

import os
import stat
from collections.abc import Generator, Iterator
from typing import Literal
from urllib.parse import urlsplit

from inflight_edge.errors import OptionError, SourceError
from inflight_edge.events import Frame
from inflight_edge.sources._background import CameraSource
from inflight_edge.sources._pyav import frames_of, open_video
from inflight_edge.sources._replay import Replay
from inflight_edge.uri import Uri, one_of, real_number, without_named_secrets

__all__ = ["VIDEO_SUFFIXES", "RtspSource", "VideoSource", "from_uri", "rtsp_from_uri"]

VIDEO_SUFFIXES = (
    ".264", ".265", ".avi", ".flv", ".h264", ".h265", ".hevc", ".m2ts", ".m4v", ".mjpeg", ".mjpg", ".mkv", ".mov",
    ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".webm", ".wmv", ".y4m",
)  # fmt: skip

Transport = Literal["tcp", "udp"]


class VideoSource(Replay):
    """Frames of a video file, all of them; a rotation that a phone noted is not applied.

    fps, loop see Replay: without ``fps`` the file's own rate is not kept.
    A file that ends too early is a SourceError after its last frame; where its header announces no length (raw
    streams, MPEG-TS) an early end cannot be told from the end.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, fps: float | None = None, loop: bool = False, name: str = ""
    ) -> None:
        self._path = os.fspath(path)
        super().__init__(self._pictures, name=name or self._path, fps=fps, loop=loop)

    def _pictures(self) -> Iterator[Frame]:
        try:
            if not stat.S_ISREG(os.stat(self._path).st_mode):
                raise SourceError(f"{self.name}: expected a video file, got a folder or device")
        except OSError as error:
            raise SourceError(f"{self.name}: cannot be opened: {error.strerror}") from error
        # Playlists name other files and servers: a file from a stranger must not choose what is read.
        options = {"protocol_whitelist": "file"}
        return frames_of(open_video(os.path.abspath(self._path), self.name, options=options), self.name)


class RtspSource(CameraSource):
    """A network camera.  Its frames are stamped when they are decoded, on this machine's clock.

    url        rtsp://[user:password@]host[:port]/path, or rtsps://.
    transport  tcp loses nothing; udp is there for cameras without tcp, and gives frames with a problem on losses.
    timeout_s  to connect, and to wait for a frame, each.
    FFmpeg gives a frame of H.264 when the next one begins, one frame late; MJPEG at once.
    The end of the stream is a SourceError: a camera has none, so it is worth another try.
    """

    def __init__(
        self,
        url: str,
        *,
        transport: Transport = "tcp",
        timeout_s: float = 5.0,
        name: str = "",
    ) -> None:
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", f":{parts.port}" if parts.port else ""
        except ValueError:
            host = port = ""
        if not host or parts.scheme not in ("rtsp", "rtsps"):
            raise OptionError("RTSP address: expected rtsp://[user:password@]host[:port]/path, got something else")
        if transport not in ("tcp", "udp"):
            raise OptionError(f"transport: expected tcp or udp, got {transport!r}")
        shown = f"{parts.scheme}://{host}{port}{without_named_secrets(parts.path)}"
        super().__init__(self._open, name=name or shown, timeout_s=timeout_s, grace_s=1.0)
        self._url, self._transport = url, transport

    def _open(self) -> Generator[Frame, None, None]:
        options = {
            "rtsp_transport": self._transport,
            "protocol_whitelist": "rtsp,rtsps,rtp,srtp,udp,tcp,tls,crypto",
            "timeout": str(int(self._timeout_s * 1e6)),  # of the socket, microseconds
            "fflags": "nobuffer",
            "analyzeduration": "1000000",
            "allowed_media_types": "video",
        }
        if self._transport == "udp":
            options["max_delay"] = "100000"  # microseconds to wait for a packet that came late
        container = open_video(
            self._url, self.name, demuxer="rtsp", options=options, timeout_s=(self._timeout_s, self._timeout_s)
        )
        return self._frames(container)

    def _frames(self, container: object) -> Generator[Frame, None, None]:
        yield from frames_of(container, self.name)
        raise SourceError(f"{self.name}: the server ended the stream")


def from_uri(address: Uri) -> VideoSource:
    """Source of ``video:PATH#fps=30&loop=1``.  Raises OptionError."""
    return VideoSource(
        address.rest,
        fps=address.take("fps", real_number(0.001, 1e6), None),
        loop=address.take("loop", one_of(("0", "1")), "0") == "1",
        name=address.take("name", str, ""),
    )


def rtsp_from_uri(address: Uri) -> RtspSource:
    """Source of ``rtsp://...#transport=udp&timeout=5``.  Raises OptionError."""
    return RtspSource(
        f"{address.scheme}:{address.rest}",
        transport="udp" if address.take("transport", one_of(("tcp", "udp")), "tcp") == "udp" else "tcp",
        timeout_s=address.take("timeout", real_number(0.1, 3600.0), 5.0),
        name=address.take("name", str, ""),
    )
