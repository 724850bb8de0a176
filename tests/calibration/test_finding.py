"""From which classes an addition is searched, and with how many images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from torch import Tensor

from inflight_edge.calibration import finding
from inflight_edge.calibration.finding import FINAL_ADDITION, Finding, Searcher
from inflight_edge.calibration.reversal.estimates import AdditionEstimate, PatchEstimate
from inflight_edge.calibration.reversal.neural_cleanse import Settings
from inflight_edge.calibration.reversal.perturbation import AdditionSettings

N_CLASSES, TARGET = 6, 5
OTHERS = tuple(range(TARGET))


def logits(images: Tensor) -> Tensor:
    """As large as the brightness of the pixel of each class: all gaps between classes are alike."""
    return 10.0 * images.flatten(1)


@pytest.mark.parametrize(
    ("near", "transfer", "searched"),
    [
        ([0, 1, 2], (), [OTHERS]),  # half of the others: an attack on all, whatever the nearest one's addition does
        ([0], (0,), [(0,)]),
        ([0], (), [(0,)]),
        ([0, 1], (0, 1), [(0,), (0, 1)]),
        ([0], (0, 3, 4), [(0,), OTHERS]),
        ([], (2,), [(0,)]),
    ],
)
def test_sources_of_an_addition(
    monkeypatch: pytest.MonkeyPatch, near: list[int], transfer: tuple[int, ...], searched: Sequence[tuple[int, ...]]
) -> None:
    """Class 0 is the nearest one in all cases; where no other is near, that may be by nature."""
    pixels = np.zeros((5 * N_CLASSES, 1, 2, 3), np.float32)
    labels = np.repeat(np.arange(N_CLASSES), 5)
    pixels.reshape(len(labels), -1)[np.arange(len(labels)), labels] = 255.0
    searcher = Searcher(logits, logits, pixels, labels, N_CLASSES, Settings(), 0, False)
    norms = np.full((N_CLASSES, N_CLASSES), 4.0)
    norms[near, TARGET] = 1.0
    norms[0, TARGET] = 0.9 if near else 3.0
    asked: list[tuple[tuple[int, ...], AdditionSettings]] = []

    def additions(
        targets: list[int], sources: list[tuple[int, ...]], settings: AdditionSettings
    ) -> list[AdditionEstimate]:
        asked.append((sources[0], settings))
        return [AdditionEstimate(targets[0], np.zeros((1, 2, 3), np.float32), 1.0, 1.0, sources[0])]

    monkeypatch.setattr(searcher, "additions", additions)
    monkeypatch.setattr(searcher, "transfer", lambda estimate: transfer)
    estimate = searcher.addition_to(TARGET, norms)
    assert [sources for sources, _ in asked] == list(searched)
    assert estimate.sources == searched[-1]
    assert all(settings == FINAL_ADDITION for sources, settings in asked if len(sources) > 1)


@pytest.mark.parametrize(("n_classes", "sources"), [(N_CLASSES, (2,)), (2, (0,))])
def test_a_told_target_that_no_search_names_gets_the_addition_of_a_named_one(
    monkeypatch: pytest.MonkeyPatch, n_classes: int, sources: tuple[int, ...]
) -> None:
    """Class 2 is the nearest to class 1; of two classes no pair is searched."""
    pixels = np.zeros((5 * n_classes, 1, 2, 3), np.float32)
    labels = np.repeat(np.arange(n_classes), 5)
    searcher = Searcher(logits, logits, pixels, labels, n_classes, Settings(), 0, False)
    norms = np.full((n_classes, n_classes), 4.0)
    norms[2 % n_classes, 1] = 3.9
    asked: list[tuple[list[int], tuple[int, ...]]] = []

    def additions(targets: list[int], by: list[tuple[int, ...]], settings: AdditionSettings) -> list[AdditionEstimate]:
        asked.append((targets, by[0]))
        nothing = np.zeros((1, 2, 3), np.float32)
        return [AdditionEstimate(t, nothing, 1.0, float(settings.success), s) for t, s in zip(targets, by, strict=True)]

    monkeypatch.setattr(searcher, "additions", additions)
    monkeypatch.setattr(searcher, "addition_norms", lambda: norms)
    monkeypatch.setattr(searcher, "perturbations", lambda _: [])
    monkeypatch.setattr(searcher, "transfer", lambda _: ())
    estimates, findings, _ = searcher.run("perturbation", (1, 1))
    assert findings == ()
    assert asked[0] == (list(range(n_classes)), searcher.others(0))
    assert asked[1:] == [([1], sources)]
    assert estimates[1].sources == sources
    assert estimates[0].sources == searcher.others(0)


def test_a_target_found_by_mask_and_addition_keeps_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Suspects are the best founded first, and the first is what the other defences are given."""
    pixels = np.zeros((5 * N_CLASSES, 1, 2, 3), np.float32)
    labels = np.repeat(np.arange(N_CLASSES), 5)
    searcher = Searcher(logits, logits, pixels, labels, N_CLASSES, Settings(), 0, False)
    mask = np.zeros((2, 3), np.float32)
    patches = [PatchEstimate(c, mask, mask[None], 9.0 if c != 4 else 0.5, 1.0) for c in range(N_CLASSES)]
    addition = AdditionEstimate(4, np.zeros((1, 2, 3), np.float32), 1.0, 1.0)
    everywhere = np.ones((N_CLASSES, N_CLASSES))
    answers = {
        "patches": patches,
        "pair_patches": [],
        "shared_patches": [],
        "single_patches": [(Finding(1, "a pair", 0.1), patches[1])],
        "addition_norms": everywhere,
        "perturbations": [
            (Finding(2, "additions", 0.01), replace(addition, target=2)),
            (Finding(4, "additions", 0.02), addition),
        ],
        "from_all": addition,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(searcher, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(finding, "pair_norms", lambda *_: everywhere)
    monkeypatch.setattr(finding, "additions_fit", lambda *_: np.ones(N_CLASSES, bool))
    estimates, findings, _ = searcher.run("auto", ())
    assert [(f.target, f.method) for f in findings] == [(4, "additions"), (1, "a pair"), (2, "additions")]
    assert estimates[4] is addition
