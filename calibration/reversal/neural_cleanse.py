"""Neural Cleanse: the smallest patch that sends images to a class, for many classes and sources side by side."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from inflight_edge.calibration.reversal.estimates import Logits, PatchEstimate, answers
from inflight_edge.errors import DataError, ModelError, OptionError

__all__ = ["Patch", "Search", "Settings", "search_patches"]

CHUNK = 256  # images a pass of the classifier: more are no faster and take memory
IMPROVEMENT = 0.99  # a mask below this share of the smallest so far is an improvement


@dataclass(frozen=True, slots=True)
class Settings:
    """How the search runs.

    steps      updates at most.       batch  images an update.
    rate       learning rate of Adam (betas .5, .9).
    success    share of images that must reach the class, .99 as published.
    patience   consecutive updates above (below) ``success`` before the norm's weight is raised (lowered).
    stop       updates without improvement before a search ends, once its weight has moved both ways.
    """

    steps: int = 400
    batch: int = 64
    rate: float = 0.1
    success: float = 0.99
    patience: int = 5
    stop: int = 50

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.patience, self.stop) < 1:
            raise OptionError(f"steps, batch, patience, stop: expected at least 1, got {self}")
        if not 0.0 < self.success <= 1.0 or not self.rate > 0.0:
            raise OptionError(f"success in (0, 1] and rate > 0 expected, got {self}")


@dataclass(frozen=True, slots=True, eq=False)
class Search:
    """One thing to look for: a patch that sends images to ``target``.

    target  one class, or a class for each image that is used, (n,) int64.
    images  (N, channels, H, W) float32 in 0..1: one tensor for all searches, a copy for each would fill the memory.
    used    (n,) int64: which of them to search with.
    """

    target: int | Tensor
    images: Tensor
    used: Tensor
    seed: int


@dataclass(frozen=True, slots=True, eq=False)
class Patch:
    """What a search found: mask (H, W), pattern (channels, H, W), both in 0..1.

    norm   sum of the mask; all pixels where no mask reached the class, so that it never looks suspicious.
    steps  updates made.
    """

    mask: Tensor
    pattern: Tensor
    norm: float
    steps: int

    def estimate(self, target: int, sources: tuple[int, ...]) -> PatchEstimate:
        """The estimate for a target, searched on images of the sources; success is not measured."""
        return PatchEstimate(target, self.mask.numpy(), self.pattern.numpy(), self.norm, 0.0, sources)


class _State:
    """A search under way: its parameters, its order of images, the weight of the norm, the smallest mask so far."""

    def __init__(self, search: Search) -> None:
        channels, height, width = search.images.shape[1:]
        self.images, self.used = search.images, search.used
        self.wanted = torch.as_tensor(search.target).expand(len(search.used))
        self.generator = torch.Generator().manual_seed(search.seed)
        self.mask = (torch.rand(height, width, generator=self.generator) * 0.2 - 2.0).requires_grad_()
        self.pattern = (torch.rand(channels, height, width, generator=self.generator) * 2 - 1).requires_grad_()
        self.order = torch.empty(0, dtype=torch.int64)
        self.weight, self.above, self.below, self.level = 1e-3, 0, 0, 0.0
        self.raised = self.lowered = False
        self.best: tuple[float, Tensor, Tensor] | None = None
        self.mark, self.idle, self.steps = float("inf"), 0, 0

    def batch(self, count: int) -> tuple[Tensor, Tensor]:
        """The next images, and the classes they are wanted in."""
        while len(self.order) < count:
            self.order = torch.cat([self.order, torch.randperm(len(self.used), generator=self.generator)])
        chosen, self.order = self.order[:count], self.order[count:]
        return self.images[self.used[chosen]], self.wanted[chosen]

    def judge(self, hit: float, norm: float, mask: Tensor, pattern: Tensor, settings: Settings) -> None:
        """Keep the mask if it is the smallest that works; adapt the weight."""
        self.steps += 1
        self.idle += 1
        self.level = 0.8 * self.level + 0.2 * hit
        works = self.level >= settings.success
        if works and (self.best is None or norm < self.best[0]):
            self.best = (norm, mask.clone(), pattern.clone())
            if norm < IMPROVEMENT * self.mark:
                self.mark, self.idle = norm, 0
        self.above, self.below = (self.above + 1, 0) if works else (0, self.below + 1)
        if self.above >= settings.patience:
            self.weight, self.above, self.raised = self.weight * 1.5, 0, True
        elif self.below >= settings.patience:
            self.weight, self.below, self.lowered = self.weight / 1.5**1.5, 0, self.raised or self.lowered

    def done(self, settings: Settings) -> bool:
        return self.raised and self.lowered and self.best is not None and self.idle >= settings.stop

    def result(self) -> Patch:
        if self.best is None:
            mask, pattern = torch.sigmoid(self.mask.detach()), torch.sigmoid(self.pattern.detach())
            if not mask.isfinite().all():
                raise ModelError(
                    "model: its logits are NaN or infinite for images with a patch; check --scale, --mean and --std, or "
                    "export a model that takes all images"
                )
            return Patch(mask, pattern, float(mask.numel()), self.steps)
        return Patch(self.best[1], self.best[2], self.best[0], self.steps)


def search_patches(
    logits: Logits,
    searches: list[Search],
    *,
    settings: Settings,
    bar: tqdm | None = None,  # type: ignore[type-arg]
) -> list[Patch]:
    """Minimise, in each search by itself, cross-entropy to the targets plus weight x sum(mask).

    logits  images (N, channels, H, W) float32 in 0..1 of full scale -> (N, classes); it normalises by itself.
    bar     advanced by ``settings.steps`` a search.
    The weight is adapted so that the success stays at the wanted level while the mask shrinks; the smallest mask that
    reaches it is returned.  Searches share passes of the classifier, nothing else: each depends on its own seed alone.
    Raises DataError when one has no images, ModelError when nothing but logits that are not finite come of one.
    Source: Wang et al., IEEE S&P 2019, section IV.  For speed it differs from the authors' scripts, which take up to 1000
    steps of 31 batches of 32 images: success is a moving average over single updates, so that the mask kept need not
    reach it by itself; the weight starts at 1e-3, not 0, and is raised by 1.5, not 2; a search ends early after ``stop``
    updates without improvement, not 25 of their steps.
    """
    for search in searches:
        if len(search.used) == 0:
            raise DataError(f"class {search.target}: no images of other classes to search with")
    states = [_State(search) for search in searches]
    optimiser = torch.optim.Adam([p for s in states for p in (s.mask, s.pattern)], lr=settings.rate, betas=(0.5, 0.9))
    active = states
    for _ in range(settings.steps):
        optimiser.zero_grad(set_to_none=True)  # what has ended has no gradient, and Adam leaves it alone
        at_once = max(1, CHUNK // settings.batch)
        for first in range(0, len(active), at_once):
            _update(logits, active[first : first + at_once], settings)
        optimiser.step()
        left = [state for state in active if not state.done(settings)]
        if bar is not None:
            ended = sum(settings.steps - s.steps for s in active if s.done(settings))
            bar.update(len(active) + ended)
        active = left
        if not active:
            break
    return [state.result() for state in states]


def _update(logits: Logits, states: list[_State], settings: Settings) -> None:
    """Gradients of a few searches in one pass."""
    masks = torch.sigmoid(torch.stack([s.mask for s in states]))[:, None, None]
    patterns = torch.sigmoid(torch.stack([s.pattern for s in states]))[:, None]
    batches = [s.batch(settings.batch) for s in states]
    images = torch.stack([images for images, _ in batches])
    output = logits(((1 - masks) * images + masks * patterns).flatten(0, 1))
    wanted = torch.cat([wanted for _, wanted in batches])
    entropies = F.cross_entropy(output, wanted, reduction="none").reshape(len(states), -1).mean(1)
    norms = masks.sum((1, 2, 3, 4))
    hits = (answers(output.detach()) == wanted).reshape(len(states), -1).float().mean(1)
    (entropies + torch.tensor([s.weight for s in states]) * norms).sum().backward()
    for state, hit, norm, mask, pattern in zip(
        states, hits.tolist(), norms.tolist(), masks.detach()[:, 0, 0], patterns.detach()[:, 0], strict=True
    ):
        state.judge(hit, norm, mask, pattern, settings)
