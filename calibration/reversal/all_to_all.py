"""One trigger for many targets: the patch of an all-to-all attack, which sends every class to another one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from inflight_edge.calibration.reversal.estimates import Logits, PatchEstimate, predicted
from inflight_edge.calibration.reversal.neural_cleanse import Search, Settings, search_patches

__all__ = ["SharedPatch"]

# A class counts when so many of its images get to its target; of a patch that is found, further ones from the second on.
LEAST_SHARE, FURTHER_SHARE = 0.5, 0.25
PER_CLASS = 20  # images of each class that are tried, none of them held out


class SharedPatch:
    """Looks for one patch with many targets.

    It starts from patches that single sources led to: such a pattern, if it is the trigger, sends other classes elsewhere,
    each to one target.  The smallest patch that sends as many images of all these classes to their targets is searched, and
    again while it takes further classes along.

    fast, exact  images (N, channels, H, W) in 0..1 -> logits: for gradients, and to measure what was found.
    pixels       (N, channels, H, W) float32 in 0..255.      images  the same in 0..1.      labels  (N,).
    used         (N,) images to search with.
    """

    def __init__(
        self,
        fast: Logits,
        exact: Logits,
        pixels: NDArray[np.float32],
        images: Tensor,
        labels: NDArray[np.int64],
        used: NDArray[np.bool_],
        n_classes: int,
        settings: Settings,
        seed: int,
    ) -> None:
        self.fast, self.exact, self.n_classes, self.settings, self.seed = fast, exact, n_classes, settings, seed
        self.images, self.labels, self.used = images, labels, used
        tried = np.concatenate([np.flatnonzero((labels == c) & used)[:PER_CLASS] for c in range(n_classes)])
        tried = tried[predicted(exact, pixels[tried]) == labels[tried]]
        self.tried, self.tried_labels = pixels[tried], labels[tried]

    def search(self, found: list[PatchEstimate], least: int) -> list[PatchEstimate]:
        """One estimate, of the same patch, for each target that a class of its own is sent to.

        found  patches to start from.      least  classes that the one to start from must send away; [] where none does.
        Success is not filled in.
        """
        shares = [self.shares(estimate) for estimate in found]
        start = max(range(len(found)), key=lambda i: _reach(shares[i]), default=None)
        if start is None or len(_routes(shares[start])) < max(least, 1):
            return []
        best, share, routes = found[start], shares[start], _routes(shares[start])
        grows = True
        while grows:
            level = float(np.mean([share[route] for route in routes.items()]))
            searched = self._smallest(routes, level)
            reached = self.shares(searched)
            more = _routes(reached)
            grows = len(more) > len(routes)
            if len(more) >= len(routes):
                best, share, routes = searched, reached, more
        further = _routes(share, FURTHER_SHARE)
        return [replace(best, target=target, sources=(source,)) for source, target in further.items()]

    def shares(self, estimate: PatchEstimate) -> NDArray[np.float64]:
        """(classes, classes): share of the images of the first that the patch sends to the second, 0 to the same.

        Only images that are recognised without the patch count.
        """
        reached = predicted(self.exact, estimate.embed(self.tried)) if len(self.tried) else self.tried_labels
        result = np.zeros((self.n_classes, self.n_classes))
        np.add.at(result, (self.tried_labels, reached), 1.0)
        np.fill_diagonal(result, 0.0)
        return result / np.maximum(np.bincount(self.tried_labels, minlength=self.n_classes), 1)[:, None]

    def _smallest(self, routes: dict[int, int], success: float) -> PatchEstimate:
        used = np.flatnonzero(np.isin(self.labels, list(routes)) & self.used)
        wanted = torch.tensor([routes[label] for label in self.labels[used].tolist()])
        one = Search(wanted, self.images, torch.from_numpy(used), self.seed * 7919)
        settings = replace(self.settings, success=min(success, self.settings.success))
        source, target = next(iter(routes.items()))
        return search_patches(self.fast, [one], settings=settings)[0].estimate(target, (source,))


def _routes(shares: NDArray[np.float64], least: float = LEAST_SHARE) -> dict[int, int]:
    """Classes with their targets, each target for one class: the most classes, and of equally many the most images."""
    worth = np.where(shares >= least, len(shares) + shares, 0.0)
    pairs = zip(*linear_sum_assignment(worth, maximize=True), strict=True)
    return {int(s): int(t) for s, t in pairs if worth[s, t] > 0}


def _reach(shares: NDArray[np.float64]) -> tuple[int, float]:
    routes = _routes(shares)
    return len(routes), float(sum(shares[route] for route in routes.items()))
