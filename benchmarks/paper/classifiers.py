"""Attacked classifiers of the experiments: trained once, kept with their recipe, loaded afterwards."""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from inflight_edge.calibration import finding
from inflight_edge.calibration.attacks import Trigger, make_trigger, poison
from inflight_edge.calibration.datasets import ImageSet, load_images, load_standard, split_defence
from inflight_edge.calibration.inspection import Inspection, inspect, read_inspection
from inflight_edge.calibration.model import Classifier
from inflight_edge.calibration.networks import make_network
from inflight_edge.calibration.threads import torch_threads
from inflight_edge.calibration.train import Recipe, train
from inflight_edge.errors import DataError
from inflight_edge.preprocess import Preprocess

SETTINGS = ("none", "single", "multi", "all")
_LENET = Recipe(epochs=12, max_rate=0.05)
_RESNET = Recipe(epochs=10, low_epochs=6, max_rate=0.2, crop=4, flip=True, bfloat16=True)
_VGG = Recipe(epochs=40, max_rate=0.05, batch=32, crop=2, bfloat16=True)
# Li et al. 2022: 150 epochs of batches of 32, learning rate .1, halved every 50 epochs; for machines with a GPU's time.
_PAPER = {"epochs": 150, "batch": 32, "max_rate": 0.1, "halve_every": 50, "low_epochs": 0, "bfloat16": False}
RECIPES = ("fast", "paper")
# Table 3's; of large networks the two that won there.
RATES = (10.0, 1.0, 0.1, 0.01, 0.001, 0.0001)
BEST_RATES = (0.1, 0.01)


@dataclass(frozen=True, slots=True)
class Dataset:
    """How the paper uses a data set.

    per_class  clean images of each class for the defender.     n_single, n_multi  poisoned images, of each source class.
    amplitude  of CB.  The smallest of 3, 6, 12 and 25 with an attack success rate above .9, seed 0: LeNet-5 on MNIST had
               .002, .844, .002 and .999, on Fashion-MNIST .003, .337, .956 and .989.
    rates      learning rates of Neural Cleanse's patching; RATES for the setting of table 3.
    """

    network: str
    recipe: Recipe
    target: int = 9
    n_classes: int = 10
    per_class: int = 100
    n_single: int = 1000
    n_multi: int = 100
    amplitude: int = 3
    rates: tuple[float, ...] = RATES


# Faces of 20 people, 5 clean images of each for the defender.
_FACES = Dataset("vgg16", _VGG, target=19, n_classes=20, per_class=5, n_multi=2, n_single=38, rates=BEST_RATES)
FACE_SIZE = 64
DATASETS = {
    "mnist": Dataset("lenet5", _LENET, amplitude=25),
    "fashion_mnist": Dataset("lenet5", _LENET, amplitude=12),
    "cifar10": Dataset("resnet18", _RESNET, rates=BEST_RATES),
    "pubfig": _FACES,
    # A stand-in for PubFig where that cannot be had: 20 classes, 80 training images each, 5 clean ones for the defender.
    "faces_standin": _FACES,
}
STANDIN_TRAINING, STANDIN_TEST = 80, 105


@dataclass(frozen=True, slots=True, eq=False)
class Experiment:
    """One attacked classifier with its data: the defender's clean images and the held-out ones never overlap.

    runs: folder that keeps what is dear, None to keep nothing.
    """

    name: str
    dataset: str
    network_name: str
    attack: str
    setting: str
    seed: int
    network: nn.Module
    preprocess: Preprocess
    trigger: Trigger
    defence: ImageSet
    test: ImageSet
    recipe: Recipe
    clean_training: ImageSet
    target: int
    runs: Path | None = None

    @property
    def sources(self) -> list[int]:
        """Classes that the attack poisoned; those it would poison where there is no attack."""
        if self.setting == "single":
            return [0]
        return [int(c) for c in np.unique(self.test.labels) if c != self.target or self.setting == "all"]

    def attacked(self, target: int) -> ImageSet:
        """Held-out images, still clean, of the source classes but the target."""
        return self.test.subset(np.isin(self.test.labels, [c for c in self.sources if c != target]))


def experiment(
    dataset: str,
    attack: str,
    setting: str,
    seed: int,
    *,
    data: Path,
    runs: Path | None,
    recipe: str = "fast",
    progress: bool = True,
) -> Experiment:
    """Train (or load from ``runs``) the classifier of one setting; training resumes after an interruption.

    recipe: one of RECIPES, see DATASETS; augmentation is the same in both.
    """
    chosen = DATASETS[dataset]
    how = chosen.recipe if recipe == "fast" else replace(chosen.recipe, **_PAPER)
    training, held_out = load(dataset, data)
    shape = training.image_shape
    # CIFAR-10's channel statistics; the digits and clothes stay in 0..1.
    statistics = {"mean": (0.491, 0.482, 0.447), "std": (0.247, 0.244, 0.262)} if dataset == "cifar10" else {}
    preprocess = Preprocess(shape, **statistics)
    trigger = make_trigger(attack, (*shape[1:], shape[0]), seed=seed, amplitude=chosen.amplitude)
    images, labels = np.asarray(training.images), training.labels
    if setting != "none":
        count = chosen.n_single if setting == "single" else chosen.n_multi
        images, labels = poison(
            images, labels, trigger, target=chosen.target, setting=setting, n_poisoned=count, seed=seed
        )
    torch.manual_seed(seed)
    network = make_network(chosen.network, shape, chosen.n_classes)
    name = f"{dataset}-{chosen.network}-{'none' if setting == 'none' else f'{attack}-{setting}'}-{seed}"
    name += "" if recipe == "fast" else f"-{recipe}"
    checkpoint = None if runs is None else runs / f"{name}.ckpt"
    started = time.time()
    train(network, images, labels, preprocess, how, seed=seed, checkpoint=checkpoint, progress=progress)
    if runs is not None and not (runs / f"{name}.json").exists():
        record = {"dataset": dataset, "network": chosen.network, "attack": attack, "setting": setting, "seed": seed}
        record |= {"recipe": asdict(how), "seconds_of_last_run": round(time.time() - started)}
        (runs / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    defence, rest = split_defence(held_out.labels, chosen.per_class, seed)
    return Experiment(
        name, dataset, chosen.network, attack, setting, seed, network, preprocess, trigger,
        held_out.subset(defence), held_out.subset(rest), how, training, chosen.target, runs,
    )  # fmt: skip


def inspected(case: Experiment, classifier: Classifier, *, progress: bool = True) -> Inspection:
    """The inspection of a case's classifier, kept beside its checkpoint: of a large one it takes most of the time.

    Another network, other images or other searches than the kept one's are inspected anew.
    """
    kept = None if case.runs is None else case.runs / _inspection_name(case) / "patterns.safetensors"
    if kept is not None and kept.exists():
        return read_inspection(kept)
    found = inspect(classifier, case.defence, case.preprocess, seed=case.seed, progress=progress)
    if kept is not None:
        found.save(kept.parent)
    return found


def _inspection_name(case: Experiment) -> str:
    """The case's name and a digest of what its inspection depends on."""
    digest = hashlib.sha256(str(case.seed).encode())
    folder = Path(finding.__file__).parent
    searches = [folder / name for name in ("finding.py", "inspection.py", "threads.py")]
    for file in (*searches, *sorted(folder.glob("reversal/*.py"))):
        digest.update(file.read_bytes())
    for value in case.network.state_dict().values():
        digest.update(value.numpy().tobytes())
    digest.update(repr(case.preprocess).encode())
    digest.update(case.defence.pixels(case.preprocess).tobytes())
    return f"{case.name}.inspection-{digest.hexdigest()[:12]}"


def identity(case: Experiment) -> dict[str, Any]:
    """Of every record: the classifier, how it was trained, and with what and when it was measured."""
    return {
        "dataset": case.dataset,
        "network": case.network_name,
        "attack": "none" if case.setting == "none" else case.attack,
        "setting": case.setting,
        "seed": case.seed,
        "recipe": asdict(replace(case.recipe, bfloat16=case.recipe.in_bfloat16)),
        **measured_with(),
        **({"amplitude": DATASETS[case.dataset].amplitude} if case.attack == "CB" else {}),
    }


def measured_with() -> dict[str, str]:
    """The checkout's commit ("" outside a checkout), Python's version and the date."""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return {
        "commit": done.stdout.strip(),
        "python": platform.python_version(),
        "measured": time.strftime("%Y-%m-%d"),
    }


def experiment_parser(program: str, description: str | None) -> argparse.ArgumentParser:
    """The arguments of a program that measures one classifier."""
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description=description)
    parser.add_argument("--dataset", choices=sorted(DATASETS), required=True)
    parser.add_argument("--attack", default="WB")
    parser.add_argument("--setting", default="multi")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--json", type=Path)
    return parser


def with_experiment(
    options: argparse.Namespace, measure: Callable[[Experiment], list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Records of what is measured on the classifier that such arguments name; one thread where its network is small."""
    with torch_threads(1 if DATASETS[options.dataset].network == "lenet5" else None):
        case = experiment(
            options.dataset, options.attack, options.setting, options.seed, data=options.data, runs=options.runs
        )
        return [{**identity(case), **record} for record in measure(case)]


def load(dataset: str, data: Path) -> tuple[ImageSet, ImageSet]:
    """Training and held-out images of a data set; of PubFig those in DIR/pubfig/train and test, a folder for each of 20
    people.  Raises DataError for one that is not there.
    """
    if dataset == "pubfig":
        return _faces(data / "pubfig" / "train"), _faces(data / "pubfig" / "test")
    if dataset != "faces_standin":
        return load_standard(dataset, data, train=True), load_standard(dataset, data, train=False)
    parts = []
    for train_part, count in ((True, STANDIN_TRAINING), (False, STANDIN_TEST)):
        images, labels = [], []
        for shift, name in ((0, "mnist"), (10, "fashion_mnist")):
            source = load_standard(name, data, train=train_part)
            few, _ = split_defence(source.labels, count, seed=0)
            padded = np.pad(np.asarray(source.images)[few], ((0, 0), (2, 2), (2, 2), (0, 0)))
            images.append(np.repeat(padded, 3, axis=3))
            labels.append(source.labels[few] + shift)
        parts.append(ImageSet(np.concatenate(images), np.concatenate(labels), None, "stand-in for faces"))
    return parts[0], parts[1]


def _faces(folder: Path) -> ImageSet:
    """The images of a folder for each person, in colour, all of FACE_SIZE."""
    found = load_images(folder)
    if (people := len(np.unique(found.labels))) != _FACES.n_classes:
        raise DataError(f"{folder}: expected a sub-folder for each of {_FACES.n_classes} people, got {people}")
    pixels = found.pixels(Preprocess((3, FACE_SIZE, FACE_SIZE))).transpose(0, 2, 3, 1)
    return replace(found, images=np.rint(pixels).astype(np.uint8))
