"""Measure one setting of the paper: train or load the attacked classifier, then the library's path, no hint given; the
other defences on the same frames.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.paper.classifiers import CB_AMPLITUDE, NETWORK, SETTINGS, experiment
from benchmarks.paper.others import other_defences
from inflight_edge.calibration.attacks import ATTACKS
from inflight_edge.calibration.commands import print_figures
from inflight_edge.calibration.demo import export_program, measure
from inflight_edge.calibration.threads import torch_threads
from inflight_edge.errors import InflightError

# Every record has these; None where a defence has no such figure.
KEYS = (
    "dataset", "network", "attack", "setting", "seed", "detector", "acc", "asr", "asr_estimated", "tpr", "fpr", "sia",
    "sia_flagged", "auroc", "tpr_at_fpr01", "tpr_at_fpr05", "n_clean", "n_triggered",
)  # fmt: skip


def main() -> int:
    """Run one setting and write one record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=__doc__)
    parser.add_argument("--dataset", choices=sorted(NETWORK), required=True)
    parser.add_argument("--attack", choices=ATTACKS, default="WB")
    parser.add_argument("--setting", choices=SETTINGS, default="multi")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, required=True, help="folder with the data sets in their standard layouts")
    parser.add_argument("--runs", type=Path, help="folder that keeps trained classifiers and resumes their training")
    parser.add_argument("--json", type=Path, help="file for the record")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    options = parser.parse_args()
    try:
        with torch_threads(1 if NETWORK[options.dataset][0] == "lenet5" else None):
            records = run(options)
    except InflightError as error:
        print(f"benchmarks.paper: error: {error}", file=sys.stderr)
        return 2
    if options.json is not None:
        options.json.write_text(json.dumps(records, indent=1) + "\n")
    for record in records:
        print_figures({key: value for key, value in record.items() if value is not None and key != "recipe"})
    return 0


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The records of one setting: the guard's, then those of the other defences."""
    started = time.perf_counter()
    case = experiment(
        options.dataset,
        options.attack,
        options.setting,
        options.seed,
        data=options.data,
        runs=options.runs,
        progress=not options.quiet,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        program = export_program(case.network, case.preprocess.input_shape, folder / "classifier.pt2")
        figures = measure(
            program,
            case.preprocess,
            case.trigger,
            case.sources,
            case.defence,
            case.test,
            folder,
            started=started,
            seed=options.seed,
            progress=not options.quiet,
        )
        others = other_defences(case, program, folder / "patterns.safetensors", progress=not options.quiet)
    identity = {
        "dataset": options.dataset,
        "network": case.network_name,
        "attack": options.attack,
        "setting": options.setting,
        "seed": options.seed,
        "recipe": asdict(case.recipe),
        **({"amplitude": CB_AMPLITUDE[options.dataset]} if options.attack == "CB" else {}),
    }
    shared = {key: figures[key] for key in ("acc", "asr", "asr_estimated")}
    return [
        {**dict.fromkeys(KEYS), **identity, **shared, **figures}
        for figures in ({"detector": "guard", **figures}, *others)
    ]


if __name__ == "__main__":
    sys.exit(main())
