"""Annotated video: read again with PyAV, frame by frame."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from outcomes import accepted, context, dropped, every_kind, frame, invalid, pixels, triggered, unguarded, unreadable

from inflight_edge import OptionError, SinkError
from inflight_edge.events import Context, Outcome
from inflight_edge.sinks import make_sink, video
from inflight_edge.sinks._annotate import _COLOURS, Annotator, _lines
from inflight_edge.sinks.record import record

av = pytest.importorskip("av", reason="PyAV is not installed")

ALONE = context(cameras=("front",))
SECOND = 1_000_000_000


@contextlib.contextmanager
def opened(path: Path, options: str = "", using: Context = ALONE) -> Iterator[Any]:
    sink = make_sink(f"video:{path}{options}")
    sink.open(using)
    try:
        yield sink
    finally:
        sink.close()


def decoded(path: Path) -> list[tuple[float, np.ndarray[Any, Any]]]:
    """Seconds and pixels of every frame that can be read; what is cut off at the end is no error."""
    frames: list[tuple[float, np.ndarray[Any, Any]]] = []
    with av.open(str(path)) as container, contextlib.suppress(av.error.InvalidDataError):
        for picture in container.decode(video=0):
            frames.append((float(picture.time), picture.to_ndarray(format="rgb24")))
    return frames


def near(pixel: np.ndarray[Any, Any], colour: tuple[int, int, int]) -> bool:
    return bool(np.abs(pixel.astype(int) - colour).max() < 40)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_every_judged_frame_is_there_at_its_time(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"film{suffix}"
    times = [0, 0, 40_000_000, 1 * SECOND, 1 * SECOND, 3 * SECOND]  # two of one moment; a camera that paused
    makers = (accepted, triggered, invalid, unguarded, dropped, triggered)
    with opened(path) as sink:
        for index, (make, captured) in enumerate(zip(makers, times, strict=True)):
            sink.write(make(index, captured_ns=5 * SECOND + captured))
    frames = decoded(path)
    assert [round(seconds, 3) for seconds, _ in frames] == [0.0, 0.001, 0.04, 1.0, 3.0]
    for (_, image), decision in zip(frames, ("accept", "trigger", "invalid", "unguarded", "trigger"), strict=True):
        flagged = decision in ("trigger", "invalid")
        assert near(image[3, 100], _COLOURS[decision] if flagged else (0, 0, 0)), decision
        assert near(image[-65, -5], _COLOURS[decision]), decision


def test_frames_of_a_file_are_shown_evenly(tmp_path: Path) -> None:
    with opened(tmp_path / "film.mp4", "#fps=25") as sink:
        for index in range(5):
            sink.write(accepted(index, captured_ns=1))
    assert [round(seconds, 3) for seconds, _ in decoded(tmp_path / "film.mp4")] == [0.0, 0.04, 0.08, 0.12, 0.16]


def test_size_and_colour_may_change(tmp_path: Path) -> None:
    path = tmp_path / "film.mkv"
    judged = [outcome for outcome in every_kind() if outcome.verdict is not None]
    with opened(path, "#fps=10") as sink:
        for outcome in judged:
            sink.write(Outcome(frame(pixels=outcome.frame.pixels, colour=outcome.frame.colour), outcome.verdict))
        sink.write(triggered(99, pixels=pixels(height=2000, width=1100)))
    frames = decoded(path)
    assert len(frames) == len(judged) + 1
    assert len({image.shape for _, image in frames}) == 1


def test_the_image_is_whole_and_fitted_in() -> None:
    annotator = Annotator(ALONE, 24, 32)
    image = annotator.draw(triggered(0))
    np.testing.assert_array_equal(image[8:248:10, 16:336:10], pixels())  # enlarged 10 times, centred, not covered
    tall = annotator.draw(triggered(0, pixels=np.full((240, 80, 3), 200, np.uint8)))
    assert tall.shape == image.shape
    inside = (tall[100] == 200).all(axis=1)
    assert inside.sum() == 80
    assert not inside[:130].any()


def test_large_frames_are_reduced_and_sides_are_even() -> None:
    for height, width in ((1080, 1921), (1, 1), (3, 5000), (777, 333), (28, 28)):
        columns, rows = Annotator(ALONE, height, width).size
        assert columns % 2 == rows % 2 == 0
        assert 350 <= columns <= 1300


def test_what_is_written_beside_the_image() -> None:
    def lines(outcome: Outcome) -> tuple[str, ...]:
        return _lines(record(outcome, context()))

    assert lines(triggered(7, alarm=True)) == (
        "TRIGGER  west, really north",
        "ALARM  margin +19.75  label north",
        "front  #7  08:00:00.123Z",
    )
    assert lines(accepted(0))[:2] == ("ACCEPT  north", "margin -10.50  label north")
    assert lines(unguarded(0))[:2] == ("UNGUARDED  süd", "no margin: the class has no guard  label süd")
    assert lines(unreadable(0))[0] == "INVALID"
    assert "it is damaged" in lines(unreadable(0))[1]


def test_text_is_drawn_and_an_unreadable_frame_has_its_problem() -> None:
    annotator = Annotator(ALONE, 24, 32)
    panel = annotator.draw(accepted(0))[256:]
    assert (panel > 200).all(axis=2).sum() > 300  # of its own colour: letters
    black = annotator.draw(unreadable(0))[8:248, 16:336]
    assert 100 < (black > 200).all(axis=2).sum() < 5000
    annotator.draw(triggered(0, camera="line\nbreak \N{PILE OF POO} " * 50))


def test_each_camera_has_a_file(tmp_path: Path) -> None:
    with opened(tmp_path / "film.mp4", "#fps=10", context()) as sink:
        for index in range(4):
            sink.write(triggered(index, camera="front" if index else "../rear"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["film-.._rear.mp4", "film-front.mp4"]
    assert len(decoded(tmp_path / "film-front.mp4")) == 3


def test_a_file_that_exists_is_kept(tmp_path: Path) -> None:
    for _ in range(3):
        with opened(tmp_path / "film.mp4") as sink:
            sink.write(accepted(0))
    assert [len(decoded(tmp_path / name)) for name in ("film.mp4", "film-1.mp4", "film-2.mp4")] == [1, 1, 1]


def test_no_frame_no_file(tmp_path: Path) -> None:
    with opened(tmp_path / "film.mp4") as sink:
        sink.write(dropped(0))
        sink.flush()
    assert not list(tmp_path.iterdir())


def test_a_camera_that_begins_unreadable(tmp_path: Path) -> None:
    with opened(tmp_path / "film.mp4", "#fps=10") as sink:
        sink.write(unreadable(0))
        sink.write(accepted(1))
    assert len(decoded(tmp_path / "film.mp4")) == 2


KILLED = """
import sys, time
sys.path.insert(0, sys.argv[1])
from outcomes import accepted, context
from inflight_edge.sinks import make_sink
sink = make_sink(sys.argv[2])
sink.open(context(cameras=("front",)))
for index in range(100):  # 10 seconds of 10 frames/s
    sink.write(accepted(index, captured_ns=index * 100_000_000))
print("written", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_killed_process_leaves_a_film_that_lacks_a_second_at_most(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"film{suffix}"
    arguments = [sys.executable, "-c", KILLED, str(Path(__file__).parents[1]), f"video:{path}"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        process.send_signal(signal.SIGKILL)
    frames = decoded(path)
    assert len(frames) >= 90
    assert frames[-1][0] >= 8.9


def test_a_full_disk_is_an_error_and_a_new_file_follows(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "_PAUSE_S", 0.1)
    noise = np.random.default_rng(0).integers(0, 256, (100, 100, 3), np.uint8)
    with opened(small_disk / "film.mp4", "#fps=2") as sink:
        lost = []
        for index in range(40):
            try:
                sink.write(accepted(index, pixels=np.roll(noise, index, 1)))
            except SinkError as error:
                lost.append(str(error))
        assert "frame lost: No space left on device" in lost[0]
        assert "a new file is tried in a few seconds" in lost[1]
        (small_disk / "film.mp4").unlink()
        time.sleep(0.15)
        sink.write(accepted(50))
        sink.write(accepted(51))
    assert any(len(decoded(path)) == 2 for path in small_disk.iterdir())


def test_close_tells_what_cannot_be_written(small_disk: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (100, 100, 3), np.uint8)
    sink = make_sink(f"video:{small_disk / 'film.mp4'}#fps=30")
    sink.open(ALONE)
    for index in range(20):  # less than a second: all of it is still in memory
        sink.write(accepted(index, pixels=np.roll(noise, index, 1)))
    with pytest.raises(SinkError, match="the last frames are lost: No space left on device"):
        sink.close()
    sink.close()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("video:film.avi", "expected a file named .mp4 or .mkv, got 'film.avi'"),
        ("video:", "expected a file named .mp4 or .mkv, got ''"),
        ("video:film.mp4#fps=-1", "option fps: expected a number from 0 to 1000, got '-1'"),
        ("video:film.mp4#frames=1", "unknown option frames"),
    ],
)
def test_addresses_that_are_refused(address: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make_sink(address)


def test_what_open_refuses(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="codec: expected an encoder of FFmpeg, got 'none'"):
        make_sink(f"video:{tmp_path}/film.mp4#codec=none").open(ALONE)
    with pytest.raises(SinkError, match="expected a folder that can be written"):
        make_sink(f"video:{tmp_path}/missing/film.mp4").open(ALONE)


def test_another_encoder(tmp_path: Path) -> None:
    with opened(tmp_path / "film.mkv", "#codec=mpeg4&fps=10") as sink:
        for index in range(12):
            sink.write(accepted(index))
    assert len(decoded(tmp_path / "film.mkv")) == 12
