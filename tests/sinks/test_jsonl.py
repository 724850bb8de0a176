"""JSON lines: nothing handed over is lost, whatever happens to the process, the disk or the reader."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from outcomes import accepted, context, dropped, every_kind, triggered

from inflight_edge import OptionError, SinkError
from inflight_edge.sinks import make_sink
from inflight_edge.sinks.jsonl import JsonLinesSink
from inflight_edge.sinks.record import encode, record


def indices(*paths: Path) -> list[int]:
    """The frames of the files' lines; a line that is no JSON fails."""
    return [json.loads(line)["index"] for path in paths for line in path.read_text().splitlines()]


def write_all(sink: Any, *frames: int) -> list[int]:
    """Write these frames; returns those that the sink says are lost."""
    lost = []
    for index in frames:
        try:
            sink.write(accepted(index))
        except SinkError:
            lost.append(index)
    return lost


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "verdicts.jsonl"


@contextlib.contextmanager
def opened(address: str) -> Iterator[Any]:
    sink = make_sink(address)
    sink.open(context())
    try:
        yield sink
    finally:
        sink.close()


def test_a_line_is_the_record_and_there_before_the_next(path: Path) -> None:
    with opened(f"jsonl:{path}") as sink:
        for count, outcome in enumerate(every_kind(), 1):
            sink.write(outcome)
            lines = path.read_text().splitlines()
            assert len(lines) == count
            assert json.loads(lines[-1]) == record(outcome, context())


def test_a_second_run_appends(path: Path) -> None:
    for index in range(3):
        with opened(f"jsonl:{path}") as sink:
            sink.write(accepted(index))
    assert indices(path) == [0, 1, 2]


def test_half_a_line_is_ended_when_the_file_is_opened_again(path: Path) -> None:
    path.write_bytes(encode(accepted(0), context()) + b"\n" + encode(accepted(1), context())[:100])
    with opened(f"jsonl:{path}") as sink:
        assert path.read_bytes().endswith(b"\n")
        sink.write(accepted(2))
    lines = path.read_text().splitlines()
    assert [json.loads(line)["index"] for line in (lines[0], lines[2])] == [0, 2]
    assert len(lines) == 3


KILLED = """
import sys
sys.path.insert(0, sys.argv[1])
from outcomes import accepted, context
from inflight_edge.sinks import make_sink
sink = make_sink(sys.argv[2])
sink.open(context())
index = int(sys.argv[3])
while True:
    sink.write(accepted(index))
    print(index, flush=True)  # everything announced here must be in the files
    index += 1
"""


@pytest.mark.parametrize("options", ["", "#rotate_bytes=20000&keep=1000"], ids=["one file", "rotating"])
def test_a_killed_process_loses_nothing_that_was_written(path: Path, options: str) -> None:
    announced: list[int] = []
    for start in range(0, 4_000_000, 1_000_000):
        arguments = (str(Path(__file__).parents[1]), f"jsonl:{path}{options}", str(start))
        process = subprocess.Popen([sys.executable, "-c", KILLED, *arguments], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        announced += [int(process.stdout.readline()) for _ in range(60)]
        process.send_signal(signal.SIGKILL)
        announced += map(int, process.stdout.read().splitlines())
        process.stdout.close()
        process.wait()
    older = sorted(path.parent.glob("verdicts.jsonl.*"), key=lambda old: -int(old.suffix[1:]))
    # The kill may come between two files of a rotation, when only the old one is there.
    got = indices(*older, *[path] if path.exists() else [])
    assert got == sorted(set(got))
    assert set(announced) <= set(got)
    assert bool(older) == bool(options)


def test_rotation_bounds_the_files_and_keeps_the_newest(path: Path) -> None:
    line = len(encode(accepted(0), context())) + 1
    with opened(f"jsonl:{path}#rotate_bytes={3 * line + 50}&keep=2") as sink:
        assert write_all(sink, *range(10)) == []
        sink.flush()
    files = [path.with_name("verdicts.jsonl.2"), path.with_name("verdicts.jsonl.1"), path]
    assert [indices(file) for file in files] == [[3, 4, 5], [6, 7, 8], [9]]
    assert sorted(path.parent.iterdir()) == sorted(files)


def test_a_line_longer_than_the_limit_has_a_file_of_its_own(path: Path) -> None:
    with opened(f"jsonl:{path}#rotate_bytes=10&keep=9") as sink:
        write_all(sink, 0, 1, 2)
    assert indices(path.with_name("verdicts.jsonl.2"), path.with_name("verdicts.jsonl.1"), path) == [0, 1, 2]


def test_rotation_that_was_cut_off_goes_on_without_losing_an_old_file(path: Path) -> None:
    line = encode(accepted(0), context()) + b"\n"
    # Killed after .1 was renamed to .2 and before the file itself was.
    for name, index in ((".3", 0), (".2", 1), ("", 2)):
        path.with_name(path.name + name).write_bytes(encode(accepted(index), context()) + b"\n")
    with opened(f"jsonl:{path}#rotate_bytes={len(line)}&keep=3") as sink:
        write_all(sink, 3)
    assert [indices(path.with_name(path.name + name)) for name in (".3", ".2", ".1", "")] == [[0], [1], [2], [3]]


def test_rotation_that_fails_loses_no_line_and_is_told(path: Path) -> None:
    path.with_name("verdicts.jsonl.1").mkdir()
    (path.with_name("verdicts.jsonl.1") / "file").touch()
    with opened(f"jsonl:{path}#rotate_bytes=100&keep=1") as sink:
        assert write_all(sink, 0, 1, 2) == []
        with pytest.raises(SinkError, match=r"cannot be rotated: .*; lines go on into the same file") as raised:
            sink.flush()
        assert raised.value.lost == 0
        sink.flush()
    assert indices(path) == [0, 1, 2]


def test_a_file_that_was_moved_or_removed_is_opened_again(path: Path) -> None:
    with opened(f"jsonl:{path}") as sink:
        write_all(sink, 0)
        path.rename(path.with_name("moved"))
        sink.flush()
        write_all(sink, 1)
        path.unlink()
        sink.flush()
        write_all(sink, 2)
    assert (indices(path.with_name("moved")), indices(path)) == ([0], [2])


def test_new_file_that_is_refused_changes_nothing_of_the_old_one(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process has the path by now; lines go on into the moved file, and a cut one is taken back from its end."""
    moved = path.with_name("moved")
    with opened(f"jsonl:{path}") as sink:
        write_all(sink, 0, 1, 2)
        path.rename(moved)
        with opened(f"jsonl:{path}"):
            with pytest.raises(SinkError, match="cannot be opened again: another process writes to it"):
                sink.flush()
            real = os.write

            def cut(file: int, data: bytes) -> int:
                if len(data) < 50:
                    raise OSError(28, "No space left on device")
                return real(file, data[:-49])

            with monkeypatch.context() as patch:
                patch.setattr(os, "write", cut)
                with pytest.raises(SinkError, match="outcome lost: No space left on device"):
                    sink.write(accepted(3))
            write_all(sink, 4)
    assert indices(moved) == [0, 1, 2, 4]


def test_full_disk_is_an_error_and_over_when_there_is_space(small_disk: Path) -> None:
    path, ballast = small_disk / "verdicts.jsonl", small_disk / "ballast"
    ballast.write_bytes(bytes(50_000))
    with opened(f"jsonl:{path}") as sink:
        lost = write_all(sink, *range(60))
        assert lost
        assert lost == list(range(lost[0], 60))
        with pytest.raises(SinkError, match=r"outcome lost: No space left on device; make space"):
            sink.write(accepted(60))
        assert indices(path) == list(range(lost[0]))  # no half line either
        ballast.unlink()
        assert write_all(sink, *range(61, 70)) == []
    assert indices(path) == [*range(lost[0]), *range(61, 70)]


def test_a_line_cut_by_a_full_disk_is_taken_back(path: Path) -> None:
    """The limit falls inside a line; the system writes as much of it as fits."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with opened(f"jsonl:{path}") as sink:
        write_all(sink, 0)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 100, limits[1]))
        try:
            with pytest.raises(SinkError, match="outcome lost: File too large"):
                sink.write(accepted(1))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert indices(path) == [0]
        write_all(sink, 2)
    assert indices(path) == [0, 2]


def test_half_a_line_that_cannot_be_taken_back_is_ended(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(file: int, size: int) -> None:
        raise OSError(5, "Input/output error")

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with opened(f"jsonl:{path}") as sink:
        with monkeypatch.context() as patch:
            patch.setattr(os, "ftruncate", refused)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
            try:
                assert write_all(sink, 0) == [0]
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        write_all(sink, 1, 2)
    half, *whole = path.read_text().splitlines()
    assert len(half) == 100
    assert [json.loads(line)["index"] for line in whole] == [1, 2]


def test_standard_output_takes_lines(capfd: pytest.CaptureFixture[str]) -> None:
    print("before")
    with opened("-") as sink:
        assert sink.name == "stdout"
        sink.write(triggered(0))
        sink.write(dropped(1))
        sink.flush()
    print("after", flush=True)
    first, *lines, last = capfd.readouterr().out.splitlines()
    assert (first, last) == ("before", "after")
    assert [json.loads(line)["decision"] for line in lines] == ["trigger", None]


UNREAD = """
import sys
sys.path.insert(0, sys.argv[1])
from outcomes import accepted, context
from inflight_edge import SinkError
from inflight_edge.sinks import make_sink
sink = make_sink("-")
sink.open(context())
for index in range(3):
    try:
        sink.write(accepted(index))
    except SinkError as error:
        print(error, file=sys.stderr)
sink.flush()
sink.close()
"""


def test_a_reader_that_goes_away_is_an_error_each_time() -> None:
    arguments = [sys.executable, "-c", UNREAD, str(Path(__file__).parents[1])]
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(arguments, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert result.returncode == 0
    assert result.stderr.splitlines() == ["stdout: outcome lost: the reader is gone"] * 3


def test_a_pipe_without_a_reader_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SinkError, match="cannot be opened: No such device or address"):
        make_sink(f"jsonl:{tmp_path / 'pipe'}").open(context())


def test_a_pipe_that_is_not_read_loses_outcomes_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inflight_edge.sinks.jsonl._PATIENCE_S", 0.005)
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with opened(f"jsonl:{tmp_path / 'pipe'}") as sink:
        lost = write_all(sink, *range(300))
        assert lost
        got = b""
        with contextlib.suppress(BlockingIOError):
            while True:
                got += os.read(reader, 1 << 16)
        write_all(sink, 300)
        got += os.read(reader, 1 << 16)
    os.close(reader)
    read = []
    for line in got.decode().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            read.append(json.loads(line)["index"])
    assert read == [*range(lost[0]), 300]


def test_two_writers_of_one_file_are_refused(path: Path) -> None:
    with (
        opened(f"jsonl:{path}"),
        pytest.raises(SinkError, match="another process writes to it; give each its own file"),
    ):
        make_sink(f"jsonl:{path}").open(context())
    with opened(f"jsonl:{path}"):
        pass


@pytest.mark.parametrize("mode", ["no", "flush", "line"])
def test_what_is_synced_and_when(path: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    sync = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda file: (calls.append(file), sync(file)))
    with opened(f"jsonl:{path}#fsync={mode}") as sink:
        write_all(sink, 0, 1)
        assert len(calls) == (2 if mode == "line" else 0)
        sink.flush()
        assert len(calls) == {"no": 0, "flush": 1, "line": 2}[mode]
    assert len(calls) == {"no": 0, "flush": 2, "line": 3}[mode]


def test_a_sync_that_fails_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(file: int) -> None:
        raise OSError(5, "Input/output error")

    sink = make_sink(f"jsonl:{path}#fsync=line")
    sink.open(context())
    monkeypatch.setattr(os, "fdatasync", broken)
    with pytest.raises(SinkError, match="the last lines may not be on the disk: Input/output error"):
        sink.write(accepted(0))
    with pytest.raises(SinkError, match="may not be on the disk"):
        sink.close()
    sink.close()


@pytest.mark.parametrize(
    ("name", "message"),
    [("missing/verdicts.jsonl", "No such file or directory"), ("", "Is a directory")],
)
def test_a_path_that_cannot_be_written(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(SinkError, match=f"cannot be opened: {message}"):
        make_sink(f"jsonl:{tmp_path}/{name}").open(context())


def test_no_path_is_refused() -> None:
    with pytest.raises(OptionError, match="expected a file, got none"):
        JsonLinesSink("")
