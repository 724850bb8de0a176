"""Post-training inspection: which class is a backdoor's target, with which pattern."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from inflight_edge.calibration.datasets import ImageSet
from inflight_edge.calibration.features import extract
from inflight_edge.calibration.finding import MAX_CLASSES, Finding, Method, Searcher, not_searched
from inflight_edge.calibration.inspection_file import decode, encode, finite, save_png, write
from inflight_edge.calibration.model import Classifier
from inflight_edge.calibration.reversal.estimates import Estimate, PatchEstimate
from inflight_edge.calibration.reversal.neural_cleanse import Settings
from inflight_edge.calibration.threads import has_bfloat16, is_small, one_thread_if_small
from inflight_edge.errors import DataError, ModelError, OptionError
from inflight_edge.preprocess import Preprocess

__all__ = ["Inspection", "check_accuracy", "further_estimates", "inspect", "read_inspection"]


@dataclass(frozen=True, slots=True, eq=False)
class Inspection:
    """Result of an inspection.

    estimates      one pattern per class.
    indices        (classes,) anomaly index of the smallest patch from all other classes, high: suspiciously small; NaN where none
                   was searched.  The pattern of a class may be another one.
    suspects       classes taken for a backdoor's target, the best founded first.
    accuracy       clean accuracy of the classifier on the images of the inspection.
    feature_layer  the layer asked for, None for the default.
    findings       why each suspect is one; a class that the user names has none.
    """

    estimates: tuple[Estimate, ...]
    indices: NDArray[np.float64]
    suspects: tuple[int, ...]
    accuracy: float
    preprocess: Preprocess
    feature_layer: str | None
    class_names: tuple[str, ...] | None
    findings: tuple[Finding, ...] = ()

    def name(self, label: int) -> str:
        """Name of a class, its index where it has none."""
        return self.class_names[label] if self.class_names else str(label)

    def rows(self) -> list[dict[str, Any]]:
        """The ranked table: one record per class, suspects first, then the most anomalous.

        ``sources`` is ``all`` where the pattern was searched from all other classes, else their list.
        """
        rank = {label: i for i, label in enumerate(self.suspects)}
        order = sorted(
            range(len(self.estimates)),
            key=lambda c: (rank.get(c, len(rank)), -np.nan_to_num(self.indices[c]), self.estimates[c].norm),
        )
        everyone = len(self.estimates) - 1
        found = {finding.target: finding for finding in self.findings}
        return [
            {
                "class": c,
                "name": self.name(c),
                "kind": self.estimates[c].kind,
                "norm": round(self.estimates[c].norm, 4),
                "success": round(self.estimates[c].success, 4),
                "sources": "all" if len(self.estimates[c].sources) == everyone else list(self.estimates[c].sources),
                "anomaly_index": finite(self.indices[c]),
                "suspect": c in self.suspects,
                "method": found[c].method if c in found else None,
                "score": finite(found[c].score) if c in found else None,
            }
            for c in order
        ]

    def save(self, folder: Path) -> Path:
        """Write patterns.safetensors, inspection.json and the pictures into ``folder``; the first one's path."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "patterns.safetensors"
        write(path, *encode(self))
        report = {"suspects": list(self.suspects), "accuracy": self.accuracy, "classes": self.rows()}
        (folder / "inspection.json").write_text(json.dumps(report, indent=1) + "\n")
        for old in folder.glob("class-*.png"):  # of an earlier inspection in the same folder
            if re.fullmatch(r"class-\d+-(mask|pattern)\.png", old.name):
                old.unlink()
        for label in self.suspects or (self.rows()[0]["class"],):
            estimate = self.estimates[label]
            if isinstance(estimate, PatchEstimate):
                save_png(folder / f"class-{label}-mask.png", estimate.mask[None])
                save_png(folder / f"class-{label}-pattern.png", estimate.mask * estimate.pattern)
            else:  # grey is nothing, the largest change is black or white
                grey = np.full((1, *self.preprocess.input_shape), 127.0, np.float32)
                change = estimate.embed(grey)[0] - grey[0]
                save_png(folder / f"class-{label}-pattern.png", 0.5 + change / max(2 * np.abs(change).max(), 1e-12))
        return path


def inspect(
    classifier: Classifier,
    data: ImageSet,
    preprocess: Preprocess,
    *,
    settings: Settings | None = None,
    method: str = "auto",
    targets: Sequence[int] | None = None,
    feature_layer: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Inspection:
    """Search for a target on clean labelled images; nothing need be told about it.

    method  ``neural-cleanse`` looks for patches, from all classes and from each; ``perturbation`` for additions;
            ``auto`` for both.
    targets  classes that are the suspects whatever is found, as the user knows or fears; None: what is found.
    A fifth of each class's images is held out from the search to measure the patterns' success.
    Raises OptionError for an unknown method, or one that names no class among so many; ModelError when the logits are
    probabilities or have no gradient by the image; DataError when the labels do not fit the classifier, it gets hardly any image
    right, or classes have changed places: a wrong scale, mean, std or class order makes every later number meaningless.
    """
    if method not in get_args(Method):
        raise OptionError(f"method: expected one of {', '.join(get_args(Method))}, got {method!r}")
    if wrong := [t for t in targets or () if not 0 <= t < classifier.n_classes]:
        raise OptionError(f"targets: expected class indices from 0 to {classifier.n_classes - 1}, got {wrong[0]}")
    if method == "perturbation" and not targets and not_searched(method, classifier.n_classes):
        raise OptionError(
            f"method: perturbation names a class among 3 to {MAX_CLASSES}, the model has {classifier.n_classes}; "
            "use neural-cleanse, or name the class with --target"
        )
    data.check_labels(classifier.n_classes, every_class=True)
    pixels = data.pixels(preprocess)
    accuracy = check_accuracy(classifier, pixels, data, preprocess)
    _check_gradient(classifier, preprocess.normalise(pixels[:8]))
    searcher = _searcher(classifier, pixels, data.labels, preprocess, settings or Settings(), seed, progress)
    with one_thread_if_small(classifier):
        estimates, findings, indices = searcher.run(method, targets or ())
    suspects = tuple(finding.target for finding in findings) if targets is None else tuple(dict.fromkeys(targets))
    return Inspection(estimates, indices, suspects, accuracy, preprocess, feature_layer, data.class_names, findings)


def further_estimates(
    classifier: Classifier,
    pixels: NDArray[np.float32],
    labels: NDArray[np.int64],
    preprocess: Preprocess,
    estimates: Sequence[Estimate],
    *,
    seed: int = 0,
    progress: bool = True,
) -> list[tuple[Estimate, ...]]:
    """Of each estimate the other patterns, patches and an addition, that lead from its sources to its target, those that work.

    pixels, labels  (N, channels, H, W) in 0..255, and their true classes.
    """
    searcher = _searcher(classifier, pixels, labels, preprocess, Settings(), seed, progress)
    with one_thread_if_small(classifier):
        return [searcher.further(estimate) for estimate in estimates]


def _searcher(
    classifier: Classifier,
    pixels: NDArray[np.float32],
    labels: NDArray[np.int64],
    preprocess: Preprocess,
    settings: Settings,
    seed: int,
    progress: bool,
) -> Searcher:
    mean, std = (torch.tensor(values).reshape(1, -1, 1, 1) for values in (preprocess.mean, preprocess.std))
    factor = 255.0 * preprocess.scale

    def logits(images: Tensor) -> Tensor:
        return classifier((images * factor - mean) / std)[0]

    small = is_small(classifier)
    if not small:  # a step of a large network is dear, and half the images move the mask as well
        settings = replace(settings, batch=min(settings.batch, 32))

    def fast(images: Tensor) -> Tensor:
        if small or not has_bfloat16():
            return logits(images)
        with torch.autocast("cpu", torch.bfloat16):
            return classifier(((images * factor - mean) / std).contiguous(memory_format=torch.channels_last))[0].float()

    n_classes = classifier.n_classes
    return Searcher(fast, logits, pixels, labels, n_classes, settings, seed, progress, coarse=not small)


def check_accuracy(
    classifier: Classifier, pixels: NDArray[np.float32], data: ImageSet, preprocess: Preprocess
) -> float:
    """Clean accuracy; DataError when it is near chance, or when classes have changed places, ModelError for probabilities."""
    logits, _ = extract(classifier, pixels, preprocess)
    if not np.isfinite(logits).all():
        raise DataError(f"{data.origin}: the model's logits are not finite; check --scale, --mean and --std")
    if ((logits >= 0.0) & (logits <= 1.0)).all():
        raise ModelError(
            "model: expected logits, got nothing but numbers from 0 to 1, which are probabilities and hide how far classes "
            "lie apart; export the classifier without what it does behind its last layer"
        )
    predicted = logits.argmax(1)
    accuracy = float((predicted == data.labels).mean())
    chance = 1.0 / classifier.n_classes
    if accuracy < chance + 0.2 * (1.0 - chance):
        names = ", ".join(f"{c} = {name}" for c, name in enumerate((data.class_names or ())[:4]))
        raise DataError(
            f"{data.origin}: the model gets only {accuracy:.1%} of these images right (chance: {chance:.1%}); check --scale, "
            f"--mean, --std (now scale {preprocess.scale:g}, mean {preprocess.mean}, std {preprocess.std}) and the class order"
            + (f" ({names}, ...)" if names else "")
        )
    _check_places(predicted, data, classifier.n_classes)
    return accuracy


def _check_gradient(classifier: Classifier, inputs: NDArray[np.float32]) -> None:
    """ModelError when the logits do not change with the image: nothing can be searched by gradients then."""
    images = torch.from_numpy(inputs).requires_grad_()
    try:
        logits = classifier(images)[0]
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, logits.argmin(1)), images)
        reason = "is not finite" if not gradient.isfinite().all() else "" if gradient.any() else "is zero"
    except RuntimeError as error:
        reason = f"cannot be had: {str(error).strip().splitlines()[0]}"
    if reason:
        raise ModelError(
            f"model: the gradient of its logits by the image {reason}; export it without torch.no_grad, rounding or quantisation"
        )


def _check_places(predicted: NDArray[np.int64], data: ImageSet, n_classes: int) -> None:
    """DataError when each of some classes is mostly taken for another one of them."""
    order = np.arange(n_classes)
    taken = np.zeros((n_classes, n_classes), np.int64)
    np.add.at(taken, (data.labels, predicted), 1)
    most = np.where(2 * taken.max(axis=1) > taken.sum(axis=1), taken.argmax(axis=1), order)
    moved = order[most != order]
    if not moved.size or not np.array_equal(np.sort(most[moved]), moved):
        return
    names = [f"{c} ({data.class_names[c]})" if data.class_names else str(c) for c in order]
    pairs = ", ".join(f"{names[a]} for {names[most[a]]}" for a in moved)
    raise DataError(
        f"{data.origin}: expected labels in the model's class order, but it takes most images of class {pairs}; "
        "correct the labels, or the order of the folders"
    )


def read_inspection(path: str | Path) -> Inspection:
    """Read the patterns.safetensors of an inspection.  Raises DataError."""
    return Inspection(**decode(Path(path)))
