"""Latencies of millions of frames in a few kilobytes: a histogram of fixed size with logarithmic buckets."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from inflight_edge.errors import OptionError

__all__ = ["MAX_NS", "RELATIVE_ERROR", "Histogram", "Summary"]

# Each power of two is split into 2^_BITS buckets of equal width, and a bucket is read at its middle.
_BITS = 7
_SPLIT = 1 << _BITS
RELATIVE_ERROR = 0.5 / _SPLIT
# 73 minutes: longer ones are counted in the last bucket.
MAX_NS = (1 << 42) - 1
_SIZE = ((MAX_NS.bit_length() - _BITS - 1) << _BITS) + 2 * _SPLIT


@dataclass(frozen=True, slots=True)
class Summary:
    """Count of the latencies and their percentiles, in nanoseconds."""

    count: int
    p50_ns: float
    p99_ns: float
    p999_ns: float
    max_ns: int


class Histogram:
    """Latencies in nanoseconds; 36 KiB, whatever is recorded.

    A percentile is at most RELATIVE_ERROR (0.4 %) away from the recorded latency of that rank, exact below 256 ns and
    for the smallest and largest one.  Not locked: one histogram per thread, merged afterwards.

    count           latencies recorded.
    min_ns, max_ns  exact; 0 when nothing is recorded.
    """

    __slots__ = ("_counts", "count", "max_ns", "min_ns")

    def __init__(self) -> None:
        self._counts = array("q", [0]) * _SIZE
        self.count = 0
        self.min_ns = 0
        self.max_ns = 0

    def record(self, latency_ns: int) -> None:
        """Count one latency, an integer of nanoseconds >= 0.  Keeps no memory.  Raises OptionError below 0."""
        if latency_ns < 0:
            raise OptionError(f"latency: expected nanoseconds >= 0, got {latency_ns}; use a clock that never goes back")
        self._counts[_bucket(latency_ns)] += 1
        if latency_ns < self.min_ns or not self.count:
            self.min_ns = latency_ns
        if latency_ns > self.max_ns:
            self.max_ns = latency_ns
        self.count += 1

    def record_all(self, latencies_ns: Iterable[int]) -> None:
        """Count many latencies; see record."""
        for latency in latencies_ns:
            self.record(int(latency))

    def merge(self, other: Histogram) -> None:
        """Add the latencies of another histogram: the same as if they had been recorded here."""
        if not other.count:
            return
        for bucket, count in enumerate(other._counts):
            if count:
                self._counts[bucket] += count
        self.min_ns = min(self.min_ns, other.min_ns) if self.count else other.min_ns
        self.max_ns = max(self.max_ns, other.max_ns)
        self.count += other.count

    def percentile(self, percent: float) -> float:
        """Latency in nanoseconds that ``percent`` % of the recorded ones do not exceed (nearest rank).

        percent: 0 (the smallest) to 100 (the largest).  Raises OptionError for another one, or when nothing is
        recorded.
        """
        if not 0.0 <= percent <= 100.0:
            raise OptionError(f"percent: expected a number from 0 to 100, got {percent}")
        if not self.count:
            raise OptionError("percentile: expected recorded latencies, got none; record some first")
        # 99.9 % of 1000 is 999.0000000000001 in floating point, and its ceiling one rank too far.
        rank = max(1, math.ceil(percent * self.count / 100.0 - 1e-9 * self.count))
        if rank >= self.count:
            return float(self.max_ns)
        if rank == 1:
            return float(self.min_ns)
        seen = 0
        for bucket, count in enumerate(self._counts):
            seen += count
            if seen >= rank:
                low, width = _bounds(bucket)
                return min(max(low + 0.5 * (width - 1), float(self.min_ns)), float(self.max_ns))
        raise AssertionError("the counts of the buckets do not add up to the count")

    def summary(self) -> Summary:
        """The percentiles that this project reports.  Raises OptionError when nothing is recorded."""
        p50, p99, p999 = (self.percentile(percent) for percent in (50.0, 99.0, 99.9))
        return Summary(self.count, p50, p99, p999, self.max_ns)

    def buckets(self) -> Mapping[int, int]:
        """Counts by the smallest latency of the bucket, ascending, empty buckets left out."""
        return {_bounds(bucket)[0]: count for bucket, count in enumerate(self._counts) if count}


def _bucket(latency_ns: int) -> int:
    """Bucket of a latency: itself below 2 * _SPLIT, then _SPLIT buckets for each power of two."""
    if latency_ns > MAX_NS:
        return _SIZE - 1
    shift = latency_ns.bit_length() - _BITS - 1
    return latency_ns if shift <= 0 else (shift << _BITS) + (latency_ns >> shift)


def _bounds(bucket: int) -> tuple[int, int]:
    """Smallest latency of a bucket and the number of integers in it."""
    shift = max(0, (bucket >> _BITS) - 1)
    return (bucket - (shift << _BITS)) << shift, 1 << shift
