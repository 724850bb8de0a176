"""One setting of the paper: train or load the attacked classifier, then the library's path, no hint given; the other
defences on the same frames.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.paper.classifiers import DATASETS, RATES, Experiment, experiment, identity, inspected
from benchmarks.paper.others import other_defences, patching
from inflight_edge.bundle import read_bundle
from inflight_edge.calibration.demo import export_program, measure
from inflight_edge.calibration.inspection import Inspection
from inflight_edge.calibration.model import load_classifier
from inflight_edge.calibration.samples import FEW_IMAGES, are_few
from inflight_edge.calibration.threads import torch_threads
from inflight_edge.calibration.train import predict
from inflight_edge.errors import ModelError

__all__ = ["KEYS", "PARTS", "TABLES", "Setting", "measure_setting", "missing", "part"]

PARTS = ("guard", "unlearned", "defences", "patching")

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


def part(record: dict[str, Any]) -> str:
    """Of which of PARTS a record is."""
    if record["detector"] in ("guard", "unlearned"):
        return str(record["detector"])
    return "defences" if record.get("learning_rate") is None else "patching"


def missing(setting: Setting, records: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """What of PARTS a setting has and these records lack; where they name no class there is nothing but the guard."""
    guards = [record for record in records if record["detector"] == "guard"]
    wanted = ["guard"]
    if not guards or guards[0]["suspects"]:
        wanted += ["unlearned"] if DATASETS[setting.dataset].per_class >= FEW_IMAGES else []
        wanted += ["defences", "patching"] if setting.setting in ("single", "multi") else []
    have = {part(record) for record in records}
    return tuple(name for name in PARTS if name in wanted and name not in have)


def measure_setting(
    setting: Setting,
    data: Path,
    runs: Path | None,
    *,
    progress: bool,
    only: Sequence[str] = PARTS,
    known: Sequence[dict[str, Any]] = (),
) -> list[dict[str, Any]]:
    """The records of one setting: the guard's, then those of the other defences.

    only   what of PARTS is measured; of the rest the known records stay, the guard's must be among them.
    """
    with torch_threads(1 if DATASETS[setting.dataset].network == "lenet5" else None):
        return _measure(setting, data, runs, progress, only, known)


def _measure(
    setting: Setting,
    data: Path,
    runs: Path | None,
    progress: bool,
    only: Sequence[str],
    known: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
    started = time.perf_counter()
    attack = "WB" if setting.attack == "none" else setting.attack  # shown to a clean classifier, it does nothing
    case = experiment(
        setting.dataset, attack, setting.setting, setting.seed,
        data=data, runs=runs, recipe=setting.recipe, progress=progress,
    )  # fmt: skip
    new: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        program = export_program(case.network, case.preprocess.input_shape, Path(name, "classifier.pt2"))
        classifier = load_classifier(program, image_shape=case.defence.image_shape)
        inspection = inspected(case, classifier, progress=progress)
        if "guard" in only:
            figures = _guard(case, program, inspection, started, progress)
            found = {"suspects": list(inspection.suspects), "findings": [asdict(f) for f in inspection.findings]}
            new.append({"detector": "guard", **figures, **found})
        else:
            figures = next(record for record in known if record["detector"] == "guard")
        if inspection.suspects and "unlearned" in only and not are_few(case.defence.labels):
            try:
                of_copy = _guard(case, program, inspection, time.perf_counter(), progress, unlearn="always")
                new.append({"detector": "unlearned", **of_copy})
            except ModelError as error:  # what is measured stays
                print(f"no copy: {error}", file=sys.stderr)
        if setting.setting in ("single", "multi") and "defences" in only:
            new += other_defences(case, program, inspection, progress=progress)
    if setting.setting in ("single", "multi") and "patching" in only:
        swept = (setting.dataset, setting.attack, setting.setting) in {
            (s.dataset, s.attack, s.setting) for s in TABLES[3]
        }
        new += patching(case, inspection, RATES if swept else DATASETS[setting.dataset].rates)
    shared = {key: figures[key] for key in ("acc", "acc_source", "asr", "asr_estimated")}
    records = [{**dict.fromkeys(KEYS), **identity(case), **shared, **record} for record in new]
    records += [record for record in known if part(record) not in only]
    return sorted(records, key=lambda record: PARTS.index(part(record)))


def _guard(
    case: Experiment, program: Path, inspection: Inspection, started: float, progress: bool, *, unlearn: str = "never"
) -> dict[str, Any]:
    """Figures of the guard; where nothing is suspected, so that nothing is judged, the accuracy alone.

    ``held_out`` of an unlearned copy: the errors without it and with it, by which ``--unlearn`` tells whether to join it.
    """
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(
            program, case.preprocess, case.trigger, case.sources, case.defence, case.test, Path(folder),
            started=started, seed=case.seed, progress=progress, inspection=inspection, unlearn=unlearn,
        )  # fmt: skip
        if unlearn != "never":
            gain = read_bundle(Path(folder, "bundle")).metrics["unlearned"]
            figures["held_out"] = {name: gain[name] for name in ("held_out_images", "without", "with")}
    if figures["acc"] is None:
        predicted = predict(case.network, np.asarray(case.test.images), case.preprocess)
        figures["acc"] = float((predicted == case.test.labels).mean())
    return figures
