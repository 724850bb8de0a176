"""What the pipeline's loop adds: a paced camera through threads and queues, beside bare detector calls in the same run.

    python -m benchmarks.latency.loop --json benchmarks/results/loop.json

Bare: one thread waits for the same pace and calls the detector.  Loop: captured by one thread, judged by another, handed
to a sink; ``whole`` is from the moment the source has the frame until its verdict.  Both alternate, round by round.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.latency.frame import NETWORKS, POOL, QUICK, Network, make_detector
from benchmarks.latency.timing import histogram_of
from inflight_edge.detector import Detector
from inflight_edge.environment import describe_environment
from inflight_edge.events import Context, Frame, Outcome
from inflight_edge.latency import Histogram
from inflight_edge.pipeline import Pipeline

__all__ = ["main", "measure"]

MAX_ROUND_S = 5.0
OWN_STAGES = ("preprocess", "engine", "guard")


class _Camera:
    """Stored frames at a fixed pace."""

    name, live = "camera", True

    def __init__(self, frames: NDArray[np.uint8], n_frames: int, pace_s: float) -> None:
        self._frames, self._n_frames, self._pace_s = frames, n_frames, pace_s
        self._done = 0
        self._start = 0.0

    def open(self) -> None:
        self._start = time.monotonic()

    def read(self) -> Frame | None:
        if self._done == self._n_frames:
            return None
        self._done += 1
        time.sleep(max(0.0, self._start + self._done * self._pace_s - time.monotonic()))
        return Frame(self._frames[self._done % POOL], time.monotonic_ns())

    def close(self) -> None:
        """Nothing is held."""


class _Kept:
    """A sink that keeps the latencies, not the outcomes."""

    name = "kept"

    def __init__(self) -> None:
        self.whole: list[int] = []
        self.own: list[int] = []

    def open(self, context: Context) -> None:
        """Nothing to connect to."""

    def write(self, outcome: Outcome) -> None:
        if outcome.verdict is not None:
            self.whole.append(outcome.stages["whole"])
            self.own.append(outcome.stages["whole"] - sum(outcome.stages[stage] for stage in OWN_STAGES))

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """Nothing is held."""


def measure(network: Network, *, n_frames: int, n_rounds: int, rate: float) -> dict[str, Any]:
    """Percentiles of bare calls and of the loop, and their difference, in nanoseconds.

    The engine has one thread, so that the loop's own threads have a core of two.  The pace is ``rate`` frames a second,
    or less: a frame must not wait for the one before.
    """
    rng = np.random.default_rng(0)
    channels, height, width = network.image_shape
    frames = rng.integers(0, 256, (POOL, height, width, channels), np.uint8)
    detector = make_detector(network, frames, rng, threads=1)
    sink, bare, dropped = _Kept(), [], 0
    pace_s = max(1 / rate, 4e-9 * sorted(_bare(detector, frames, 21, 1 / rate))[10])
    n_frames = min(n_frames, max(20, int(MAX_ROUND_S / pace_s)))
    for _ in range(n_rounds):
        bare += _bare(detector, frames, n_frames, pace_s)
        status = Pipeline(detector, [_Camera(frames, n_frames, pace_s)], [sink]).run()
        dropped += sum(status.dropped.values())
    figures = {name: _figures(samples) for name, samples in (("bare", bare), ("loop", sink.whole), ("own", sink.own))}
    return {
        "network": network.name,
        "rate": 1 / pace_s,
        "frames": n_frames * n_rounds,
        "dropped": dropped,
        **figures,
        "added_p50_ns": figures["loop"]["p50_ns"] - figures["bare"]["p50_ns"],
        "histograms_per_frame_ns": _cost_of_histograms(),
    }


def _bare(detector: Detector, frames: NDArray[np.uint8], n_frames: int, pace_s: float) -> list[int]:
    samples = []
    start = time.monotonic()
    for i in range(1, n_frames + 1):
        time.sleep(max(0.0, start + i * pace_s - time.monotonic()))
        before = time.monotonic_ns()
        detector(frames[i % POOL])
        samples.append(time.monotonic_ns() - before)
    return samples


def _figures(samples: list[int]) -> dict[str, float]:
    histogram = histogram_of(np.asarray(samples, np.int64))
    return {f"p{name}_ns": histogram.percentile(p) for name, p in (("50", 50.0), ("99", 99.0), ("999", 99.9))}


def _cost_of_histograms() -> float:
    """Nanoseconds of the five records that a frame makes, mean of 10000."""
    histograms = [Histogram() for _ in range(5)]
    start = time.perf_counter_ns()
    for i in range(10_000):
        for histogram in histograms:
            histogram.record(100_000 + i)
    return (time.perf_counter_ns() - start) / 10_000


def main(arguments: list[str] | None = None) -> int:
    """Measure each network; print, and write a file if asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency.loop", description=__doc__)
    parser.add_argument("--rate", type=float, default=100.0, help="frames per second (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="seconds, for tests: the figures mean nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the records")
    options = parser.parse_args(arguments)
    n_frames, n_rounds = (20, 1) if options.quick else (300, 5)
    records = [
        measure(network, n_frames=n_frames, n_rounds=n_rounds, rate=options.rate)
        for network in (QUICK if options.quick else NETWORKS)
    ]
    for record in records:
        print(
            f"{record['network']}: bare {record['bare']['p50_ns'] / 1000:.1f} us, loop {record['loop']['p50_ns'] / 1000:.1f} us, "
            f"added {record['added_p50_ns'] / 1000:.1f} us, loop's own {record['own']['p50_ns'] / 1000:.1f} us (p50); "
            f"histograms {record['histograms_per_frame_ns'] / 1000:.1f} us a frame; dropped {record['dropped']}"
        )
    if options.json is not None:
        result = {"environment": describe_environment(), "quick": options.quick, "records": records}
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
