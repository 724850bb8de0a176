"""What fp16 and int8 change, on one attacked classifier: predictions and verdicts against those of fp32.

Everything runs in ONNX Runtime on the CPU, on held-out frames; the guard of each precision is fitted to its own features.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.paper.classifiers import DATASETS, experiment
from inflight_edge._text import table
from inflight_edge.bundle import Bundle
from inflight_edge.calibration.calibrate import calibrate
from inflight_edge.calibration.datasets import ImageSet
from inflight_edge.calibration.demo import export_program
from inflight_edge.calibration.inspection import Inspection, inspect
from inflight_edge.calibration.model import load_classifier
from inflight_edge.calibration.threads import torch_threads
from inflight_edge.detector import Detector
from inflight_edge.environment import describe_environment
from inflight_edge.errors import InflightError
from inflight_edge.verdict import Decision, Verdict

__all__ = ["compare"]


def main() -> int:
    """Measure one classifier and print a row per precision."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precision", description=__doc__)
    parser.add_argument("--dataset", choices=sorted(DATASETS), required=True)
    parser.add_argument("--attack", default="WB")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, required=True, help="folder with the data sets in their standard layouts")
    parser.add_argument("--runs", type=Path, help="folder that keeps trained classifiers")
    parser.add_argument("--json", type=Path, help="file for the record")
    options = parser.parse_args()
    try:
        with torch_threads(1 if DATASETS[options.dataset].network == "lenet5" else None):
            record = _run(options)
    except InflightError as error:
        print(f"benchmarks.precision: error: {error}", file=sys.stderr)
        return 2
    if options.json is not None:
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    rows = [(name, *figures.values()) for name, figures in record["precisions"].items()]
    print(table(rows, ("precision", *next(iter(record["precisions"].values())))))
    return 0


def _run(options: argparse.Namespace) -> dict[str, Any]:
    case = experiment(
        options.dataset, options.attack, "multi", options.seed, data=options.data, runs=options.runs, progress=False
    )
    with tempfile.TemporaryDirectory() as folder:
        program = export_program(case.network, case.preprocess.input_shape, Path(folder) / "classifier.pt2")
        classifier = load_classifier(program, image_shape=case.defence.image_shape)
    inspection: Inspection = inspect(classifier, case.defence, case.preprocess, seed=options.seed, progress=False)
    suspects = inspection.suspects
    inspection = replace(inspection, suspects=(case.target,))
    names = ("fp32", "fp16", "int8")
    bundle = calibrate(classifier, case.defence, inspection, precisions=names, seed=options.seed, progress=False)
    chosen = case.test.subset(case.test.labels != case.target)
    stamped = ImageSet(case.trigger.embed(np.asarray(chosen.images)), chosen.labels, None, "triggered")
    return {
        "dataset": options.dataset,
        "network": case.network_name,
        "attack": options.attack,
        "seed": options.seed,
        "suspects": suspects,
        "environment": describe_environment(),
        **compare(bundle, case.test, stamped, case.target),
    }


def compare(bundle: Bundle, clean: ImageSet, triggered: ImageSet, target: int) -> dict[str, Any]:
    """Agreement of each precision with fp32.

    top1      share of clean frames with the same prediction.
    verdict   share with the same decision of the frames that fp32 predicts as the target, half of them triggered.
    tpr, fpr  triggered and clean frames of these that are flagged.
    """
    sets = [np.asarray(clean.images), np.asarray(triggered.images)]
    judged = {name: [Detector(bundle.at(name)).run(list(frames)) for frames in sets] for name in bundle.precisions}
    hits = [np.flatnonzero([v.predicted == target for v in verdicts]) for verdicts in judged["fp32"]]
    count = min(map(len, hits))
    picked = [hit[np.linspace(0, len(hit) - 1, count).astype(int)] for hit in hits]
    figures = {}
    for name, verdicts in judged.items():
        same = [_share(verdicts[i], judged["fp32"][i], picked[i]) for i in (0, 1)]
        flagged = [np.mean([verdicts[i][j].decision is Decision.TRIGGER for j in picked[i]]) for i in (0, 1)]
        top1 = np.mean([a.predicted == b.predicted for a, b in zip(verdicts[0], judged["fp32"][0], strict=True)])
        figures[name] = {
            "accuracy": float(np.mean([v.predicted == y for v, y in zip(verdicts[0], clean.labels, strict=True)])),
            "top1": float(top1),
            "verdict": float(np.mean(same)),
            "tpr": float(flagged[1]),
            "fpr": float(flagged[0]),
            "n_top1": len(clean),
            "n_verdict": 2 * count,
        }
    return {"precisions": figures}


def _share(got: list[Verdict], expected: list[Verdict], chosen: NDArray[np.int64]) -> float:
    """Share of the chosen frames with the same decision."""
    return float(np.mean([got[i].decision is expected[i].decision for i in chosen]))


if __name__ == "__main__":
    sys.exit(main())
