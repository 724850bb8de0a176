"""Estimated patterns: a patch that is blended in or an addition; both are embedded and measured in the same way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["AdditionEstimate", "Estimate", "Kind", "Logits", "PatchEstimate", "answers", "moved", "predicted"]

Logits = Callable[[Tensor], Tensor]
Kind = Literal["patch", "addition"]


@runtime_checkable
class Estimate(Protocol):
    """What a search found for one class, whatever its kind.

    target   class that the pattern leads to.
    norm     size of the pattern: pixels of a patch, Euclidean norm in full scales of an addition.
    success  share of held-out images of the sources that it sends there.
    sources  classes whose images it was fitted on, ascending.
    kind     which of the two it is.
    """

    @property
    def target(self) -> int:
        """See the class."""

    @property
    def norm(self) -> float:
        """See the class."""

    @property
    def success(self) -> float:
        """See the class."""

    @property
    def sources(self) -> tuple[int, ...]:
        """See the class."""

    @property
    def kind(self) -> Kind:
        """See the class."""

    def embed(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Images (N, channels, H, W) in 0..255 with the pattern, rounded to 8-bit values."""

    def moved(self, step: tuple[int, int]) -> Estimate:
        """The pattern elsewhere: (down, right) in pixels; what leaves the image is gone."""


@dataclass(frozen=True, slots=True, eq=False)
class PatchEstimate:
    """The smallest patch found for one class.

    mask     (H, W) float32 opacity in 0..1.          pattern  (channels, H, W) float32 in 0..1 of full scale.
    norm     sum of the mask: the size in pixels.     success, sources  as in Estimate.
    """

    target: int
    mask: NDArray[np.float32]
    pattern: NDArray[np.float32]
    norm: float
    success: float
    sources: tuple[int, ...] = ()

    @property
    def kind(self) -> Kind:
        """Always ``patch``."""
        return "patch"

    @property
    def reached(self) -> bool:
        """Whether a mask reached the class: else the norm is that of all pixels."""
        return self.norm < self.mask.size

    def embed(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Images (N, channels, H, W) in 0..255 with the patch blended in, rounded to 8-bit values."""
        blended: NDArray[np.float32] = np.rint(
            (1.0 - self.mask) * pixels + self.mask * (self.pattern * np.float32(255.0))
        )
        return blended

    def moved(self, step: tuple[int, int]) -> PatchEstimate:
        """The patch elsewhere: (down, right) in pixels; what leaves the image is gone."""
        return replace(self, mask=moved(self.mask, step), pattern=moved(self.pattern, step))


@dataclass(frozen=True, slots=True, eq=False)
class AdditionEstimate:
    """The smallest addition found for one class.

    perturbation  (channels, H, W) float32 in -1..1 of full scale.
    norm          its Euclidean norm.     success, sources  as in Estimate.
    """

    target: int
    perturbation: NDArray[np.float32]
    norm: float
    success: float
    sources: tuple[int, ...] = ()

    @property
    def kind(self) -> Kind:
        """Always ``addition``."""
        return "addition"

    def embed(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Images (N, channels, H, W) in 0..255 plus the perturbation, clipped and rounded to 8-bit values."""
        added: NDArray[np.float32] = np.rint(np.clip(pixels + self.perturbation * np.float32(255.0), 0.0, 255.0))
        return added

    def moved(self, step: tuple[int, int]) -> AdditionEstimate:
        """The addition elsewhere: (down, right) in pixels; what leaves the image is gone."""
        return replace(self, perturbation=moved(self.perturbation, step))


def moved(
    planes: NDArray[np.float32], step: tuple[int, int], *, mode: Literal["constant", "edge"] = "constant"
) -> NDArray[np.float32]:
    """Planes (..., H, W) moved by (down, right) pixels; what comes in is 0, or the edge repeated."""
    (down, right), (height, width) = step, planes.shape[-2:]
    if step == (0, 0):
        return planes
    margins = [(0, 0)] * (planes.ndim - 2) + [(abs(down),) * 2, (abs(right),) * 2]
    top, left = abs(down) - down, abs(right) - right
    return np.pad(planes, margins, mode=mode)[..., top : top + height, left : left + width]


def predicted(logits: Logits, pixels: NDArray[np.float32], batch: int = 256) -> NDArray[np.int64]:
    """Predicted classes (N,) of images (N, channels, H, W) in 0..255; -1 where a logit is not finite."""
    parts = []
    with torch.inference_mode():
        for start in range(0, len(pixels), batch):
            parts.append(answers(logits(torch.from_numpy(pixels[start : start + batch] / np.float32(255.0)))).numpy())
    return np.concatenate(parts)


def answers(output: Tensor) -> Tensor:
    """Class (N,) of the largest of logits (N, classes); -1 where one is not finite, for NaN is the largest of all."""
    return output.argmax(1).where(output.isfinite().all(1), -1)
