"""Throughput and latency of a served bundle against batch size: ``python -m benchmarks.serving --url URL BUNDLE``.

The frames of the bundle's self-test in turn, on loopback unless the URL says otherwise; every answer is compared with the
local detector's.  A bounded number of requests for each batch size, by clients that each wait for their answer.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from inflight_edge import Detector, InflightError, Verdict
from inflight_edge._text import table
from inflight_edge.environment import describe_environment
from inflight_edge.latency import Histogram
from inflight_edge.serving import RemoteDetector


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a table, and write the records."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="inflight")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--requests", type=int, default=400, help="for each batch size")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    try:
        records = [measure(options, batch) for batch in options.batches]
    except InflightError as error:
        print(f"benchmarks.serving: error: {error}", file=sys.stderr)
        return 2
    rows = [
        (
            r["batch"],
            r["clients"],
            f"{r['frames_per_s']:.0f}",
            *(f"{r[k] / 1e6:.2f}" for k in ("p50_ns", "p99_ns", "max_ns")),
        )
        for r in records
    ]
    print(table(rows, ("batch", "clients", "frames/s", "p50 ms", "p99 ms", "max ms")))
    if options.json is not None:
        report = {"environment": describe_environment(), "url": options.url, "model": options.model, "records": records}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def measure(options: argparse.Namespace, batch: int) -> dict[str, Any]:
    """One batch size; raises InflightError when an answer differs from the local detector's."""
    local = Detector.load(options.bundle)
    stored = list(local.bundle.self_test.frames)
    frames = [stored[i % len(stored)] for i in range(batch)]
    want = [_say(verdict) for verdict in local.run(frames)]
    remote = RemoteDetector(options.url, model=options.model, timeout=60)
    each = max(1, options.requests // options.clients)

    def client(_: int) -> Histogram:
        latencies = Histogram()
        for _ in range(each):
            start = time.perf_counter_ns()
            got = remote.run(frames, batch_size=batch)
            latencies.record(time.perf_counter_ns() - start)
            if [_say(verdict) for verdict in got] != want:
                reason = next((verdict.reason for verdict in got if verdict.reason), "a verdict differs")
                raise InflightError(f"{options.url}: wrong answer: {reason}")
        return latencies

    remote.run(frames, batch_size=batch)
    started = time.perf_counter()
    total = Histogram()
    with ThreadPoolExecutor(options.clients) as pool:
        for latencies in pool.map(client, range(options.clients)):
            total.merge(latencies)
    seconds = time.perf_counter() - started
    summary = total.summary()
    return {
        "batch": batch,
        "clients": options.clients,
        "requests": summary.count,
        "frames_per_s": summary.count * batch / seconds,
        "p50_ns": summary.p50_ns,
        "p99_ns": summary.p99_ns,
        "p999_ns": summary.p999_ns,
        "max_ns": summary.max_ns,
    }


def _say(verdict: Verdict) -> tuple[str, int | None]:
    return verdict.decision.value, verdict.source


if __name__ == "__main__":
    sys.exit(main())
