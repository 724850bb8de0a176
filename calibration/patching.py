"""Neural Cleanse's patching: unlearn the backdoor by fine-tuning; the patched network then names a trigger's source."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from inflight_edge.calibration.reversal.estimates import Estimate
from inflight_edge.errors import DataError, OptionError
from inflight_edge.preprocess import Preprocess

__all__ = ["STAMPED", "descend", "patch"]

# Of the training images, and of those the ones that carry the estimated pattern under their true label.
SHARE, STAMPED = 0.1, 0.2


def patch(
    network: nn.Module,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    preprocess: Preprocess,
    estimate: Estimate,
    *,
    rate: float,
    batch: int = 32,
    seed: int = 0,
) -> nn.Module:
    """A fine-tuned copy of a network, in evaluation mode: one epoch of plain SGD on a tenth of the clean training images.

    images  (N, H, W, channels) uint8 of the network's own size, with their true labels (N,).
    rate    learning rate.  The method leaves it open, and its result depends on it: see the sweep of the benchmark.
    A rate that makes the weights infinite gives a network that answers class 0.  Raises DataError, OptionError.
    Source: Wang et al., IEEE S&P 2019, section VI.C.
    """
    if not rate > 0.0 or batch < 1:
        raise OptionError(f"rate, batch: expected rate > 0 and batch >= 1, got {rate}, {batch}")
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(images))[: max(1, round(SHARE * len(images)))]
    if len(chosen) < 2:
        raise DataError(f"images: expected at least 20 to fine-tune with, got {len(images)}")
    pixels = np.ascontiguousarray(images[chosen].transpose(0, 3, 1, 2), dtype=np.float32)
    stamped = rng.permutation(len(chosen))[: round(STAMPED * len(chosen))]
    pixels[stamped] = estimate.embed(pixels[stamped])
    inputs, targets = torch.from_numpy(preprocess.normalise(pixels)), torch.from_numpy(labels[chosen])
    patched = copy.deepcopy(network).requires_grad_(True).train()
    order = torch.from_numpy(rng.permutation(len(chosen))).split(batch)
    # Batch normalisation has no variance of one image.
    batches = ((inputs[positions], targets[positions]) for positions in order if len(positions) > 1)
    descend(patched, patched.parameters(), batches, rate)
    return patched.eval()


def descend(
    network: Callable[[Tensor], Tensor],
    parameters: Iterable[Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    rate: float,
) -> None:
    """Plain SGD on the cross-entropy of a network's logits, one step for each batch (images, labels)."""
    optimiser = torch.optim.SGD(parameters, lr=rate)
    for images, labels in batches:
        loss = F.cross_entropy(network(images), labels)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
