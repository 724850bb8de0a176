"""What a run gathers: records, comparisons, histograms, what was skipped and why."""

from __future__ import annotations

import sys
import time
from typing import Any

from benchmarks.latency.cases import Case
from benchmarks.latency.timing import Samples, histogram_of, make_record
from inflight_edge.latency import Histogram

__all__ = ["Report"]


class Report:
    """Records of a run, in the order in which they were measured."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.records: list[dict[str, Any]] = []
        self.samples: list[int] = []  # of each record
        self.histograms: list[dict[str, Any]] = []
        self.comparisons: list[dict[str, Any]] = []
        self.skipped: list[dict[str, str]] = []
        self.notes: list[str] = []
        self._quiet = quiet
        self._started = time.monotonic()

    def add(self, group: str, backend: str, case: Case, samples: Samples) -> None:
        """A record; with its histogram where it is plotted."""
        record = make_record(group, backend, case, samples)
        self._append(record, samples, keep=group in ("scorer", "verdict"))

    def add_probe(self, name: str, samples: Samples, *, n_bytes: int, flops: int) -> None:
        """A record of the machine's limits, group ``roofline``."""
        record = make_record("roofline", "capi", Case("diagonal"), samples)
        empty = dict.fromkeys(("classes", "components", "features", "batch"), 0)
        self._append({**record, "kind": name, **empty, "bytes": n_bytes, "flops": flops}, samples, keep=False)

    def add_frame(self, name: str, case: Case, samples: Samples) -> None:
        """A record of the group ``frame``: kind is ``network/defence/stage``, case describes the guard."""
        record = make_record("frame", "onnxruntime", case, samples)
        self._append({**record, "kind": name, "bytes": 0, "flops": 0}, samples, keep=True)

    def add_frame_histogram(self, name: str, case: Case, histogram: Histogram) -> None:
        """A record of the group ``frame`` whose latencies were recorded in a histogram."""
        summary = histogram.summary()
        figures = {key: round(getattr(summary, key)) for key in ("p50_ns", "p99_ns", "p999_ns", "max_ns")}
        record = {"group": "frame", "backend": "onnxruntime", **case.identity, "kind": name, **figures}
        self._keep({**record, "bytes": 0, "flops": 0}, histogram)

    def compared(self, backend: str, case: Case, error: float, tolerance: float) -> None:
        """Keep a comparison with the reference.  Raises AssertionError when it fails: a wrong answer is not timed."""
        if not error <= tolerance:
            raise AssertionError(f"{backend} {case.identity}: error {error:.2g}, allowed {tolerance:g}; not timed")
        self.comparisons.append({"backend": backend, **case.identity, "error": error, "allowed": tolerance})

    def skip(self, what: str, reason: str) -> None:
        """Something that was not measured."""
        entry = {"what": what, "reason": reason}
        if entry not in self.skipped:
            self.skipped.append(entry)

    def note(self, text: str) -> None:
        """A remark for the reader of the figures."""
        self.notes.append(text)

    def _append(self, record: dict[str, Any], samples: Samples, *, keep: bool) -> None:
        self._keep(record, histogram_of(samples), plotted=keep)

    def _keep(self, record: dict[str, Any], histogram: Histogram, *, plotted: bool = True) -> None:
        self.records.append(record)
        self.samples.append(histogram.count)
        if plotted:
            pairs = [list(pair) for pair in histogram.buckets().items()]
            self.histograms.append({"record": len(self.records) - 1, "buckets": pairs})
        if not self._quiet:
            shape = f"C={record['classes']} K={record['components']} D={record['features']} N={record['batch']}"
            took = f"{time.monotonic() - self._started:6.1f} s"
            text = f"{took}  {record['group']:8} {record['backend']:13} {record['kind']:26} {shape:26}"
            print(f"{text} p50 {record['p50_ns'] / 1000:12.3f} us  n {histogram.count}", file=sys.stderr)
