"""From an inspected classifier to a bundle: features, densities, ONNX, self-test."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import version

import numpy as np
from numpy.typing import NDArray

from inflight_edge.bundle import Bundle, SelfTest
from inflight_edge.calibration.datasets import ImageSet
from inflight_edge.calibration.export import check_parity, export_onnx
from inflight_edge.calibration.features import extract
from inflight_edge.calibration.inspection import Inspection, check_accuracy
from inflight_edge.calibration.model import Classifier
from inflight_edge.calibration.selection import Choice, fit, select
from inflight_edge.errors import DataError, OptionError
from inflight_edge.guard import Guard
from inflight_edge.preprocess import Preprocess
from inflight_edge.scoring.reference import log_likelihoods
from inflight_edge.verdict import Decision, Verdict, decide

__all__ = ["calibrate"]


def calibrate(
    classifier: Classifier,
    data: ImageSet,
    inspection: Inspection,
    *,
    targets: Sequence[int] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Bundle:
    """Fit a guard for every suspected target and assemble the bundle.

    data     clean labelled images.    targets  classes to guard; None takes the inspection's suspects.
    Raises OptionError without any target, DataError or ModelError when data or model do not fit.
    """
    preprocess = inspection.preprocess
    chosen = tuple(inspection.suspects if targets is None else targets)
    _check_targets(chosen, classifier.n_classes, inspection.rows()[0]["class"])
    if len(inspection.estimates) != classifier.n_classes or preprocess.input_shape != classifier.input_shape:
        raise DataError(
            f"inspection: made for {len(inspection.estimates)} classes and input {preprocess.input_shape}, but the model has "
            f"{classifier.n_classes} and {classifier.input_shape}; inspect this model"
        )
    data.check_labels(classifier.n_classes, every_class=True)
    pixels = data.pixels(preprocess)
    accuracy = check_accuracy(classifier, pixels, data, preprocess)
    model = export_onnx(classifier)
    sample = np.linspace(0, len(pixels) - 1, min(len(pixels), 64)).astype(int)
    parity = check_parity(classifier, model, preprocess.normalise(pixels[sample]))
    guards: list[Guard] = []
    choices: list[Choice] = []
    successes: list[float] = []
    frames: list[NDArray[np.float32]] = []
    for target in chosen:
        others = data.labels != target
        triggered = pixels.copy()
        triggered[others] = inspection.estimates[target].embed(pixels[others])
        logits, features = extract(classifier, triggered, preprocess, progress=progress)
        if not np.isfinite(features).all():
            raise DataError(f"{data.origin}: the model's features are not finite; check --scale, --mean and --std")
        predicted = logits.argmax(1)
        used = _judged(predicted, data.labels, target)
        choice = select(features[used], data.labels[used], target, seed=seed, progress=progress)
        guards.append(fit(features[used], data.labels[used], target, choice))
        choices.append(choice)
        # Densities are of all other classes, as published: a single-class trigger spills over to some of them.
        own = np.isin(data.labels, inspection.estimates[target].sources)
        successes.append(float((predicted[own] == target).mean()))
        frames.extend((triggered[~others][:2], triggered[others][:: max(1, len(pixels) // 4)]))
    frames.append(pixels[:: max(1, len(pixels) // 4)])
    metrics = {
        "n_images": len(data),
        "accuracy": accuracy,
        "parity": parity,
        "inspection": inspection.rows(),
        "guards": [
            {"target": target, "asr_estimated": success, "density": choice.as_dict()}
            for target, success, choice in zip(chosen, successes, choices, strict=True)
        ],
    }
    names = inspection.class_names or tuple(str(c) for c in range(classifier.n_classes))
    return Bundle(
        class_names=names,
        preprocess=preprocess,
        feature_layer=classifier.feature_layer,
        guards=tuple(guards),
        model=model,
        self_test=_self_test(classifier, preprocess, guards, np.concatenate(frames)),
        metrics=metrics,
        versions=_versions(),
    )


def _check_targets(targets: tuple[int, ...], n_classes: int, first: int) -> None:
    if not targets:
        raise OptionError(
            "no class looks like a backdoor's target, so there is nothing to guard; name one with --target to guard it "
            f"anyway (the most anomalous is class {first})"
        )
    if len(set(targets)) != len(targets):
        raise OptionError(f"targets: expected each class once, got {targets}")
    for target in targets:
        if not 0 <= target < n_classes:
            raise OptionError(f"target: expected a class from 0 to {n_classes - 1}, got {target}")


def _judged(predicted: NDArray[np.int64], labels: NDArray[np.int64], target: int) -> NDArray[np.bool_]:
    """Which samples to fit: those predicted as the target, the only ones a guard ever sees.

    A class of which fewer than half get there keeps all its samples.
    """
    used = predicted == target
    for label in np.unique(labels):
        own = labels == label
        if used[own].mean() < 0.5 or used[own].sum() < 3:
            used[own] = True
    return used


def _self_test(
    classifier: Classifier, preprocess: Preprocess, guards: list[Guard], pixels: NDArray[np.float32]
) -> SelfTest:
    """Frames whose verdict is far from a tie, so that every correct engine and scorer must reach it."""
    rounded = np.rint(pixels)
    frames = rounded.astype(np.uint8).transpose(0, 2, 3, 1)
    logits, features = extract(classifier, rounded, preprocess)
    scores = [log_likelihoods(guard, features).astype(np.float32) for guard in guards]
    verdicts: list[Verdict] = []
    for i, predicted in enumerate(logits.argmax(1)):
        guard = next((g for g in guards if g.target == predicted), None)
        if guard is None:
            verdicts.append(Verdict(Decision.UNGUARDED, int(predicted)))
        else:
            row = scores[guards.index(guard)][i]
            verdicts.append(decide(int(predicted), row, guard.classes, guard.target_row))
    clear = [i for i, v in enumerate(verdicts) if v.decision is Decision.UNGUARDED or abs(v.margin) > 1.0]
    gap = np.diff(np.sort(logits, axis=1)[:, -2:], axis=1)[:, 0]
    clear = [i for i in clear if gap[i] > 1e-2]
    if not clear:
        raise DataError("no image has a clear verdict, so no self-test can be made; use more or other clean images")
    return SelfTest(
        frames=np.ascontiguousarray(frames[clear]),
        logits=logits[clear],
        features=features[clear],
        log_likelihoods=tuple(np.ascontiguousarray(score[clear]) for score in scores),
        decisions=tuple(verdicts[i].decision.value for i in clear),
        sources=np.array([-1 if (s := verdicts[i].source) is None else s for i in clear], np.int32),
    )


def _versions() -> dict[str, str]:
    packages = ("inflight-edge", "numpy", "onnx", "onnxruntime", "scikit-learn", "torch")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
