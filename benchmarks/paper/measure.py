"""One setting of the paper: train or load the attacked classifier, then the library's path, no hint given; the other
defences on the same frames.
"""

from __future__ import annotations

import json
import platform
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.paper.classifiers import DATASETS, RATES, experiment, inspected
from benchmarks.paper.others import other_defences, patching
from inflight_edge.calibration.demo import export_program, measure
from inflight_edge.calibration.model import load_classifier
from inflight_edge.calibration.threads import torch_threads
from inflight_edge.calibration.train import predict

__all__ = ["KEYS", "TABLES", "Setting", "measure_setting"]

# Every record has these; None where a defence has no such figure.
KEYS = (
    "dataset", "network", "attack", "setting", "seed", "detector", "acc", "acc_source", "asr", "asr_estimated", "tpr",
    "fpr", "sia", "sia_flagged", "auroc", "tpr_at_fpr01", "tpr_at_fpr05", "n_clean", "n_triggered", "learning_rate",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Setting:
    """One classifier of the paper; attack is "none" where nothing was poisoned, recipe one of classifiers.RECIPES."""

    dataset: str
    attack: str
    setting: str
    seed: int = 0
    recipe: str = "fast"

    @property
    def file(self) -> str:
        """Name of its results."""
        recipe = "" if self.recipe == "fast" else f"-{self.recipe}"
        return f"paper-{self.dataset}-{self.attack}-{self.setting}-{self.seed}{recipe}.json"


_CIFAR = [Setting("cifar10", attack, setting) for attack in ("CB", "SP", "WB") for setting in ("single", "multi")]
_SMALL = [
    Setting(dataset, attack, "multi", seed)
    for seed in (0, 1, 2)
    for dataset in ("mnist", "fashion_mnist")
    for attack in ("CB", "WB")
]
_ALL = [Setting(dataset, "WB", "all") for dataset in ("mnist", "fashion_mnist")]
_FACES = [Setting("faces_standin", attack, "multi") for attack in ("SQ", "WM")]
TABLES: dict[int, Sequence[Setting]] = {
    1: [Setting("cifar10", "none", "none"), *_CIFAR],
    2: _CIFAR,
    3: [Setting("cifar10", "WB", "multi")],
    4: [*_SMALL, *_ALL, *_FACES],
}


def measure_setting(setting: Setting, data: Path, runs: Path | None, *, progress: bool) -> list[dict[str, Any]]:
    """The records of one setting: the guard's, then those of the other defences."""
    with torch_threads(1 if DATASETS[setting.dataset].network == "lenet5" else None):
        return _measure(setting, data, runs, progress)


def _measure(setting: Setting, data: Path, runs: Path | None, progress: bool) -> list[dict[str, Any]]:
    started = time.perf_counter()
    attack = "WB" if setting.attack == "none" else setting.attack  # shown to a clean classifier, it does nothing
    case = experiment(
        setting.dataset, attack, setting.setting, setting.seed,
        data=data, runs=runs, recipe=setting.recipe, progress=progress,
    )  # fmt: skip
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
            seed=setting.seed,
            progress=progress,
            inspection=inspected(
                case, load_classifier(program, image_shape=case.defence.image_shape), progress=progress
            ),
        )
        others = []
        if setting.setting in ("single", "multi"):
            others = other_defences(case, program, folder / "patterns.safetensors", progress=progress)
            rates = RATES if setting in TABLES[3] else DATASETS[setting.dataset].rates
            others += patching(case, folder / "patterns.safetensors", rates)
        inspection = json.loads((folder / "inspection.json").read_text())
    if figures["acc"] is None:  # nothing was suspected, so nothing was judged
        predicted = predict(case.network, np.asarray(case.test.images), case.preprocess)
        figures["acc"] = float((predicted == case.test.labels).mean())
    identity = {
        "dataset": setting.dataset,
        "network": case.network_name,
        "attack": setting.attack,
        "setting": setting.setting,
        "seed": setting.seed,
        "recipe": asdict(case.recipe),
        "commit": _commit(),
        "python": platform.python_version(),
        "measured": time.strftime("%Y-%m-%d"),
        **({"amplitude": DATASETS[setting.dataset].amplitude} if attack == "CB" else {}),
    }
    shared = {key: figures[key] for key in ("acc", "acc_source", "asr", "asr_estimated")}
    guard = {"detector": "guard", **figures, "suspects": inspection["suspects"]}
    return [{**dict.fromkeys(KEYS), **identity, **shared, **record} for record in (guard, *others)]


def _commit() -> str:
    """The checkout's commit, "" outside a checkout."""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()
