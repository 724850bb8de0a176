"""The other defences against examples that can be followed by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from inflight_edge.calibration.baselines import B3D, NeuronFilter, Strip, compare, entropy, most_changed
from inflight_edge.calibration.reversal.estimates import PatchEstimate
from inflight_edge.errors import DataError, OptionError
from inflight_edge.preprocess import Preprocess

PREPROCESS = Preprocess((1, 1, 2))


class Pair(nn.Module):
    """Two pixels in 0..1: logits (4 a, 4 b), features (a, b, 0)."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        flat = images.reshape(-1, 2)
        return 4 * flat, torch.cat([flat, torch.zeros(len(flat), 1)], dim=1)


def pixels(*rows: tuple[float, float]) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.array(rows, np.float32).reshape(-1, 1, 1, 2)


@pytest.fixture(autouse=True)
def extracted(monkeypatch: pytest.MonkeyPatch) -> None:
    def extract(classifier: Pair, frames: Any, preprocess: Preprocess) -> tuple[Any, Any]:
        logits, features = classifier(torch.from_numpy(preprocess.normalise(frames)))
        return logits.numpy(), features.numpy()

    monkeypatch.setattr("inflight_edge.calibration.baselines.extract", extract)


def softmax(a: float, b: float) -> tuple[float, float]:
    return 1 / (1 + np.exp(b - a)), 1 / (1 + np.exp(a - b))


def test_entropy_by_hand() -> None:
    np.testing.assert_allclose(entropy(np.array([[0.0, 0.0], [np.log(3.0), 0.0]])), [np.log(2), 0.5623351446])
    assert entropy(np.array([[1000.0, -1000.0]])) == [0.0]


def test_strip_is_minus_the_mean_entropy_of_half_blends() -> None:
    defence = Strip(Pair(), PREPROCESS, pixels((255, 0), (0, 255)))  # type: ignore[arg-type]
    got = defence.suspicion(pixels((255, 0), (0, 0)))
    # Blends of the first frame: (1, 0) and (.5, .5); of the second: (.5, 0) and (0, .5).  Logits are four times that.
    first = [softmax(4, 0), softmax(2, 2)]
    second = [softmax(2, 0), softmax(0, 2)]
    expected = [np.mean([sum(p * np.log(p) for p in pair) for pair in pairs]) for pairs in (first, second)]
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_b3d_is_minus_the_divergence_that_the_pattern_makes() -> None:
    mask, pattern = np.array([[0, 1]], np.float32), np.array([[[0, 1]]], np.float32)
    defence = B3D(Pair(), PREPROCESS, PatchEstimate(1, mask, pattern, 1.0, 1.0))  # type: ignore[arg-type]
    got = defence.suspicion(pixels((255, 0), (0, 255)))
    p, q = softmax(4, 0), softmax(4, 4)
    np.testing.assert_allclose(
        got, [-sum(a * np.log(a / b) for a, b in zip(p, q, strict=True)), 0.0], rtol=1e-5, atol=1e-9
    )


def test_neuron_filter_reads_what_the_pattern_excites() -> None:
    mask, pattern = np.array([[0, 1]], np.float32), np.array([[[0, 1]]], np.float32)
    estimate = PatchEstimate(1, mask, pattern, 1.0, 1.0)
    defence = NeuronFilter.fit(Pair(), PREPROCESS, estimate, pixels((255, 0), (0, 0)))  # type: ignore[arg-type]
    assert defence.neurons.tolist() == [1]
    np.testing.assert_allclose(defence.suspicion(pixels((255, 51), (0, 255))), [0.2, 1.0], rtol=1e-6)


def test_neuron_filter_above_the_target_leaves_out_what_the_target_excites_too() -> None:
    mask, pattern = np.array([[1, 1]], np.float32), np.array([[[0.5, 1]]], np.float32)
    estimate = PatchEstimate(1, mask, pattern, 1.0, 1.0)
    clean, target = pixels((0, 0), (0, 0)), pixels((0, 255), (0, 204))
    published = NeuronFilter.fit(Pair(), PREPROCESS, estimate, clean)  # type: ignore[arg-type]
    assert published.neurons.tolist() == [1]
    defence = NeuronFilter.fit(Pair(), PREPROCESS, estimate, clean, above=target)  # type: ignore[arg-type]
    assert defence.neurons.tolist() == [0]
    np.testing.assert_allclose(defence.suspicion(pixels((51, 255), (255, 0))), [0.2, 1.0], rtol=1e-6)


def test_most_changed_counts_rises_only() -> None:
    before, after = np.zeros((2, 5), np.float32), np.tile(np.array([-9, 1, 3, 2, 0], np.float32), (2, 1))
    assert most_changed(before, after, 0.4).tolist() == [2, 3]
    assert most_changed(before, after, 0.01).tolist() == [2]
    with pytest.raises(OptionError, match="share: expected 0 < share <= 1, got 0"):
        most_changed(before, after, 0)


def test_threshold_comes_from_the_defenders_frames_and_the_papers_reading_does_not() -> None:
    defence, clean = np.arange(101.0), np.arange(0.0, 200.0, 2.0)
    figures = compare(np.array([94.0, 95.0, 96.0, 300.0]), clean, defence)
    assert (figures["tpr"], figures["fpr"]) == (0.5, 52 / 100)  # threshold 95
    assert (figures["tpr_at_fpr01"], figures["tpr_at_fpr05"]) == (0.25, 0.25)
    assert figures["auroc"] == pytest.approx((47.5 + 48 + 48.5 + 100) / 400)


@pytest.mark.parametrize("wrong", [[], [np.nan]])
def test_suspicions_that_are_none_are_refused(wrong: list[float]) -> None:
    with pytest.raises(DataError, match="clean: expected finite suspicions of at least one frame"):
        compare(np.zeros(1), np.array(wrong), np.zeros(1))
