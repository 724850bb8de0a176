"""Images, arrays and callbacks; and what an address means."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from inflight_edge import OptionError, SourceError
from inflight_edge.events import Frame
from inflight_edge.sources import SOURCE_FORMS, ArraySource, CallbackSource, Source, make_source
from inflight_edge.sources._replay import Replay
from inflight_edge.sources.gstreamer import GStreamerSource
from inflight_edge.sources.images import ImageSource
from inflight_edge.sources.v4l2 import V4l2Source
from inflight_edge.sources.video import RtspSource, VideoSource


def drain(source: Source) -> list[Frame]:
    source.open()
    try:
        return list(iter(source.read, None))
    finally:
        source.close()


def arrays(n: int) -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
    return [np.full((2, 3, 3), i, np.uint8) for i in range(n)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images, a damaged one and a text file."""
    for name, value in (("a.png", 1), ("c.png", 3)):
        Image.new("RGB", (4, 3), (value, 0, 0)).save(tmp_path / name)
    (tmp_path / "b.jpg").write_bytes(b"no image")
    (tmp_path / "notes.txt").write_text("no image either")
    return tmp_path


def test_folder_gives_every_image_in_order_and_the_damaged_one_as_a_problem(folder: Path) -> None:
    before = time.monotonic_ns()
    frames = drain(make_source(str(folder)))
    assert [Path(frame.name).name for frame in frames] == ["a.png", "b.jpg", "c.png"]
    assert [None if f.pixels is None else (f.pixels.shape, int(f.pixels[0, 0, 0])) for f in frames] == [
        ((3, 4, 3), 1),
        None,
        ((3, 4, 3), 3),
    ]
    assert "expected an image" in frames[1].problem
    assert "b.jpg" in frames[1].problem
    stamps = [frame.captured_ns for frame in frames]
    assert before <= stamps[0] <= stamps[1] <= stamps[2] <= time.monotonic_ns()


def test_npz_and_a_single_file(folder: Path) -> None:
    np.savez(folder / "frames.npz", images=np.arange(24, dtype=np.uint8).reshape(2, 4, 3))
    frames = drain(make_source(str(folder / "frames.npz")))
    assert [frame.name for frame in frames] == [f"{folder}/frames.npz[0]", f"{folder}/frames.npz[1]"]
    np.testing.assert_array_equal(frames[1].pixels, np.arange(12, 24).reshape(4, 3))
    grey = drain(make_source(f"images:{folder / 'a.png'}#channels=1"))
    assert [frame.pixels.shape for frame in grey if frame.pixels is not None] == [(3, 4)]


def test_missing_images_are_said_when_opened(tmp_path: Path) -> None:
    for text in (str(tmp_path), f"images:{tmp_path}/nothing"):
        source = make_source(text)
        with pytest.raises(SourceError, match=r"got n(one|o such file)"):
            source.open()
        source.close()


def test_images_that_vanish_are_problems(folder: Path) -> None:
    source = ImageSource(folder)
    source.open()
    first = source.read()
    (folder / "c.png").unlink()
    rest = [source.read(), source.read()]
    assert first is not None
    assert first.problem == ""
    assert [frame is not None and frame.pixels is None for frame in rest] == [True, True]
    assert source.read() is None
    source.close()


def test_arrays_are_handed_on_uncopied_and_a_wrong_one_is_a_problem() -> None:
    given: list[Any] = [*arrays(2), np.zeros((2, 2), np.float32), "no array"]
    frames = drain(ArraySource(given, colour="bgr"))
    assert frames[0].pixels is given[0]
    assert frames[0].colour == "bgr"
    assert [frame.problem.partition(";")[0] for frame in frames] == [
        "",
        "",
        "frame: expected a uint8 array, got float32",
        "frame: expected a uint8 array, got str",
    ]


def test_loop_begins_again_and_an_empty_round_is_the_end() -> None:
    source = ArraySource(arrays(2), loop=True)
    source.open()
    values = [int(frame.pixels[0, 0, 0]) for _ in range(5) if (frame := source.read()) and frame.pixels is not None]
    assert values == [0, 1, 0, 1, 0]
    assert drain(ArraySource([], loop=True)) == []
    assert len(drain(ArraySource(iter(arrays(3)), loop=True))) == 3  # an iterator is used up


def test_opening_again_begins_at_the_first_frame() -> None:
    source = ArraySource(arrays(3))
    assert len(drain(source)) == 3
    assert len(drain(source)) == 3


def test_rate_is_kept_without_drift_and_without_a_burst_after_a_pause() -> None:
    source = ArraySource(arrays(1), fps=100, loop=True)
    source.open()
    began = time.monotonic()
    for _ in range(21):
        source.read()
        time.sleep(0.004)  # a reader that takes time of its own does not slow it down
    assert 0.19 < time.monotonic() - began < 0.4
    time.sleep(1.1)
    began = time.monotonic()
    for _ in range(11):
        source.read()
    assert time.monotonic() - began > 0.09
    source.close()


@pytest.mark.parametrize("fps", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_rate_is_refused(fps: float) -> None:
    with pytest.raises(OptionError, match=r"fps: expected a number above 0"):
        ArraySource([], fps=fps)


def ends_at_once(source: Source) -> None:
    """A read that waits returns None soon after another thread closed the source."""
    threading.Timer(0.1, source.close).start()
    began = time.monotonic()
    assert source.read() is None
    assert 0.05 < time.monotonic() - began < 2.0
    assert source.read() is None
    source.close()


def test_close_ends_a_read_that_waits_for_its_time() -> None:
    source = ArraySource(arrays(2), fps=0.01)
    source.open()
    assert source.read() is not None
    ends_at_once(source)


def test_close_during_a_read_does_not_wait_and_releases_what_the_frames_come_from() -> None:
    waits, goes_on, released = threading.Event(), threading.Event(), threading.Event()

    def frames() -> Iterator[Frame]:
        try:
            waits.set()
            goes_on.wait(10)
            yield Frame(arrays(1)[0], 0)
        finally:
            released.set()

    source = Replay(frames, name="slow")
    source.open()
    reader = threading.Thread(target=source.read)
    reader.start()
    assert waits.wait(5)
    source.close()
    assert not released.is_set()
    goes_on.set()
    assert released.wait(5)
    reader.join(5)


def test_callback_gives_arrays_frames_and_the_end() -> None:
    given = iter([arrays(1)[0], Frame(None, 5, problem="no light"), None])
    source = CallbackSource(lambda: next(given))
    assert source.live
    assert source.read() is None  # not open
    source.open()
    first, second = source.read(), source.read()
    assert first is not None
    assert first.pixels is not None
    assert second is not None
    assert (second.problem, second.captured_ns) == ("no light", 5)
    assert source.read() is None


def test_callback_that_raises_is_a_source_error_and_may_be_opened_again() -> None:
    def broken() -> None:
        raise ValueError("cable\nloose")

    source = CallbackSource(broken, name="lab")
    for _ in range(2):
        source.open()
        with pytest.raises(SourceError, match=r"^lab: the function raised ValueError: cable loose$"):
            source.read()
        source.close()


def test_close_of_a_callback_calls_stop() -> None:
    wait = threading.Event()

    def function() -> np.ndarray[Any, np.dtype[np.uint8]]:
        wait.wait(10)
        return arrays(1)[0]

    source = CallbackSource(function, stop=wait.set)
    source.open()
    ends_at_once(source)


def test_close_never_raises_although_stop_does(caplog: pytest.LogCaptureFixture) -> None:
    def stop() -> None:
        raise OSError("gone")

    source = CallbackSource(lambda: None, stop=stop)
    source.open()
    with caplog.at_level(logging.ERROR):
        source.close()
        source.close()
    assert [record.getMessage() for record in caplog.records] == ["callback: stop failed"]


@pytest.mark.parametrize(
    ("text", "kind", "live", "name"),
    [
        ("images:x.png#fps=3&loop=1&name=line", ImageSource, False, "line"),
        ("frames.npz", ImageSource, False, "frames.npz"),
        ("a b.JPG", ImageSource, False, "a b.JPG"),
        ("clip.MP4", VideoSource, False, "clip.MP4"),
        ("video:clip#fps=25", VideoSource, False, "clip"),
        ("rtsp://u:secret@cam:8554/a?b=secret", RtspSource, True, "rtsp://cam:8554/a"),
        ("rtsps://cam/user=admin_password=secret_channel=1", RtspSource, True, "rtsps://cam/user=..._password=..._channel=1"),
        ("rtsp://[::1]:8554/a#transport=udp&timeout=2&name=door", RtspSource, True, "door"),
        ("/dev/video2", V4l2Source, True, "/dev/video2"),
        ("v4l2:/dev/video0#width=640&height=480&fps=29.97&format=mjpeg", V4l2Source, True, "/dev/video0"),
        ("gst:videotestsrc ! appsink", GStreamerSource, True, "gst"),
        ("gst:filesrc location=a ! decodebin ! appsink#live=0&name=tape", GStreamerSource, False, "tape"),
        ("csi:1#width=1920&height=1080&fps=60", GStreamerSource, True, "csi:1"),
        ("usb:0", GStreamerSource, True, "usb:0"),
    ],
)  # fmt: skip
def test_address_gives_its_source(text: str, kind: type, live: bool, name: str) -> None:
    source = make_source(text)
    assert type(source) is kind
    assert (source.live, source.name) == (live, name)
    source.close()  # never opened


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing-here", "expected the address of a source, one of: FOLDER"),
        ("ftp://host/x.zip", "expected the address of a source, one of: FOLDER"),
        ("images:", "expected something behind images:"),
        ("rtsp://", "expected something behind rtsp:"),
        ("rtsp:///path", "expected rtsp://"),
        ("rtsp://u:secret@cam:port/x", "expected rtsp://"),
        ("rtsp://u:secret@cam/x#transport=quic", "option transport: expected one of tcp, udp, got 'quic'"),
        ("rtsp://u:secret@cam/x#timeout=0", "option timeout: expected a number from 0.1 to 3600"),
        ("rtsp://u:secret@cam/x#latency=1", "unknown option latency"),
        ("images:x.png#fps=-1", "option fps: expected a number"),
        ("images:x.png#channels=2", "option channels: expected one of 1, 3, 4"),
        ("video:x#loop=yes", "option loop: expected one of 0, 1"),
        ("v4l2:/dev/video0#width=640", "expected width and height, or neither"),
        ("csi:front", "number of the camera"),
        ("gst:rtspsrc user-pw=secret#live=maybe", "option live: expected one of 0, 1"),
        ("gst:rtspsrc user-pw=secret#size=3", "unknown option size"),
    ],
)
def test_address_that_is_not_understood_says_what_is_and_no_secret(text: str, message: str) -> None:
    with pytest.raises(OptionError) as raised:
        make_source(text)
    assert message in str(raised.value)
    assert "secret" not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_file_of_unknown_kind_is_not_said_to_be_missing(tmp_path: Path) -> None:
    (tmp_path / "film.dat").touch()
    with pytest.raises(OptionError, match=r"got a file of unknown kind: write images:PATH or video:FILE$"):
        make_source(str(tmp_path / "film.dat"))
    with pytest.raises(OptionError, match=r"got none, and no file$"):
        make_source(str(tmp_path / "none.dat"))


def test_unknown_address_lists_every_form() -> None:
    with pytest.raises(OptionError) as raised:
        make_source("nowhere")
    assert all(form in str(raised.value) for form in SOURCE_FORMS)


def test_options_of_the_camera_reach_it() -> None:
    source = make_source("v4l2:/dev/video0#width=640&height=480&fps=29.97&format=mjpeg")
    assert isinstance(source, V4l2Source)
    assert source._options == {"video_size": "640x480", "framerate": "29.97", "input_format": "mjpeg"}


def test_without_pillow_the_remedy_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from inflight_edge import DependencyError

    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(DependencyError, match=r"pip install 'inflight-edge\[camera\]'"):
        make_source(str(folder)).open()


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(OptionError, match=r"channels: expected 1, 3 or 4, got 2"):
        ImageSource("x.png", channels=2)
    with pytest.raises(OptionError, match=r"colour: expected one of rgb"):
        ArraySource([], colour="yuv")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"colour: expected one of rgb"):
        CallbackSource(lambda: None, colour="yuv")  # type: ignore[arg-type]


@pytest.mark.parametrize("content", ["junk", "other", "empty"])
def test_an_archive_that_cannot_be_read_is_an_error_and_no_frame(content: str, tmp_path: Path) -> None:
    path = tmp_path / "frames.npz"
    if content == "junk":
        path.write_bytes(b"no archive")
    else:
        np.savez(path, **{"images" if content == "empty" else "pictures": np.zeros((0, 2, 2), np.uint8)})
    source = make_source(str(path))
    source.open()
    with pytest.raises(SourceError, match=r"frames\.npz.*: expected"):
        source.read()
    source.close()
