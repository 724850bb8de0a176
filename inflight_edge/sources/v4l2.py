"""Cameras of the kernel (V4L2, /dev/video0), through PyAV."""

from __future__ import annotations

import glob
import os
import stat
import time
from collections.abc import Generator

from inflight_edge.errors import OptionError, SourceError
from inflight_edge.events import Frame
from inflight_edge.sources._background import CameraSource
from inflight_edge.sources._pyav import frames_of, open_video
from inflight_edge.uri import Uri, real_number, whole_number

__all__ = ["V4l2Source", "from_uri"]

# A connection that hangs for so long is given up, and with it the process.
HUNG_S = 60.0


class V4l2Source(CameraSource):
    """A camera of the kernel.  Not yet run on hardware.

    device     /dev/video0 or the like.
    width, height, fps  None: what the camera is set to; the driver may take the nearest it can.
    input_format  of the camera's stream, FFmpeg's name (mjpeg, yuyv422, nv12); "": FFmpeg's choice.
    timeout_s  to open it, and to wait for a frame, each.
    Frames are stamped when they are decoded.
    """

    def __init__(
        self,
        device: str,
        *,
        width: int | None = None,
        height: int | None = None,
        fps: float | None = None,
        input_format: str = "",
        timeout_s: float = 5.0,
        name: str = "",
    ) -> None:
        if (width is None) != (height is None):
            raise OptionError(f"{device}: expected width and height, or neither")
        super().__init__(self._open, name=name or device, timeout_s=timeout_s)
        self._device = device
        self._hung_at: float | None = None
        self._options = {
            **({} if width is None else {"video_size": f"{width}x{height}"}),
            **({} if fps is None else {"framerate": f"{fps:g}"}),
            **({"input_format": input_format} if input_format else {}),
        }

    def open(self) -> None:
        """Open the camera.  Raises SourceError, which says what to do; DependencyError.

        A driver that has stopped giving frames may hold FFmpeg's thread, and with it the camera, as long as this process
        lives: after a minute the error is final.
        """
        if not self.hangs():
            self._hung_at = None
        elif self._hung_at is None:
            self._hung_at = time.monotonic()
        if self._hung_at is not None:
            text = "the last connection hangs in its driver, which keeps the camera; unplug it, or restart this program"
            raise SourceError(f"{self.name}: {text}", final=time.monotonic() - self._hung_at > HUNG_S)
        self._check()
        super().open()

    def _check(self) -> None:
        """Raise SourceError for what FFmpeg's message would not explain."""
        try:
            file = os.open(self._device, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            there = ", ".join(sorted(glob.glob("/dev/video*"))) or "none; is the camera connected?"
            raise SourceError(f"{self.name}: no such camera; those here: {there}") from None
        except PermissionError:
            raise SourceError(
                f"{self.name}: no permission; add the user to the group video (sudo usermod -aG video USER), then log "
                "in again"
            ) from None
        except OSError as error:
            raise SourceError(f"{self.name}: {_remedy(error.strerror or '', self._device)}") from None
        try:
            if not stat.S_ISCHR(os.fstat(file).st_mode):
                raise SourceError(f"{self.name}: expected a camera's device such as /dev/video0, got a file")
        finally:
            os.close(file)

    def _open(self) -> Generator[Frame, None, None]:
        try:
            container = open_video(self._device, self.name, demuxer="v4l2", options=self._options)
        except SourceError as error:
            raise SourceError(_remedy(str(error), self._device)) from None
        return self._frames(container)

    def _frames(self, container: object) -> Generator[Frame, None, None]:
        yield from frames_of(container, self.name)
        raise SourceError(f"{self.name}: the camera ended its stream; was it unplugged?")


def _remedy(text: str, device: str) -> str:
    if "busy" in text.lower():
        return f"{text}; another program uses the camera: `fuser -v {device}` names it"
    if "inappropriate ioctl" in text.lower():
        return f"{text}; {device} is no camera, or its node for metadata: try the next number"
    if "invalid argument" in text.lower():
        return f"{text}; it may not know this size, rate or format: `v4l2-ctl -d {device} --list-formats-ext`"
    return text


def from_uri(address: Uri) -> V4l2Source:
    """Source of ``v4l2:/dev/video0#width=640&height=480&fps=30&format=mjpeg``.  Raises OptionError."""
    return V4l2Source(
        address.rest,
        width=address.take("width", whole_number(1, 16384), None),
        height=address.take("height", whole_number(1, 16384), None),
        fps=address.take("fps", real_number(0.001, 1e6), None),
        input_format=address.take("format", str, ""),
        timeout_s=address.take("timeout", real_number(0.1, 3600.0), 5.0),
        name=address.take("name", str, ""),
    )
