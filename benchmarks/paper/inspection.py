"""Inspections of clean and attacked LeNet-5: ``python -m benchmarks.paper.inspection --data DIR --json FILE``."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.paper.classifiers import measured_with
from benchmarks.paper.lenets import CHOSEN_ON, CONFIRMED_ON, OTHERS, Case, trained
from inflight_edge.calibration.demo import export_program
from inflight_edge.calibration.inspection import inspect
from inflight_edge.calibration.model import load_classifier
from inflight_edge.calibration.threads import torch_threads
from inflight_edge.errors import InflightError

SETS = {"chosen": CHOSEN_ON, "confirmed": CONFIRMED_ON, "others": OTHERS}


def record(case: Case, *, data: Path, runs: Path | None, method: str, progress: bool) -> dict[str, Any]:
    """Inspect one classifier: which classes are named, by what, and how long it took."""
    subject = trained(case, data=data, runs=runs, progress=progress)
    with TemporaryDirectory() as folder:
        program = export_program(subject.network, (1, 28, 28), Path(folder) / "classifier.pt2")
        classifier = load_classifier(program, image_shape=(1, 28, 28))
    started = time.process_time()
    result = inspect(classifier, subject.defence, subject.preprocess, method=method, progress=progress)
    return {
        "case": case.name,
        "targets": case.targets,
        "suspects": list(result.suspects),
        "accuracy": result.accuracy,
        "cpu_seconds": round(time.process_time() - started, 1),
        "classes": result.rows(),
        **measured_with(),
    }


def main() -> int:
    """Inspect the cases and write one list of records."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper.inspection", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with the data sets in their standard layouts")
    parser.add_argument("--runs", type=Path, help="folder that keeps trained classifiers")
    parser.add_argument("--set", choices=sorted(SETS), default="confirmed", dest="which")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--method", choices=("auto", "neural-cleanse", "perturbation"), default="auto")
    parser.add_argument("--json", type=Path, required=True, help="file for the records, rewritten after every case")
    parser.add_argument("--resume", action="store_true", help="leave out the cases whose records are in the file")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    options = parser.parse_args()
    records = json.loads(options.json.read_text()) if options.resume and options.json.exists() else []
    done = {record["case"] for record in records}
    try:
        with torch_threads(1):
            for case in SETS[options.which]:
                if options.only not in case.name or case.name in done:
                    continue
                found = record(
                    case, data=options.data, runs=options.runs, method=options.method, progress=not options.quiet
                )
                records.append(found)
                options.json.write_text(json.dumps(records, indent=1) + "\n")
                print(case.name, "targets", found["targets"], "suspects", found["suspects"], found["cpu_seconds"], "s")
    except InflightError as error:
        print(f"benchmarks.paper.inspection: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
