"""V4L2: no camera is needed, and none is here; what is tested ends where a driver would begin."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from waiting import wait_for

from inflight_edge import OptionError, SourceError
from inflight_edge.sources import _pyav, v4l2
from inflight_edge.sources.v4l2 import V4l2Source

av = pytest.importorskip("av", reason="PyAV is not installed: pip install 'inflight-edge[video]'")


def test_missing_camera_names_those_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = V4l2Source(str(tmp_path / "video7"))
    with pytest.raises(SourceError, match=r"no such camera; those here: "):
        source.open()
    monkeypatch.setattr("glob.glob", lambda pattern: ["/dev/video1", "/dev/video0"])
    with pytest.raises(SourceError, match=r"no such camera; those here: /dev/video0, /dev/video1$"):
        source.open()
    source.close()


def test_file_is_no_camera(tmp_path: Path) -> None:
    (tmp_path / "video0").write_bytes(b"")
    with pytest.raises(SourceError, match=r"expected a camera's device such as /dev/video0, got a file"):
        V4l2Source(str(tmp_path / "video0")).open()


def test_device_that_is_no_camera_is_refused_by_the_driver() -> None:
    with pytest.raises(
        SourceError, match=r"^/dev/null: cannot be opened: Inappropriate ioctl for device; /dev/null is"
    ):
        V4l2Source("/dev/null").open()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(13, "Permission denied"), "no permission; add the user to the group video"),
        (OSError(16, "Device or resource busy"), "busy; another program uses the camera: `fuser -v /dev/video0`"),
    ],
)
def test_what_forbids_the_device_is_explained(monkeypatch: pytest.MonkeyPatch, error: OSError, message: str) -> None:
    def refuse(*_: object) -> int:
        raise error

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(SourceError, match=message):
        V4l2Source("/dev/video0").open()


def camera(monkeypatch: pytest.MonkeyPatch, open_: Any) -> list[tuple[str, str, dict[str, str]]]:
    """PyAV whose open is a double; the device is /dev/null.  Returns what open was called with."""
    calls: list[tuple[str, str, dict[str, str]]] = []

    def opened(path: str, *, format: str, options: dict[str, str], timeout: object, metadata_errors: str) -> Any:  # noqa: A002 - PyAV's name
        calls.append((path, format, options))
        return open_()

    double = SimpleNamespace(open=opened, error=av.error, video=av.video, codec=av.codec)
    monkeypatch.setattr(_pyav, "require", lambda name, remedy: double)
    return calls


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (av.error.OSError(16, "Device or resource busy", "/dev/null"), "another program uses the camera"),
        (av.error.OSError(22, "Invalid argument", "/dev/null"), "v4l2-ctl -d /dev/null --list-formats-ext"),
        (av.error.OSError(19, "No such device", "/dev/null"), "cannot be opened: No such device$"),
    ],
)
def test_what_the_driver_refuses_is_explained(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    def refuse() -> None:
        raise error

    camera(monkeypatch, refuse)
    with pytest.raises(SourceError, match=message):
        V4l2Source("/dev/null").open()


def test_options_and_frames_and_unplugging(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "camera.mkv"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mjpeg", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for value in (10, 200):
            picture = av.VideoFrame.from_ndarray(np.full((48, 64, 3), value, np.uint8), format="rgb24")
            file.mux(stream.encode(picture))
        file.mux(stream.encode())
    calls = camera(monkeypatch, lambda: av.open(str(path)))
    source = V4l2Source("/dev/null", width=640, height=480, fps=30, input_format="mjpeg", name="front")
    for _ in range(2):  # plugged in again
        source.open()
        frames = [source.read(), source.read()]
        means = [frame.pixels.mean() for frame in frames if frame and frame.pixels is not None]
        np.testing.assert_allclose(means, [10, 200], atol=2)
        with pytest.raises(SourceError, match=r"^front: the camera ended its stream; was it unplugged"):
            source.read()
    source.close()
    assert calls[0] == ("/dev/null", "v4l2", {"video_size": "640x480", "framerate": "30", "input_format": "mjpeg"})


def test_camera_that_hangs_is_an_error_in_time_and_its_close_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang() -> Iterator[None]:
        time.sleep(1.5)
        raise av.error.OSError(19, "No such device", "/dev/null")

    camera(monkeypatch, hang)
    source = V4l2Source("/dev/null", timeout_s=0.2)
    began = time.monotonic()
    with pytest.raises(SourceError, match=r"not connected within 0.2 s"):
        source.open()
    source.close()
    assert time.monotonic() - began < 1.3


def test_camera_whose_driver_never_answers_again_is_given_up_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    stuck = threading.Event()

    def hang() -> Iterator[None]:
        stuck.wait(30)
        raise av.error.OSError(19, "No such device", "/dev/null")

    camera(monkeypatch, hang)
    source = V4l2Source("/dev/null", timeout_s=0.1)
    with pytest.raises(SourceError, match=r"not connected within 0.1 s"):
        source.open()
    source.close()
    with pytest.raises(
        SourceError, match=r"the last connection hangs in its driver, .* restart this program"
    ) as raised:
        source.open()
    assert not raised.value.final
    monkeypatch.setattr(v4l2, "HUNG_S", 0.0)
    with pytest.raises(SourceError, match=r"hangs in its driver") as raised:
        source.open()
    assert raised.value.final
    stuck.set()
    wait_for(lambda: not source.hangs())
    with pytest.raises(SourceError, match="No such device"):  # the driver answers again: it is asked again
        source.open()


def test_half_a_size_is_refused() -> None:
    with pytest.raises(OptionError, match=r"expected width and height, or neither"):
        V4l2Source("/dev/video0", width=640)
