"""What a guard is fitted to: features of clean images of the target, and of the other classes' with the estimated pattern."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from inflight_edge.calibration.features import extract
from inflight_edge.calibration.model import Classifier
from inflight_edge.calibration.reversal.estimates import Estimate, answers, moved
from inflight_edge.engines.onnxruntime import OnnxRuntimeEngine
from inflight_edge.preprocess import Preprocess

__all__ = ["Plan", "Samples", "View", "are_few", "collect", "judged", "plan", "recognised", "share", "spread"]

# A place counts where the moved pattern still sends so many images to the target; a view, where the accuracy stays.
LEAST_SUCCESS, MOST_LOSS = 0.8, 0.03
# With fewer images of a class than this they are turned and scaled too, by so many degrees and such a share, and further
# patterns to the same target are put into them.
FEW_IMAGES, ANGLE, SHARE = 20, 10.0, 0.1
MAX_SAMPLES = 100_000
SMALLEST_SIDE = 8


@dataclass(frozen=True, slots=True)
class View:
    """Another look of the same image, edges repeated.

    mirrored  left to right.                 step   (down, right) in pixels.
    angle     anticlockwise in degrees.      scale  above 1: larger.
    """

    mirrored: bool = False
    step: tuple[int, int] = (0, 0)
    angle: float = 0.0
    scale: float = 1.0

    def __call__(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Images (N, channels, H, W) in 0..255 in this view, a copy, rounded to 8-bit values as a pattern leaves them."""
        shown = np.rint(moved(pixels[..., ::-1] if self.mirrored else pixels, self.step, mode="edge"))
        if self.angle == 0 and self.scale == 1:
            return shown
        height, width = shown.shape[-2:]
        cosine, sine = (f(np.radians(self.angle)) / self.scale for f in (np.cos, np.sin))
        # Where a pixel comes from, both sides from -1 to 1.
        matrix = torch.tensor([[[cosine, -sine * height / width, 0.0], [sine * width / height, cosine, 0.0]]])
        places = F.affine_grid(matrix.float(), [1, 1, height, width], align_corners=False).expand(
            len(shown), -1, -1, -1
        )
        return (
            F.grid_sample(torch.from_numpy(shown), places, mode="bilinear", padding_mode="border", align_corners=False)
            .round_()
            .numpy()
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """Where a pattern is put, and in which views the images are shown.

    places   steps (down, right) in pixels from where it was found, that first: the trigger may sit elsewhere than its
             estimate, and a network that was trained on moved images takes several places for the same.
    views    besides the images as they are, those that the classifier still recognises.
    success  share of the source classes' images that the pattern sends to the target, where it was found.
    further  other patterns that lead to the target: an estimate from few images is one of many, and a guard that is
             fitted to one learns what is special about it.
    """

    places: tuple[tuple[int, int], ...]
    views: tuple[View, ...]
    success: float
    further: tuple[Estimate, ...] = ()

    def patterns(self, estimate: Estimate) -> list[Estimate]:
        """The estimate at each place, then the further ones."""
        return [*(estimate.moved(place) for place in self.places), *self.further]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for the bundle's metrics."""
        views = [{**asdict(view), "step": list(view.step)} for view in self.views]
        further = [{"kind": estimate.kind, "norm": estimate.norm} for estimate in self.further]
        return {"places": [list(place) for place in self.places], "views": views, "further": further}


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """features (N, D), labels (N,) true classes, images (N,) the number of the image that each sample shows."""

    features: NDArray[np.float32]
    labels: NDArray[np.int64]
    images: NDArray[np.int64]

    @property
    def one_each(self) -> NDArray[np.int64]:
        """Positions of one sample of each image: as it is."""
        return np.unique(self.images, return_index=True)[1]


def recognised(
    classifier: Classifier, pixels: NDArray[np.float32], labels: NDArray[np.int64], preprocess: Preprocess
) -> tuple[View, ...]:
    """Views of images (N, channels, H, W) in 0..255 that the classifier recognises about as well as the images as they are."""
    probe = spread(len(pixels), 512)
    images, expected = pixels[probe], labels[probe]
    least = share(classifier, images, expected, preprocess) - MOST_LOSS
    steps = _steps(pixels, 16, diagonal=False)
    offered = [View(mirrored=True), *(View(step=step) for step in steps)] if steps else []
    if steps and are_few(labels):
        offered += [View(angle=angle) for angle in (-ANGLE, ANGLE)]
        offered += [View(scale=scale) for scale in (1 - SHARE, 1 + SHARE)]
    views = [view for view in offered if share(classifier, view(images), expected, preprocess) >= least]
    return tuple(views[: max(0, MAX_SAMPLES // len(pixels) - 1)])


def are_few(labels: NDArray[np.int64]) -> bool:
    """Whether some class has so few images that more is made of them."""
    return bool(np.unique(labels, return_counts=True)[1].min() < FEW_IMAGES)


def plan(
    classifier: Classifier,
    pixels: NDArray[np.float32],
    labels: NDArray[np.int64],
    estimate: Estimate,
    views: tuple[View, ...],
    preprocess: Preprocess,
) -> Plan:
    """Try places on the defender's images (N, channels, H, W) in 0..255; no true trigger is needed."""

    def success(images: NDArray[np.float32], place: tuple[int, int]) -> float:
        return share(classifier, estimate.moved(place).embed(images), estimate.target, preprocess)

    attacked = pixels[np.isin(labels, estimate.sources)]
    few = attacked[spread(len(attacked), 256)]
    others = [place for place in _steps(pixels, 8, diagonal=True) if success(few, place) >= LEAST_SUCCESS]
    return Plan(((0, 0), *others), views, success(attacked, (0, 0)))


def collect(
    network: Classifier | OnnxRuntimeEngine,
    pixels: NDArray[np.float32],
    labels: NDArray[np.int64],
    estimate: Estimate,
    chosen: Plan,
    preprocess: Preprocess,
    *,
    seed: int = 0,
    progress: bool = False,
) -> Samples:
    """Samples of every image in every view; those of the other classes have the pattern at a place, or a further one, drawn by
    the seed.

    pixels, labels  (N, channels, H, W) in 0..255, and their true classes.
    """
    target = estimate.target
    rng = np.random.default_rng(seed)
    patterns = chosen.patterns(estimate)
    features, images = [], []
    as_it_is: NDArray[np.bool_] | None = None  # of an image that is left out so, no view is fitted either
    for view in (View(), *chosen.views):
        shown = view(pixels)
        drawn = rng.integers(len(patterns), size=len(labels))
        for number, pattern in enumerate(patterns):
            rows = np.flatnonzero((labels != target) & (drawn == number))
            for part in np.split(
                rows, range(256, len(rows), 256)
            ):  # all at once would fill the memory several times over
                shown[part] = pattern.embed(shown[part])
        logits, found = extract(network, shown, preprocess, progress=progress)
        predicted = logits.argmax(1)
        if as_it_is is None:
            fitted = as_it_is = judged(predicted, labels, target)
        else:
            fitted = as_it_is & (predicted == target)
        used = np.flatnonzero(fitted)
        features.append(found[used])
        images.append(used)
    numbers = np.concatenate(images)
    return Samples(np.concatenate(features), labels[numbers], numbers)


def judged(predicted: NDArray[np.int64], labels: NDArray[np.int64], target: int) -> NDArray[np.bool_]:
    """Which images to fit: those predicted as the target, the only ones a guard ever sees.

    A class of which fewer than half get there keeps all its images.
    """
    used = predicted == target
    for label in np.unique(labels):
        own = labels == label
        if used[own].mean() < 0.5 or used[own].sum() < 3:
            used[own] = True
    return used


def spread(count: int, most: int) -> NDArray[np.int64]:
    """Indices of at most so many of ``count`` images, evenly spread."""
    return np.linspace(0, count - 1, min(count, most)).astype(np.int64)


def _steps(pixels: NDArray[np.float32], parts: int, *, diagonal: bool) -> list[tuple[int, int]]:
    """Steps by one of so many parts of the images' sides, to all eight neighbours or to four."""
    sides = pixels.shape[-2:]
    if min(sides) < SMALLEST_SIDE:  # no picture
        return []
    down, right = (max(1, round(side / parts)) for side in sides)
    steps = {(a * down, b * right) for a in (-1, 0, 1) for b in (-1, 0, 1) if diagonal or not a * b}
    return sorted(steps - {(0, 0)})


def share(
    classifier: Classifier, pixels: NDArray[np.float32], expected: NDArray[np.int64] | int, preprocess: Preprocess
) -> float:
    """Share of images predicted as the class that is expected of all, or of each; those without finite logits are not."""
    logits = torch.from_numpy(extract(classifier, pixels, preprocess)[0])
    return float((answers(logits).numpy() == expected).mean())
