"""Long runs and sudden ends: bounded memory, no drift, and nothing lost before a kill."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bundles import CLEAN_WEST, TRIGGERED_NORTH
from pipelines import ListSink, ListSource, stub_detector

from inflight_edge import Frame, Outcome, Pipeline
from inflight_edge.actions import AlarmRule

TESTS = Path(__file__).parent
FRAMES = [CLEAN_WEST, TRIGGERED_NORTH]


class Counting(ListSink):
    """Keeps nothing but how far it is, and every so often what ``probe`` says."""

    def __init__(self, every: int, probe: object = None) -> None:
        super().__init__()
        self.every, self.probe = every, probe
        self.n = 0
        self.probes: list[int] = []

    def write(self, outcome: Outcome) -> None:
        assert outcome.frame.index == self.n
        self.n += 1
        if self.n % self.every == 0 and callable(self.probe):
            self.probes.append(self.probe())


class Camera:
    """Camera of 30 frames a second whose time runs ``speed`` times faster than ours."""

    name, live = "camera", True

    def __init__(self, n_frames: int, speed: float) -> None:
        self._frames = iter(range(n_frames))
        self._period_s = 1 / 30 / speed
        self._start = 0.0

    def open(self) -> None:
        self._start = time.monotonic()

    def read(self) -> Frame | None:
        i = next(self._frames, None)
        if i is None:
            return None
        time.sleep(max(0.0, self._start + i * self._period_s - time.monotonic()))
        return Frame(FRAMES[i % 2], time.monotonic_ns())

    def close(self) -> None:
        """Nothing is held."""


def file(n_frames: int) -> Iterator[object]:
    return (FRAMES[i % 2] for i in range(n_frames))


@pytest.fixture
def _only_new_objects() -> Iterator[None]:
    """What the process of all tests holds already is left out of collections, which then hold up no frames."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def blocks() -> int:
    """How many blocks of memory Python has given out."""
    gc.collect()
    return sys.getallocatedblocks()


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.usefixtures("_only_new_objects")
def test_twenty_thousand_frames_keep_no_memory() -> None:
    sink = Counting(4000, blocks)
    before = resident()
    status = Pipeline(stub_detector(), [ListSource(file(20_000))], [sink], sink_queue=16, alarm=AlarmRule(1, 2)).run()
    assert status.judged == {"list": 20_000}
    # What waits in the queues differs from probe to probe; one object kept of each frame would be 16,000 blocks.
    assert max(sink.probes[1:]) - min(sink.probes[1:]) < 3000, sink.probes
    assert resident() - before < 8 << 20


@pytest.mark.slow
def test_million_frames_keep_no_memory() -> None:
    sink = Counting(100_000, resident)
    started = time.monotonic()
    status = Pipeline(stub_detector(), [ListSource(file(1_000_000))], [sink], batch=4).run()
    print(f"1,000,000 frames in {time.monotonic() - started:.0f} s; resident MB {[p >> 20 for p in sink.probes]}")
    assert status.judged == {"list": 1_000_000}
    assert max(sink.probes[1:]) - sink.probes[1] < 4 << 20, sink.probes


def hour(n_frames: int, speed: float, memory: Callable[[], int], most_growth: int) -> None:
    """Frames at 30 a second of simulated time: all judged in turn, the last ones as soon as the first ones."""
    waits = array("q")  # a list would keep an object of each of the 2000 that are counted below

    class Timing(Counting):
        def write(self, outcome: Outcome) -> None:
            super().write(outcome)
            assert outcome.verdict is not None, outcome.drop
            if self.n <= 1000 or self.n > n_frames - 1000:
                waits.append(outcome.stages["whole"])

    sink = Timing(n_frames // 5, memory)
    # A camera that waits where ours would drop: a busy machine holds up so many frames a second now and then.
    status = Pipeline(stub_detector(), [Camera(n_frames, speed)], [sink], keep="all", queue=50).run()
    assert (status.judged, status.dropped) == ({"camera": n_frames}, {})
    assert not any(status.lost.values())
    first, last = sorted(waits[:1000])[500], sorted(waits[1000:])[500]
    print(f"{n_frames} frames: whole p50 of the first 1000 {first / 1000:.0f} us, of the last {last / 1000:.0f} us")
    assert last < 2 * first + 2_000_000, "the frames wait longer and longer"
    assert max(sink.probes[1:]) - sink.probes[1] < most_growth, sink.probes


@pytest.mark.usefixtures("_only_new_objects")
def test_two_minutes_of_thirty_frames_a_second_do_not_drift() -> None:
    # Blocks, since the process of all tests grows by some megabytes by itself; an object kept of each frame is 2,160.
    hour(3600, 40.0, blocks, 1000)


@pytest.mark.slow
def test_hour_of_thirty_frames_a_second_does_not_drift() -> None:
    hour(108_000, 60.0, resident, 4 << 20)


def test_hundred_kills_lose_nothing_that_a_sink_had_taken(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", TESTS / "kill_program.py", tmp_path, "100", "6"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    n_kills, n_told = map(int, done.stdout.split())
    assert n_kills == 100
    assert n_told > 1000
