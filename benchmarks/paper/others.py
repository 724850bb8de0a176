"""The other defences on the frames that the guard judged: those that the classifier predicts as the target.

A classifier that was trained in bfloat16 autocast runs in it here, too, where the processor computes in it: in half
the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.paper.classifiers import Experiment
from inflight_edge.calibration.baselines import B3D, Baseline, NeuronFilter, Strip, compare
from inflight_edge.calibration.features import extract
from inflight_edge.calibration.inspection import Inspection
from inflight_edge.calibration.model import Classifier, load_classifier
from inflight_edge.calibration.patching import patch
from inflight_edge.calibration.train import predict

__all__ = ["other_defences", "patching"]

# STRIP runs 100 forwards a frame, patching predicts anew at each rate: seeded parts of the frames are enough.
STRIP_TRIGGERED, STRIP_CLEAN, STRIP_BLENDS = 1000, 400, 100
PATCHED_FRAMES = 2000


def other_defences(case: Experiment, program: Path, inspection: Inspection, *, progress: bool) -> list[dict[str, Any]]:
    """One record per defence.  Empty when the inspection suspected no class."""
    if not inspection.suspects:
        return []
    classifier = load_classifier(program, image_shape=case.test.image_shape, feature_layer="penultimate")
    with _arithmetic(case):
        return _other_defences(case, classifier, inspection, progress)


def _arithmetic(case: Experiment) -> AbstractContextManager[None]:
    """That of the training.  Without its cache: autocast would keep the weights of before a fine-tuning."""
    return torch.autocast("cpu", torch.bfloat16, enabled=case.recipe.in_bfloat16, cache_enabled=False)


def _other_defences(
    case: Experiment, classifier: Classifier, inspection: Inspection, progress: bool
) -> list[dict[str, Any]]:
    target = inspection.suspects[0]
    estimate, preprocess = inspection.estimates[target], case.preprocess

    def as_target(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        return pixels[extract(classifier, pixels, preprocess)[0].argmax(1) == target]

    sources = case.attacked(target)
    stamped = case.trigger.embed(np.asarray(sources.images)).transpose(0, 3, 1, 2).astype(np.float32)
    triggered = as_target(stamped)
    clean = as_target(case.test.subset(case.test.labels == target).pixels(preprocess))
    of_target = case.defence.subset(case.defence.labels == target).pixels(preprocess)
    own = as_target(of_target)
    others = case.defence.subset(case.defence.labels != target).pixels(preprocess)
    rng = np.random.default_rng(case.seed)
    overlays = others[rng.permutation(len(others))[:STRIP_BLENDS]]
    defences: dict[str, Baseline] = {
        "nc": NeuronFilter.fit(classifier, preprocess, estimate, others),
        "nc-target": NeuronFilter.fit(classifier, preprocess, estimate, others, above=of_target),
        "b3d": B3D(classifier, preprocess, estimate),
        "strip": Strip(classifier, preprocess, overlays, progress),
    }
    records = []
    for name, defence in defences.items():
        attacked, innocent = triggered, clean
        if name == "strip":
            attacked, innocent = _part(triggered, STRIP_TRIGGERED, rng), _part(clean, STRIP_CLEAN, rng)
        figures: dict[str, Any] = {"n_clean": len(innocent), "n_triggered": len(attacked)}
        if len(innocent) and len(attacked) and len(own):
            figures |= compare(*(defence.suspicion(frames) for frames in (attacked, innocent, own)))
        records.append({"detector": name, "target_class": target, **figures})
    return records


def patching(case: Experiment, inspection: Inspection, rates: Sequence[float]) -> list[dict[str, Any]]:
    """Neural Cleanse's patching at each learning rate: its prediction is the source of the frames that reach the target."""
    if not inspection.suspects:
        return []
    with _arithmetic(case):
        return _patching(case, inspection, rates)


def _patching(case: Experiment, inspection: Inspection, rates: Sequence[float]) -> list[dict[str, Any]]:
    target = inspection.suspects[0]
    rng = np.random.default_rng(case.seed)
    sources = case.attacked(target)
    sources = sources.subset(_positions(len(sources), PATCHED_FRAMES, rng))
    test = case.test.subset(_positions(len(case.test), PATCHED_FRAMES, rng))
    frames = case.trigger.embed(np.asarray(sources.images))
    judged = predict(case.network, frames, case.preprocess) == target
    records = []
    for rate in rates:
        patched = patch(
            case.network, np.asarray(case.clean_training.images), case.clean_training.labels, case.preprocess,
            inspection.estimates[target], rate=rate, seed=case.seed,
        )  # fmt: skip
        accuracy = float((predict(patched, np.asarray(test.images), case.preprocess) == test.labels).mean())
        right = None
        if judged.any():
            right = float((predict(patched, frames[judged], case.preprocess) == sources.labels[judged]).mean())
        record = {"detector": "nc", "target_class": target, "learning_rate": rate, "n_triggered": int(judged.sum())}
        records.append({**record, "sia": right, "acc_patched": accuracy})
    return records


def _part(frames: NDArray[np.float32], most: int, rng: np.random.Generator) -> NDArray[np.float32]:
    return frames[_positions(len(frames), most, rng)]


def _positions(count: int, most: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """At most so many of ``count`` positions, ascending."""
    return np.sort(rng.permutation(count)[:most])
