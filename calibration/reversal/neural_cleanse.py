"""Neural Cleanse: for every class, the smallest patch that sends all other classes there; the outlier is the target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from inflight_edge.errors import DataError, OptionError

__all__ = ["PatchEstimate", "Settings", "anomaly_indices", "estimate_patch", "estimate_patches"]

Logits = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Settings:
    """How the search runs.

    steps      updates per class at most.       batch  images an update.
    rate       learning rate of Adam (betas .5, .9).
    success    share of images that must reach the class, .99 as published.
    patience   consecutive updates above (below) ``success`` before the norm's weight is raised (lowered).
    """

    steps: int = 400
    batch: int = 64
    rate: float = 0.1
    success: float = 0.99
    patience: int = 5

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or self.patience < 1:
            raise OptionError(f"steps, batch, patience: expected at least 1, got {self}")
        if not 0.0 < self.success <= 1.0 or not self.rate > 0.0:
            raise OptionError(f"success in (0, 1] and rate > 0 expected, got {self}")


@dataclass(frozen=True, slots=True, eq=False)
class PatchEstimate:
    """The smallest patch found for one class.

    mask     (H, W) float32 opacity in 0..1.          pattern  (channels, H, W) float32 in 0..1 of full scale.
    norm     sum of the mask: the size in pixels.     success  share of other classes' images that it sends there.
    """

    target: int
    mask: NDArray[np.float32]
    pattern: NDArray[np.float32]
    norm: float
    success: float

    def embed(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Images (N, channels, H, W) in 0..255 with the patch blended in, rounded to 8-bit values."""
        blended: NDArray[np.float32] = np.rint(
            (1.0 - self.mask) * pixels + self.mask * (self.pattern * np.float32(255.0))
        )
        return blended


def estimate_patches(
    logits: Logits,
    pixels: NDArray[np.float32],
    labels: NDArray[np.int64],
    n_classes: int,
    *,
    settings: Settings,
    seed: int = 0,
    progress: bool = True,
) -> list[PatchEstimate]:
    """One estimate per class; arguments as in ``estimate_patch``."""
    with tqdm(total=n_classes * settings.steps, desc="inspect", unit="step", disable=not progress) as bar:
        estimates = []
        for target in range(n_classes):
            bar.set_postfix({"class": target})
            estimates.append(estimate_patch(logits, pixels, labels, target, settings=settings, seed=seed, bar=bar))
            bar.update((target + 1) * settings.steps - bar.n)
    return estimates


def estimate_patch(
    logits: Logits,
    pixels: NDArray[np.float32],
    labels: NDArray[np.int64],
    target: int,
    *,
    settings: Settings,
    seed: int = 0,
    bar: tqdm | None = None,  # type: ignore[type-arg]
) -> PatchEstimate:
    """Minimise cross-entropy to ``target`` plus weight x sum(mask) over clean images of all other classes.

    logits  images (N, channels, H, W) float32 in 0..1 of full scale -> (N, classes); it normalises by itself.
    pixels  (N, channels, H, W) float32 in 0..255.   labels  (N,) true classes.
    The weight is adapted so that the success stays at the wanted level while the mask shrinks; the smallest mask
    that reaches it is returned; where none does, the last one, with all pixels as its norm.  Deterministic in the seed.
    Source: Wang et al., IEEE S&P 2019, section IV and the authors' scripts.
    """
    pool = torch.from_numpy(pixels[labels != target] / np.float32(255.0))
    if len(pool) == 0:
        raise DataError(f"class {target}: no images of other classes to search with")
    generator = torch.Generator().manual_seed(seed * 7919 + target)
    channels, height, width = pool.shape[1:]
    mask_raw = (torch.rand(height, width, generator=generator) * 0.2 - 2.0).requires_grad_()
    pattern_raw = (torch.rand(channels, height, width, generator=generator) * 2 - 1).requires_grad_()
    optimiser = torch.optim.Adam([mask_raw, pattern_raw], lr=settings.rate, betas=(0.5, 0.9))
    wanted = torch.full((settings.batch,), target)
    weight, above, below, level = 1e-3, 0, 0, 0.0
    best: tuple[float, Tensor, Tensor] | None = None
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(settings.steps):
        while len(order) < settings.batch:
            order = torch.cat([order, torch.randperm(len(pool), generator=generator)])
        images, order = pool[order[: settings.batch]], order[settings.batch :]
        mask, pattern = torch.sigmoid(mask_raw), torch.sigmoid(pattern_raw)
        output = logits((1 - mask) * images + mask * pattern)
        norm = mask.sum()
        loss = F.cross_entropy(output, wanted) + weight * norm
        hit = float((output.detach().argmax(1) == target).float().mean())
        level = 0.8 * level + 0.2 * hit
        if level >= settings.success and (best is None or float(norm.detach()) < best[0]):
            best = (float(norm.detach()), mask.detach().clone(), pattern.detach().clone())
        above, below = (above + 1, 0) if level >= settings.success else (0, below + 1)
        if above >= settings.patience:
            weight, above = weight * 1.5, 0
        elif below >= settings.patience:
            weight, below = weight / 1.5**1.5, 0
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        if bar is not None:
            bar.update()
    if best is None:  # nothing reached the class: as large as a mask can be, so that it never looks suspicious
        best = (float(height * width), mask.detach(), pattern.detach())
    norm_value, mask, pattern = best
    estimate = PatchEstimate(target, mask.numpy(), pattern.numpy(), norm_value, 0.0)
    success = _success(logits, estimate, pixels[labels != target])
    return PatchEstimate(target, mask.numpy(), pattern.numpy(), norm_value, success)


def _success(logits: Logits, estimate: PatchEstimate, pixels: NDArray[np.float32], batch: int = 256) -> float:
    hits = 0
    with torch.inference_mode():
        for start in range(0, len(pixels), batch):
            images = torch.from_numpy(estimate.embed(pixels[start : start + batch]) / np.float32(255.0))
            hits += int((logits(images).argmax(1) == estimate.target).sum())
    return hits / len(pixels)


def anomaly_indices(norms: NDArray[np.float64]) -> NDArray[np.float64]:
    """How far each class's norm lies below the median, in units of 1.4826 x the median absolute deviation.

    norms: (classes,).  Positive below the median, negative above; the published rule calls > 2 a backdoor's target.
    Source: Wang et al., IEEE S&P 2019, section IV.C.
    """
    median = np.median(norms)
    deviation = 1.4826 * np.median(np.abs(norms - median))
    if deviation == 0.0:
        return np.where(norms < median, np.inf, np.where(norms > median, -np.inf, 0.0))
    return (median - norms) / deviation
