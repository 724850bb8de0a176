"""Measure the scorer beside its peers, the whole frame beside other defences, and how the scorer scales."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from benchmarks.latency.native import Driver
from benchmarks.latency.report import Report
from benchmarks.latency.scorer import run_scaling, run_scorer
from inflight_edge.environment import describe_environment
from inflight_edge.errors import DependencyError, InflightError

GROUPS = ("scorer", "frame", "scaling")
_BUILD = Path(__file__).parent / "build"


def main(arguments: list[str] | None = None) -> int:
    """Run the chosen groups and write one JSON file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency", description=__doc__)
    parser.add_argument("--only", choices=GROUPS, help="one group instead of all")
    parser.add_argument("--quick", action="store_true", help="seconds, for tests: the figures mean nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the records")
    parser.add_argument("--quiet", action="store_true", help="no line per record")
    options = parser.parse_args(arguments)
    try:
        result = run(options.only, quick=options.quick, quiet=options.quiet)
    except InflightError as error:
        print(f"benchmarks.latency: error: {error}", file=sys.stderr)
        return 2
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def run(only: str | None = None, *, quick: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Records and all that is needed to read them."""
    report = Report(quiet=quiet)
    groups = GROUPS if only is None else (only,)
    environment = describe_environment()
    driver = None
    try:
        driver = Driver(_BUILD)
    except DependencyError as error:
        report.skip("capi", str(error))
    # One thread each, the scorer's own number; torch has a pool of its own.
    with threadpool_limits(1), _one_torch_thread():
        if "scorer" in groups:
            run_scorer(report, driver, quick=quick)
        if "scaling" in groups:
            run_scaling(report, driver, quick=quick)
    if "frame" in groups:
        from benchmarks.latency.frame import run_frame

        run_frame(report, quick=quick)
    return {
        "environment": environment,
        "quick": quick,
        "clock_ns": None if driver is None else driver.clock_ns,
        "clock_step_ns": None if driver is None else driver.step_ns,
        "records": report.records,
        "samples": report.samples,
        "comparisons": report.comparisons,
        "histograms": report.histograms,
        "skipped": report.skipped,
        "notes": report.notes,
    }


def _one_torch_thread() -> Any:
    from inflight_edge.calibration.threads import torch_threads

    return torch_threads(1)


if __name__ == "__main__":
    sys.exit(main())
