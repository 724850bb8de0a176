"""Histogram: percentiles within the stated error, fixed size, merging equals recording."""

from __future__ import annotations

import math
import sys
import tracemalloc
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inflight_edge.errors import OptionError
from inflight_edge.latency import _SIZE, MAX_NS, RELATIVE_ERROR, Histogram, Summary, _bounds, _bucket

LATENCIES = st.lists(st.integers(0, MAX_NS), min_size=1, max_size=200)


def filled(latencies: list[int]) -> Histogram:
    histogram = Histogram()
    histogram.record_all(latencies)
    return histogram


def nearest_rank(latencies: list[int], percent: float) -> int:
    """Definition: the smallest recorded latency that at least that share does not exceed."""
    rank = max(1, math.ceil(round(percent * len(latencies) / 100, 6)))
    return sorted(latencies)[rank - 1]


@settings(max_examples=200, deadline=None)
@given(LATENCIES, st.sampled_from([0.0, 1.0, 25.0, 50.0, 90.0, 99.0, 99.9, 100.0]))
def test_percentile_is_within_the_stated_error(latencies: list[int], percent: float) -> None:
    expected = nearest_rank(latencies, percent)
    assert abs(filled(latencies).percentile(percent) - expected) <= RELATIVE_ERROR * expected


@pytest.mark.parametrize("sigma", [0.05, 1.0, 3.0])
def test_percentiles_of_a_large_sample(sigma: float) -> None:
    rng = np.random.default_rng(1)
    latencies = [int(value) for value in rng.lognormal(9.0, sigma, 50_000)]
    histogram = filled(latencies)
    for percent in (0.1, 50.0, 99.0, 99.9):
        expected = nearest_rank(latencies, percent)
        assert abs(histogram.percentile(percent) - expected) <= RELATIVE_ERROR * expected


def test_small_latencies_are_exact() -> None:
    histogram = filled(list(range(256)))
    assert [histogram.percentile(100 * (i + 1) / 256) for i in range(256)] == list(range(256))


def test_summary_of_a_thousand() -> None:
    histogram = filled(list(range(1, 1001)))
    summary = histogram.summary()
    assert (summary.count, summary.max_ns) == (1000, 1000)
    assert summary == Summary(1000, 500.5, summary.p99_ns, summary.p999_ns, 1000)
    assert (summary.p99_ns, summary.p999_ns) == (pytest.approx(990, rel=0.004), pytest.approx(999, rel=0.004))


@settings(max_examples=100, deadline=None)
@given(LATENCIES, st.lists(st.integers(0, MAX_NS), max_size=50))
def test_merging_equals_recording(one: list[int], two: list[int]) -> None:
    merged, empty = filled(one), Histogram()
    merged.merge(filled(two))
    empty.merge(merged)
    together = filled(one + two)
    for histogram in (merged, empty):
        assert histogram.buckets() == together.buckets()
        assert (histogram.count, histogram.min_ns, histogram.max_ns) == (
            together.count,
            together.min_ns,
            together.max_ns,
        )


def test_buckets_follow_each_other_without_gap() -> None:
    expected = 0
    for bucket in range(_SIZE):
        low, width = _bounds(bucket)
        assert low == expected
        assert _bucket(low) == _bucket(low + width - 1) == bucket
        assert width == 1 or (width - 1) / 2 <= RELATIVE_ERROR * low
        expected = low + width
    assert expected == MAX_NS + 1


def test_longer_than_the_range_is_counted_in_the_last_bucket() -> None:
    histogram = filled([10, MAX_NS + 1, 10 * MAX_NS])
    assert histogram.buckets() == {10: 1, _bounds(_SIZE - 1)[0]: 2}
    assert histogram.percentile(100) == 10 * MAX_NS


def memory_of_records() -> tuple[int, int, int, int]:
    """Bytes kept and at most held while 20,000 latencies are recorded; the size of the counts before and after."""
    histogram, latency = Histogram(), 123_456_789
    size = sys.getsizeof(histogram._counts)
    for _ in range(1000):
        histogram.record(latency)
    tracemalloc.start()
    try:
        for _ in range(20_000):
            histogram.record(latency)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return kept, peak, size, sys.getsizeof(histogram._counts)


def test_recording_keeps_no_memory() -> None:
    """In a process of its own: what other tests' threads allocate meanwhile is counted too."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        kept, peak, before, after = pool.submit(memory_of_records).result()
    assert kept < 200  # the integers `count` and the loop's own
    assert peak < 1000
    assert after == before < 37 * 1024


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda h: h.record(-1), "latency: expected nanoseconds >= 0, got -1; use a clock that never goes back"),
        (lambda h: h.percentile(50), "percentile: expected recorded latencies, got none; record some first"),
        (lambda h: h.percentile(101), "percent: expected a number from 0 to 100, got 101"),
        (lambda h: h.percentile(math.nan), "percent: expected a number from 0 to 100, got nan"),
    ],
)
def test_errors(call: object, message: str) -> None:
    histogram = Histogram()
    with pytest.raises(OptionError) as caught:
        call(histogram)  # type: ignore[operator]
    assert str(caught.value) == message
    assert (histogram.count, histogram.buckets()) == (0, {})
