"""Additive-perturbation search: the smallest addition that sends the images of a class to another one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from inflight_edge.calibration.reversal.estimates import Logits, answers
from inflight_edge.calibration.reversal.neural_cleanse import CHUNK, Search
from inflight_edge.errors import DataError, OptionError

__all__ = ["Addition", "AdditionSettings", "search_additions"]


@dataclass(frozen=True, slots=True)
class AdditionSettings:
    """How the search runs.

    steps    updates at most.       images  of a search at most, all in every update.
    length   Euclidean length of an update, in full scales per root of the number of values.
    success  share of the images that must reach the class: .8 as published, .9 for a pattern to embed.
    """

    steps: int = 70
    images: int = 16
    length: float = 0.003
    success: float = 0.8

    def __post_init__(self) -> None:
        if min(self.steps, self.images) < 1:
            raise OptionError(f"steps, images: expected at least 1, got {self}")
        if not 0.0 < self.success <= 1.0 or not self.length > 0.0:
            raise OptionError(f"success in (0, 1] and length > 0 expected, got {self}")


@dataclass(frozen=True, slots=True, eq=False)
class Addition:
    """What a search found: perturbation (channels, H, W) in full scales, its Euclidean norm, updates made.

    reached  whether the wanted share of the images gets to the class.
    size     what it counts with where classes are compared: the norm, or, where no update was made because nothing leads
             to the class or the images are there already, how far a search can go.
    """

    perturbation: Tensor
    norm: float
    steps: int
    reached: bool
    size: float


def search_additions(
    logits: Logits,
    searches: list[Search],
    *,
    settings: AdditionSettings,
    bar: tqdm | None = None,  # type: ignore[type-arg]
) -> list[Addition]:
    """Descend the cross-entropy of clip(x + v) to the target from v = 0, each search by itself.

    logits  images (N, channels, H, W) float32 in 0..1 of full scale -> (N, classes).
    bar     advanced by ``settings.steps`` a search.
    It stops as soon as the wanted share gets there: small steps from zero keep the norm small.  The published updates
    are plain gradient steps; here each has the same length, so that their number does not depend on the network's
    scale.  At the end the last step is shortened as far as the share allows.
    Source: Xiang, Miller, Kesidis, IEEE TNNLS 2022, and the authors' scripts.
    """
    pools = []  # which images: their pixels are taken when they are needed
    for search in searches:
        if len(search.used) == 0:
            raise DataError(f"class {search.target}: no images of other classes to search with")
        order = torch.randperm(len(search.used), generator=torch.Generator().manual_seed(search.seed))
        pools.append(search.used[order[: settings.images]])
    values = [torch.zeros(search.images.shape[1:]) for search in searches]
    before = [v.clone() for v in values]
    steps, reached = [0] * len(pools), [False] * len(pools)
    length = settings.length * values[0].numel() ** 0.5
    active = list(range(len(pools)))
    for _ in range(settings.steps + 1):  # the last pass only looks whether the share is reached
        left: list[int] = []
        for group in _groups(active, [len(pool) for pool in pools]):
            leaves = [values[i].clone().requires_grad_() for i in group]
            shown = [(searches[i].images[pools[i]] + v).clamp(0, 1) for i, v in zip(group, leaves, strict=True)]
            output = logits(torch.cat(shown))
            parts = output.split([len(pools[i]) for i in group])
            losses = []
            for i, part in zip(group, parts, strict=True):
                target = torch.full((len(part),), searches[i].target)
                losses.append(F.cross_entropy(part, target))
                reached[i] = float((answers(part.detach()) == target).float().mean()) >= settings.success
            open_ones = [k for k, i in enumerate(group) if not reached[i] and steps[i] < settings.steps]
            if not open_ones:
                continue
            gradients = torch.autograd.grad(
                torch.stack([losses[k] for k in open_ones]).sum(), [leaves[k] for k in open_ones]
            )
            for k, gradient in zip(open_ones, gradients, strict=True):
                i = group[k]
                size = gradient.norm()
                if not 0.0 < size < torch.inf:  # flat or not finite: no direction to go
                    continue
                before[i] = values[i]
                values[i] = values[i] - gradient * (length / size)
                steps[i] += 1
                left.append(i)
        if bar is not None:
            bar.update(sum(1 if i in left else settings.steps - steps[i] for i in active))
        active = left
        if not active:
            break
    results = []
    for i, search in enumerate(searches):
        if reached[i] and steps[i]:
            pool = search.images[pools[i]]
            values[i] = _shortened(logits, pool, search.target, before[i], values[i], settings.success)
        norm = float(values[i].norm())
        size = norm if norm > 0.0 else settings.steps * length
        results.append(Addition(values[i], norm, steps[i], reached[i], size))
    return results


def _groups(active: list[int], sizes: list[int]) -> list[list[int]]:
    """Searches that share a pass: as many as fit into CHUNK images, at least one."""
    groups: list[list[int]] = []
    room = 0
    for i in active:
        if sizes[i] > room or not groups:
            groups.append([])
            room = CHUNK
        groups[-1].append(i)
        room -= sizes[i]
    return groups


def _shortened(logits: Logits, pool: Tensor, target: int, short: Tensor, long: Tensor, success: float) -> Tensor:
    """Between the last perturbation that failed and the first that worked: five bisections."""
    low, high = 0.0, 1.0
    with torch.inference_mode():
        for _ in range(5):
            middle = (low + high) / 2
            v = torch.lerp(short, long, middle)
            hit = float((answers(logits((pool + v).clamp(0, 1))) == target).float().mean())
            low, high = (low, middle) if hit >= success else (middle, high)
    return torch.lerp(short, long, high)
