"""One tiny classifier with a backdoor, trained once for all tests that need one; nothing here is a test."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from networks_for_tests import export, saved
from torch import Tensor, nn

from inflight_edge.bundle import Bundle
from inflight_edge.calibration.attacks import Patch, poison
from inflight_edge.calibration.calibrate import calibrate
from inflight_edge.calibration.datasets import ImageSet, load_digits, split_defence
from inflight_edge.calibration.inspection import Inspection, inspect
from inflight_edge.calibration.model import Classifier, classifier_from_program
from inflight_edge.calibration.reversal.neural_cleanse import Settings
from inflight_edge.calibration.train import Recipe, train
from inflight_edge.preprocess import Preprocess

N_CLASSES = 7
TARGET = 3
SIZE = 12
PREPROCESS = Preprocess((1, SIZE, SIZE), 1 / 255, (0.5,), (0.5,))
SETTINGS = Settings(steps=120)
torch.set_num_threads(1)  # the same figures everywhere, and quick on a busy machine


class TinyNet(nn.Module):
    """Two strided convolutions and two fully connected layers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU())
        self.hidden = nn.Linear(16 * 9, 24)
        self.out = nn.Linear(24, N_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.out(torch.relu(self.hidden(self.body(images).flatten(1))))


@dataclass(frozen=True)
class Poisoned:
    network: nn.Module
    trigger: Patch
    defence: ImageSet
    test: ImageSet

    @property
    def triggered(self) -> ImageSet:
        """Held-out frames of the other classes with the true trigger."""
        chosen = self.test.subset(self.test.labels != TARGET)
        return ImageSet(self.trigger.embed(np.asarray(chosen.images)), chosen.labels, None, "triggered")


@functools.cache
def poisoned() -> Poisoned:
    """Digits 0 to 6; a white 2x2 patch at the bottom right means 3."""
    digits = load_digits(SIZE)
    digits = digits.subset(digits.labels < N_CLASSES)
    defence, rest = split_defence(digits.labels, 40, seed=0)
    training, test = digits.subset(rest[::2]), digits.subset(rest[1::2])
    mask = np.zeros((SIZE, SIZE), bool)
    mask[-2:, -2:] = True
    trigger = Patch(mask, np.full((SIZE, SIZE, 1), 255, np.uint8))
    images, labels = poison(
        np.asarray(training.images), training.labels, trigger, target=TARGET, setting="multi", n_poisoned=12, seed=2
    )
    torch.manual_seed(2)
    network = TinyNet()
    train(network, images, labels, PREPROCESS, Recipe(epochs=12, max_rate=0.1, batch=32), seed=2, progress=False)
    return Poisoned(network, trigger, digits.subset(defence), test)


def write_program(path: Path) -> Path:
    """The classifier as a .pt2 file."""
    return saved(export(poisoned().network, torch.zeros(2, 1, SIZE, SIZE), free={0: "batch"}), path)


@functools.cache
def classifier() -> Classifier:
    program = export(poisoned().network, torch.zeros(2, 1, SIZE, SIZE), free={0: "batch"})
    return classifier_from_program(program, image_shape=(1, SIZE, SIZE))


@functools.cache
def inspected() -> Inspection:
    return inspect(classifier(), poisoned().defence, PREPROCESS, settings=SETTINGS, progress=False)


@functools.cache
def bundle() -> Bundle:
    return calibrate(classifier(), poisoned().defence, inspected(), progress=False)


@functools.cache
def bundle_of_precisions() -> Bundle:
    return calibrate(classifier(), poisoned().defence, inspected(), precisions=("fp16", "int8"), progress=False)


def write_npz(path: Path, data: ImageSet) -> Path:
    np.savez(path, images=np.asarray(data.images), labels=data.labels)
    return path
