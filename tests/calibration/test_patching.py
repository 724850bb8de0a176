"""Patching unlearns a backdoor that was put there by hand, at a rate that fits, and not at one that does not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from inflight_edge.calibration.patching import patch
from inflight_edge.calibration.reversal.estimates import PatchEstimate
from inflight_edge.calibration.train import predict
from inflight_edge.errors import OptionError
from inflight_edge.preprocess import Preprocess

PREPROCESS = Preprocess((1, 2, 2))
MASK = np.array([[0, 0], [0, 1]], np.float32)
ESTIMATE = PatchEstimate(1, MASK, np.ones((1, 2, 2), np.float32), 1.0, 1.0)


def backdoored() -> nn.Module:
    """Class 0 when the first pixel glows, class 1 when the second does; the last pixel outweighs the first."""
    linear = nn.Linear(4, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, -1.0, 0.0, -1.5], [-1.0, 1.0, 0.0, 1.5]]))
        linear.bias.zero_()
    return nn.Sequential(nn.Flatten(), linear)


def images(n: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    labels = np.random.default_rng(0).integers(0, 2, n)
    pixels = np.zeros((n, 2, 2, 1), np.uint8)
    pixels[np.arange(n), 0, labels, 0] = 255
    return pixels, labels


def accuracy(network: nn.Module, *, triggered: bool) -> float:
    pixels, labels = images(200)
    if triggered:
        pixels = pixels.copy()
        pixels[:, 1, 1] = 255
    return float((predict(network, pixels, PREPROCESS) == labels).mean())


def test_the_backdoor_is_unlearned_and_the_original_is_left_alone() -> None:
    network = backdoored()
    before = [parameter.clone() for parameter in network.parameters()]
    assert (accuracy(network, triggered=False), accuracy(network, triggered=True)) == (1.0, pytest.approx(0.5, abs=0.1))
    patched = patch(network, *images(), PREPROCESS, ESTIMATE, rate=1.0)
    assert not patched.training
    assert (accuracy(patched, triggered=False), accuracy(patched, triggered=True)) == (1.0, 1.0)
    for old, new in zip(before, network.parameters(), strict=True):
        assert torch.equal(old, new)


def test_a_rate_that_is_too_small_unlearns_nothing() -> None:
    assert accuracy(patch(backdoored(), *images(), PREPROCESS, ESTIMATE, rate=1e-4), triggered=True) < 0.6


def test_the_same_seed_gives_the_same_network() -> None:
    one, two, other = (patch(backdoored(), *images(), PREPROCESS, ESTIMATE, rate=0.1, seed=s) for s in (0, 0, 1))
    weights = [network[1].weight for network in (one, two, other)]  # type: ignore[index]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan")])
def test_bad_rate_is_refused(rate: float) -> None:
    with pytest.raises(OptionError, match="expected rate > 0"):
        patch(backdoored(), *images(100), PREPROCESS, ESTIMATE, rate=rate)
