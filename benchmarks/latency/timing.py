"""Samples of a call's duration, and the records made of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.latency.cases import Case
from inflight_edge.latency import Histogram

__all__ = ["KEYS", "Samples", "clock_cost", "histogram_of", "make_record", "time_python"]

KEYS = (
    "group", "backend", "kind", "classes", "components", "features", "batch",
    "p50_ns", "p99_ns", "p999_ns", "max_ns", "bytes", "flops",
)  # fmt: skip
Samples = NDArray[np.int64]


def time_python(call: Callable[[int], object], *, n_calls: int, seconds: float) -> Samples:
    """Nanoseconds of ``call(i)``: up to ``n_calls`` of them within about ``seconds``, at least 20, warm-up before.

    Inside each interval: the call, and one reading of the clock, whose cost (its median) is subtracted.
    """
    clock = time.perf_counter_ns
    start = clock()
    n_warm = 0
    while n_warm < 3 or (n_warm < n_calls // 10 and clock() - start < 1e8 * seconds):
        call(n_warm)
        n_warm += 1
    typical = max(1.0, (clock() - start) / n_warm)
    count = int(min(n_calls, max(20.0, 1e9 * seconds / typical)))
    samples = np.empty(count, np.int64)
    for i in range(count):
        before = clock()
        call(i)
        samples[i] = clock() - before
    return np.maximum(samples - clock_cost(), 0)


def clock_cost() -> int:
    """Median nanoseconds between two readings of Python's clock with nothing between them."""
    clock = time.perf_counter_ns
    differences = np.empty(2000, np.int64)
    for i in range(differences.size):
        before = clock()
        differences[i] = clock() - before
    return int(np.median(differences))


def make_record(group: str, backend: str, case: Case, samples: Samples) -> dict[str, Any]:
    """One record with KEYS; percentiles by nearest rank, exact."""
    ordered = np.sort(samples)
    ranks = {"p50_ns": 0.5, "p99_ns": 0.99, "p999_ns": 0.999, "max_ns": 1.0}
    figures = {
        name: int(ordered[max(0, int(np.ceil(share * ordered.size - 1e-9)) - 1)]) for name, share in ranks.items()
    }
    work = {"bytes": case.bytes, "flops": case.flops}
    return {"group": group, "backend": backend, **case.identity, **figures, **work}


def histogram_of(samples: Samples) -> Histogram:
    """Histogram of samples."""
    histogram = Histogram()
    histogram.record_all(samples.tolist())
    return histogram
