"""Post-training inspection: which class is a backdoor's target, with which pattern; saved for the calibration."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from inflight_edge.calibration.datasets import ImageSet
from inflight_edge.calibration.features import extract
from inflight_edge.calibration.model import Classifier
from inflight_edge.calibration.reversal.neural_cleanse import (
    PatchEstimate,
    Settings,
    anomaly_indices,
    estimate_patches,
)
from inflight_edge.calibration.threads import one_thread_if_small
from inflight_edge.errors import DataError, OptionError
from inflight_edge.preprocess import Preprocess

__all__ = ["Inspection", "check_accuracy", "inspect", "read_inspection", "suspicious"]

FORMAT = "inflight-edge-inspection"
THRESHOLD, LOG_THRESHOLD, SMALL_MASK, SMALL_OF_TWO = 2.0, 3.5, 0.6, 0.4


@dataclass(frozen=True, slots=True, eq=False)
class Inspection:
    """Result of an inspection.

    estimates      one patch per class.     indices  (classes,) anomaly index of each; high means suspiciously small.
    suspects       classes taken for a backdoor's target, smallest mask first.
    accuracy       clean accuracy of the classifier on the images of the inspection.
    feature_layer  the layer asked for, None for the default.
    """

    estimates: tuple[PatchEstimate, ...]
    indices: NDArray[np.float64]
    suspects: tuple[int, ...]
    accuracy: float
    preprocess: Preprocess
    feature_layer: str | None
    class_names: tuple[str, ...] | None

    def name(self, label: int) -> str:
        """Name of a class, its index where it has none."""
        return self.class_names[label] if self.class_names else str(label)

    def rows(self) -> list[dict[str, Any]]:
        """The ranked table: one record per class, the most anomalous first."""
        order = sorted(range(len(self.estimates)), key=lambda c: (-self.indices[c], self.estimates[c].norm))
        logarithmic = anomaly_indices(np.log([estimate.norm for estimate in self.estimates]))
        return [
            {
                "class": c,
                "name": self.name(c),
                "mask_norm": round(self.estimates[c].norm, 4),
                "success": round(self.estimates[c].success, 4),
                "anomaly_index": _finite(self.indices[c]),
                "log_anomaly_index": _finite(logarithmic[c]),
                "suspect": c in self.suspects,
            }
            for c in order
        ]

    def save(self, folder: Path) -> Path:
        """Write patterns.safetensors, inspection.json and the pictures into ``folder``; the first one's path."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "patterns.safetensors"
        constants = self.preprocess
        header = {
            "format": FORMAT,
            "version": 1,
            "suspects": self.suspects,
            "accuracy": self.accuracy,
            "feature_layer": self.feature_layer,
            "class_names": self.class_names,
            "input_shape": constants.input_shape,
            "scale": constants.scale,
            "mean": constants.mean,
            "std": constants.std,
        }
        tensors = {
            "masks": np.stack([e.mask for e in self.estimates]),
            "patterns": np.stack([e.pattern for e in self.estimates]),
            "norms": np.array([e.norm for e in self.estimates]),
            "success": np.array([e.success for e in self.estimates]),
        }
        partial = path.with_suffix(".partial")
        save_file(tensors, partial, metadata={"inspection": json.dumps(header)})
        partial.replace(path)
        report = {"suspects": list(self.suspects), "accuracy": self.accuracy, "classes": self.rows()}
        (folder / "inspection.json").write_text(json.dumps(report, indent=1) + "\n")
        for label in self.suspects or (self.rows()[0]["class"],):
            _save_png(folder / f"class-{label}-mask.png", self.estimates[label].mask[None])
            _save_png(folder / f"class-{label}-pattern.png", self.estimates[label].mask * self.estimates[label].pattern)
        return path


def inspect(
    classifier: Classifier,
    data: ImageSet,
    preprocess: Preprocess,
    *,
    settings: Settings | None = None,
    feature_layer: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Inspection:
    """Run Neural Cleanse for every class on clean labelled images; nothing is told about the target.

    Raises DataError when the labels do not fit the classifier, or it gets hardly any image right: a wrong scale,
    mean, std or class order makes every later number meaningless.
    """
    data.check_labels(classifier.n_classes, every_class=True)
    pixels = data.pixels(preprocess)
    accuracy = check_accuracy(classifier, pixels, data, preprocess)
    mean, std = (torch.tensor(values).reshape(1, -1, 1, 1) for values in (preprocess.mean, preprocess.std))
    factor = 255.0 * preprocess.scale

    def logits(images: Tensor) -> Tensor:
        return classifier((images * factor - mean) / std)[0]

    chosen = settings or Settings()
    with one_thread_if_small(classifier):
        estimates = estimate_patches(
            logits, pixels, data.labels, classifier.n_classes, settings=chosen, seed=seed, progress=progress
        )
    norms = np.array([e.norm for e in estimates])
    indices = anomaly_indices(norms)
    suspects = sorted(np.flatnonzero(suspicious(norms)).tolist(), key=lambda c: norms[c])
    return Inspection(tuple(estimates), indices, tuple(suspects), accuracy, preprocess, feature_layer, data.class_names)


def suspicious(norms: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which classes (classes,) have a mask so small that they are taken for a backdoor's target.

    A class is one when its mask is below .6 of the median and one of these holds:
    - the published rule: an anomaly index above 2;
    - the same index of the logarithms above 3.5, the usual limit of a modified z-score, which still sees a tiny mask
      where few classes or a wide spread inflate the deviation;
    - it is the smallest mask and below .6 of the next one (of two classes: below .4), which is left where too few
      classes make any index small.
    Measured: smallest masks of clean models were at .70 of the median and above (LeNet-5 and fully connected networks
    on digits, MNIST and Fashion-MNIST, ten classes; two of them had an index above 2), targets of working attacks at
    .45 and below on digits, up to .59 elsewhere.
    Source: Wang et al., IEEE S&P 2019, section IV.C; Iglewicz and Hoaglin, "How to Detect and Handle Outliers", 1993.
    """
    order = np.argsort(norms)
    gap = np.zeros(len(norms), dtype=bool)
    gap[order[0]] = norms[order[0]] < (SMALL_MASK if len(norms) > 2 else SMALL_OF_TWO) * norms[order[1]]
    outlier = (anomaly_indices(norms) > THRESHOLD) | (anomaly_indices(np.log(norms)) > LOG_THRESHOLD)
    return (norms < SMALL_MASK * np.median(norms)) & (outlier | gap)


def check_accuracy(
    classifier: Classifier, pixels: NDArray[np.float32], data: ImageSet, preprocess: Preprocess
) -> float:
    """Clean accuracy; DataError when it is near chance."""
    logits, _ = extract(classifier, pixels, preprocess)
    if not np.isfinite(logits).all():
        raise DataError(f"{data.origin}: the model's logits are not finite; check --scale, --mean and --std")
    accuracy = float((logits.argmax(1) == data.labels).mean())
    chance = 1.0 / classifier.n_classes
    if accuracy < chance + 0.2 * (1.0 - chance):
        raise DataError(
            f"{data.origin}: the model gets only {accuracy:.1%} of these images right (chance: {chance:.1%}); check --scale, "
            f"--mean, --std (now scale {preprocess.scale:g}, mean {preprocess.mean}, std {preprocess.std}) and the class order"
        )
    return accuracy


def read_inspection(path: str | Path) -> Inspection:
    """Read the patterns.safetensors of an inspection.  Raises DataError."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected the patterns.safetensors that `inflight-edge inspect` writes")
    try:
        with safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {}).get("inspection", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if not isinstance(header, dict) or header.get("format") != FORMAT or header.get("version") != 1:
            raise DataError(f"{path}: not an inspection of version 1; run `inflight-edge inspect` again")
        preprocess = Preprocess(
            tuple(header["input_shape"]), header["scale"], tuple(header["mean"]), tuple(header["std"])
        )
        masks, patterns, norms, success = (tensors[name] for name in ("masks", "patterns", "norms", "success"))
        names = tuple(header["class_names"]) if header["class_names"] else None
        suspects = tuple(int(c) for c in header["suspects"])
        accuracy, feature_layer = float(header["accuracy"]), header["feature_layer"]
        texts = [*(names or ()), *([] if feature_layer is None else [feature_layer])]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("class names and feature layer: expected text")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, OptionError) as error:
        raise DataError(f"{path}: not a readable inspection ({error}); run `inflight-edge inspect` again") from error
    n_classes, (channels, height, width) = len(masks), preprocess.input_shape
    shapes = {"masks": (n_classes, height, width), "patterns": (n_classes, channels, height, width)}
    shapes |= {"norms": (n_classes,), "success": (n_classes,)}
    limits = {"masks": (0.0, 1.0), "patterns": (0.0, 1.0), "norms": (1e-12, np.inf), "success": (0.0, 1.0)}
    for name, shape in shapes.items():
        values, (low, high) = tensors[name], limits[name]
        if values.shape != shape or not np.isfinite(values).all():
            raise DataError(
                f"{path}: {name}: expected finite numbers of shape {shape}, got shape {values.shape}; "
                "run `inflight-edge inspect` again"
            )
        dtype = np.dtype(np.float32 if name in ("masks", "patterns") else np.float64)
        if values.dtype != dtype or not ((values >= low) & (values <= high)).all():
            raise DataError(
                f"{path}: {name}: expected {dtype} from {low:g} to {high:g}, got {values.dtype} from "
                f"{values.min():g} to {values.max():g}; run `inflight-edge inspect` again"
            )
    if not all(0 <= c < n_classes for c in suspects) or (names is not None and len(names) != n_classes):
        raise DataError(
            f"{path}: suspects or class names do not fit {n_classes} classes; run `inflight-edge inspect` again"
        )
    estimates = tuple(
        PatchEstimate(c, masks[c], patterns[c], float(norms[c]), float(success[c])) for c in range(n_classes)
    )
    return Inspection(estimates, anomaly_indices(norms), suspects, accuracy, preprocess, feature_layer, names)


def _finite(value: float) -> float | None:
    """A number for JSON, None where it is infinite."""
    return round(float(value), 4) if np.isfinite(value) else None


def _save_png(path: Path, planes: NDArray[np.float32]) -> None:
    """Save (channels, H, W) in 0..1 as a picture, enlarged to at least 256 pixels; the first 3 channels as colour."""
    from PIL import Image

    image = np.rint(np.clip(planes, 0, 1) * 255).astype(np.uint8)
    array = image[0] if len(image) < 3 else image[:3].transpose(1, 2, 0)
    factor = max(1, -(-256 // max(array.shape[:2])))
    Image.fromarray(array).resize((array.shape[1] * factor, array.shape[0] * factor), Image.Resampling.NEAREST).save(
        path
    )
