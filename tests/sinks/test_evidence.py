"""Evidence folder: whole files, bounded, nobody else's touched."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from outcomes import CLASS_NAMES, accepted, context, dropped, invalid, pixels, triggered, unguarded, unreadable
from PIL import Image

from inflight_edge import OptionError, SinkError
from inflight_edge.colour import to_rgb
from inflight_edge.events import Outcome
from inflight_edge.sinks import make_sink
from inflight_edge.sinks.record import record


@contextlib.contextmanager
def opened(folder: Path, options: str = "") -> Iterator[Any]:
    sink = make_sink(f"evidence:{folder}{options}")
    sink.open(context())
    try:
        yield sink
    finally:
        sink.close()


def kept(folder: Path) -> list[int]:
    """Indices of the frames whose JSON is there, the oldest first."""
    return [json.loads(path.read_text())["index"] for path in sorted(folder.glob("evidence-*.json"))]


def test_flagged_frames_are_there_with_their_record(tmp_path: Path) -> None:
    outcomes = [accepted(0), triggered(1), unguarded(2), invalid(3), dropped(4), unreadable(5)]
    with opened(tmp_path / "new" / "evidence") as sink:
        for outcome in outcomes:
            sink.write(outcome)
    folder = tmp_path / "new" / "evidence"
    time_of = "20261124T080000.12345"
    assert sorted(path.name for path in folder.iterdir()) == [
        f"evidence-00000000-{time_of}6Z-front-1-trigger.json",
        f"evidence-00000000-{time_of}6Z-front-1-trigger.png",
        f"evidence-00000001-{time_of}6Z-front-3-invalid.json",
        f"evidence-00000001-{time_of}6Z-front-3-invalid.png",
        f"evidence-00000002-{time_of}6Z-front-5-invalid.json",
    ]
    written = json.loads((folder / f"evidence-00000000-{time_of}6Z-front-1-trigger.json").read_text())
    assert written == {
        **record(outcomes[1], context()),
        "class_names": list(CLASS_NAMES),
        "picture": f"evidence-00000000-{time_of}6Z-front-1-trigger.png",
        "colour": "rgb",
        "shape": [24, 32, 3],
        "bundle": "bundle",
    }
    with Image.open(folder / written["picture"]) as image:
        np.testing.assert_array_equal(np.asarray(image), outcomes[1].frame.pixels)
    unread = json.loads((folder / f"evidence-00000002-{time_of}6Z-front-5-invalid.json").read_text())
    assert (unread["picture"], unread["shape"]) == (None, None)
    assert "it is damaged" in unread["problem"]


NV12 = np.arange(48 * 32, dtype=np.uint8).reshape(48, 32)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"pixels": pixels("bgr"), "colour": "bgr"}, pixels()),
        ({"pixels": pixels()[:, :, 0]}, pixels()[:, :, 0]),
        ({"pixels": pixels()[:, :, :1]}, pixels()[:, :, 0]),
        ({"pixels": pixels()[::2, ::-2]}, pixels()[::2, ::-2]),
        ({"pixels": np.dstack([pixels(), pixels()[:, :, :1]])}, np.dstack([pixels(), pixels()[:, :, :1]])),
        ({"pixels": np.dstack([pixels(), pixels()[:, :, :2]])}, pixels()[:, :, 0]),
        ({"pixels": NV12, "colour": "nv12-bt601"}, np.rint(to_rgb(NV12, "nv12-bt601"))),
    ],
    ids=["bgr", "grey", "one channel", "strided", "rgba", "five channels", "nv12"],
)
def test_every_colour_is_shown_as_it_is(
    tmp_path: Path, changes: dict[str, Any], expected: np.ndarray[Any, Any]
) -> None:
    with opened(tmp_path) as sink:
        sink.write(triggered(0, **changes))
    (path,) = tmp_path.glob("*.png")
    with Image.open(path) as image:
        np.testing.assert_array_equal(np.asarray(image), expected)


def test_pixels_that_are_no_picture_leave_the_record(tmp_path: Path) -> None:
    with opened(tmp_path) as sink:
        sink.write(invalid(0, pixels=np.zeros((7, 7, 7, 7), np.uint8)))
    (path,) = tmp_path.iterdir()
    written = json.loads(path.read_text())
    assert written["picture"] is None
    assert "expected shape (H, W)" in written["problem_of_picture"]


def test_only_what_is_asked_for(tmp_path: Path) -> None:
    with opened(tmp_path, "#only=accept,drop") as sink:
        for index, make in enumerate((accepted, triggered, unguarded, invalid, dropped)):
            sink.write(make(index))
    assert kept(tmp_path) == [0, 4]


def test_the_oldest_go_when_there_are_too_many_files(tmp_path: Path) -> None:
    with opened(tmp_path, "#max_files=6") as sink:
        for index in range(10):
            sink.write(triggered(index))
            assert len(list(tmp_path.iterdir())) <= 6
    assert kept(tmp_path) == [7, 8, 9]
    with opened(tmp_path, "#max_files=4") as sink:  # a second run counts what is there
        sink.write(triggered(10))
    assert kept(tmp_path) == [9, 10]


def test_the_bytes_are_bounded(tmp_path: Path) -> None:
    def size() -> int:
        return sum(path.stat().st_size for path in tmp_path.iterdir())

    with opened(tmp_path, "#max_bytes=20000") as sink:
        for index in range(100):
            sink.write(triggered(index, pixels=np.full((20, 20 + index), index, np.uint8)))
            assert size() <= 20_000
    assert kept(tmp_path) == list(range(100 - len(kept(tmp_path)), 100))
    assert size() > 15_000
    with opened(tmp_path, "#max_bytes=500") as sink, pytest.raises(SinkError, match="raise max_bytes"):
        sink.write(triggered(100))


def test_files_of_others_are_never_removed(tmp_path: Path) -> None:
    names = [
        "notes.txt",
        "evidence-1-notes.txt",
        "evidence-00000000-notes.png",
        "evidence-00000000.png",
        ".evidence.tmp",
        "frame.png",
    ]
    for name in names:
        (tmp_path / name).write_bytes(bytes(5000))
    target = tmp_path.with_name(f"{tmp_path.name}-elsewhere")
    target.write_text("not ours")
    link = tmp_path / "evidence-00000000-20261124T080000.123456Z-front-1-trigger.png"
    link.symlink_to(target)
    (tmp_path / "evidence-00000001-20261124T080000.123456Z-front-1-trigger.png").mkdir()
    with opened(tmp_path, "#max_bytes=4000&max_files=4") as sink:
        for index in range(10):
            sink.write(triggered(index))
    assert all((tmp_path / name).stat().st_size == 5000 for name in names)
    assert kept(tmp_path) == [8, 9]
    assert link.is_symlink()
    assert target.read_text() == "not ours"


def test_a_clock_that_jumps_back_does_not_make_the_new_ones_the_oldest(tmp_path: Path) -> None:
    with opened(tmp_path, "#max_files=4") as sink:
        for index, wall_ns in enumerate([2_000_000_000_000_000_000, 0, 1_000_000_000, 2_000_000_000]):
            outcome = triggered(index)
            sink.write(Outcome(outcome.frame, outcome.verdict, wall_ns=wall_ns))
    assert kept(tmp_path) == [2, 3]


def test_a_full_disk_is_an_error_and_over_when_there_is_space(small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(52_000))
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    folder = small_disk / "evidence"
    with opened(folder) as sink:
        sink.write(triggered(0, pixels=noise[:4]))
        with pytest.raises(SinkError, match="outcome lost: No space left on device; make space"):
            sink.write(triggered(1, pixels=noise))
        assert [path.suffix for path in sorted(folder.iterdir())] == [".json", ".png"]  # no half, no picture alone
        ballast.unlink()
        sink.write(triggered(20, pixels=noise))
    assert kept(folder) == [0, 20]
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            image.load()


KILLED = """
import sys
sys.path.insert(0, sys.argv[1])
from outcomes import context, triggered
from inflight_edge.sinks import make_sink
sink = make_sink(sys.argv[2])
sink.open(context())
index = 0
while True:
    sink.write(triggered(index))
    print(index, flush=True)
    index += 1
"""


def test_a_kill_leaves_whole_files_only(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", KILLED, str(Path(__file__).parents[1]), f"evidence:{tmp_path}"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(5):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        announced = int([4, *process.stdout.read().splitlines()][-1])
    assert kept(tmp_path)[: announced + 1] == list(range(announced + 1))
    for path in tmp_path.glob("*.png"):
        with Image.open(path) as image:
            image.load()
    (tmp_path / ".evidence-00000009-20261124T080000.123456Z-front-9-trigger.tmp").write_bytes(b"half")
    with opened(tmp_path):
        assert not list(tmp_path.glob(".*"))


def test_two_writers_of_one_folder_are_refused(tmp_path: Path) -> None:
    with opened(tmp_path), pytest.raises(SinkError, match="another process writes to it; give each its own folder"):
        make_sink(f"evidence:{tmp_path}").open(context())
    with opened(tmp_path):
        pass


def test_a_camera_name_cannot_leave_the_folder(tmp_path: Path) -> None:
    with opened(tmp_path / "evidence") as sink:
        sink.write(triggered(0, camera="../../etc/pass wd\n" + "x" * 100))
    assert [path.name for path in tmp_path.iterdir()] == ["evidence"]
    (path,) = (tmp_path / "evidence").glob("*.json")
    assert ".._.._etc_pass_wd_xxx" in path.name
    with opened(tmp_path / "evidence", "#max_files=2") as sink:  # still known as ours
        sink.write(triggered(1))
    assert kept(tmp_path / "evidence") == [1]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SinkError, match=r"cannot be opened: (File exists|Not a directory)"):
        make_sink(f"evidence:{tmp_path / 'file'}").open(context())


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("evidence:", "expected a folder, got none"),
        ("evidence:folder#only=", "only: expected some of accept, trigger, unguarded, invalid, drop, got "),
        ("evidence:folder#only=trigger,rubbish", "got rubbish,trigger"),
        ("evidence:folder#max_bytes=-1", "option max_bytes: expected an integer of at least 1, got '-1'"),
        ("evidence:folder#max=1", "unknown option max"),
    ],
)
def test_addresses_that_are_refused(address: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make_sink(address)
