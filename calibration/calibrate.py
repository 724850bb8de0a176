"""From an inspected classifier to a bundle: features, densities, ONNX, self-test."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inflight_edge._layout import MAX_MANIFEST_BYTES
from inflight_edge.bundle import PRECISIONS, Bundle, SelfTest, Variant
from inflight_edge.calibration.datasets import ImageSet, check_names
from inflight_edge.calibration.evidence import guard_evidence, trimmed
from inflight_edge.calibration.export import check_parity, export_onnx
from inflight_edge.calibration.features import extract
from inflight_edge.calibration.inspection import Inspection, check_accuracy, further_estimates
from inflight_edge.calibration.model import Classifier
from inflight_edge.calibration.precision import to_fp16, to_int8
from inflight_edge.calibration.samples import (
    FEW_IMAGES,
    Plan,
    Samples,
    View,
    are_few,
    collect,
    plan,
    recognised,
    spread,
)
from inflight_edge.calibration.selection import Choice, Trial, fit, folds, preference, select, tried
from inflight_edge.calibration.unlearning import joined, unlearned
from inflight_edge.engines.onnxruntime import OnnxRuntimeEngine
from inflight_edge.errors import DataError, GuardError, ModelError, OptionError
from inflight_edge.guard import Guard
from inflight_edge.preprocess import Preprocess
from inflight_edge.scoring.reference import log_likelihoods
from inflight_edge.verdict import Decision, Verdict, decide

__all__ = ["UNLEARN", "calibrate", "check_unlearn", "copy_helps"]

# Whether the logits of an unlearned copy are joined.
UNLEARN = ("never", "auto", "always")

_CONVERT = {"fp16": to_fp16, "int8": to_int8}
# A self-test's frames have a larger margin (nats) and gap between the two largest logits than what the engines of a
# precision may differ by.
_CLEAR = {"fp32": (1.0, 1e-2), "fp16": (4.0, 5e-2), "int8": (16.0, 2.5e-1)}
_LEAST_AGREEMENT = 0.9


def calibrate(
    classifier: Classifier,
    data: ImageSet,
    inspection: Inspection,
    *,
    targets: Sequence[int] | None = None,
    precisions: Sequence[str] = ("fp32",),
    unlearn: str = "never",
    seed: int = 0,
    progress: bool = True,
) -> Bundle:
    """Fit a guard for every suspected target and assemble the bundle.

    Where the classifier offers alternative feature layers, those with the lowest held-out errors are taken, first of the
    verdict, down to 1 / images, then of the source, means over the targets; its own where no others are better.

    data        clean labelled images.    targets  classes to guard; None takes the inspection's suspects.
    precisions  of the classifier's arithmetic, of PRECISIONS; fp32 is always there.  Each has guards of its own.
    unlearn     of UNLEARN, whether to join the logits of a copy that has unlearned the patterns: most often it finds more
                sources, and every frame takes two networks' time.  "auto": where held-out images say so.
    Raises OptionError without any target, DataError, GuardError or ModelError when data or model do not fit.
    """
    preprocess = inspection.preprocess
    chosen = tuple(inspection.suspects if targets is None else targets)
    if unknown := sorted(set(precisions) - set(PRECISIONS)):
        raise OptionError(f"precision: expected any of {', '.join(PRECISIONS)}, got {unknown[0]!r}")
    _check_targets(chosen, classifier.n_classes, inspection.rows()[0]["class"])
    if len(inspection.estimates) != classifier.n_classes or preprocess.input_shape != classifier.input_shape:
        raise DataError(
            f"inspection: made for {len(inspection.estimates)} classes and input {preprocess.input_shape}, but the model has "
            f"{classifier.n_classes} and {classifier.input_shape}; inspect this model"
        )
    names = inspection.class_names or tuple(str(c) for c in range(classifier.n_classes))
    check_names(names, "class names")
    data.check_labels(classifier.n_classes, every_class=True)
    check_unlearn(unlearn, data.labels)
    pixels = data.pixels(preprocess)
    accuracy = check_accuracy(classifier, pixels, data, preprocess)
    views = recognised(classifier, pixels, data.labels, preprocess)
    plans = {t: plan(classifier, pixels, data.labels, inspection.estimates[t], views, preprocess) for t in chosen}
    if are_few(data.labels):
        estimates = [inspection.estimates[t] for t in chosen]
        further = further_estimates(
            classifier, pixels, data.labels, preprocess, estimates, seed=seed, progress=progress
        )
        plans = {t: replace(plans[t], further=found) for t, found in zip(chosen, further, strict=True)}
    case = _Case(data, pixels, preprocess, inspection, plans, views, seed, progress)
    base = classifier
    classifier, choices, layers = _best_layers(case, classifier)
    gain = None
    if unlearn != "never":
        classifier, choices, gain = _with_copy_perhaps(case, classifier, choices, base, unlearn)
    model = export_onnx(classifier)
    parity = check_parity(classifier, model, preprocess.normalise(pixels[spread(len(pixels), 64)]))
    first = _fit(case, classifier, choices, "fp32")
    variants, reports = {}, {}
    for precision in [name for name in PRECISIONS[1:] if name in precisions]:
        converted = _CONVERT[precision](model, preprocess.normalise(pixels[spread(len(pixels), 512)]))
        engine = OnnxRuntimeEngine(converted)
        agreement = _agreement(
            precision, extract(engine, pixels, preprocess)[0], extract(classifier, pixels, preprocess)[0]
        )
        fitted = _fit(case, engine, _choose(case, _collected(case, engine)), precision)
        variants[precision] = Variant(converted, fitted.guards, fitted.self_test)
        reports[precision] = {"top1_agreement": agreement, "guards": fitted.report}
    metrics = {
        "n_images": len(data),
        "accuracy": accuracy,
        "parity": parity,
        "inspection": inspection.rows(),
        "guards": first.report,
        "feature_layers": layers,
        **({} if gain is None else {"unlearned": gain}),
        **({"precisions": reports} if reports else {}),
    }
    return Bundle(
        class_names=names,
        preprocess=preprocess,
        feature_layer=classifier.feature_layer,
        guards=first.guards,
        model=model,
        self_test=first.self_test,
        metrics=trimmed(metrics, MAX_MANIFEST_BYTES * 7 // 8),
        versions=_versions(),
        variants=variants,
    )


def check_unlearn(unlearn: str, labels: NDArray[np.int64]) -> None:
    """Refuse what is none of UNLEARN, OptionError, and a copy from few images (N,) of these labels, DataError."""
    if unlearn not in UNLEARN:
        raise OptionError(f"unlearn: expected one of {', '.join(map(repr, UNLEARN))}, got {unlearn!r}")
    if unlearn != "never" and are_few(labels):  # a copy knows them by heart: measured with 5 of each class
        raise DataError(
            f"unlearn: expected at least {FEW_IMAGES} images of each class; leave out --unlearn or add clean images"
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Case:
    """What every precision is fitted to."""

    data: ImageSet
    pixels: NDArray[np.float32]
    preprocess: Preprocess
    inspection: Inspection
    plans: dict[int, Plan]  # of each target
    views: tuple[View, ...]
    seed: int
    progress: bool

    def part(self, wanted: NDArray[np.bool_]) -> _Case:
        """The same with some of the images."""
        return replace(self, data=self.data.subset(wanted), pixels=self.pixels[wanted])


@dataclass(frozen=True, slots=True, eq=False)
class _Chosen:
    """The density chosen for a target, and what it is fitted to."""

    target: int
    samples: Samples
    choice: Choice


@dataclass(frozen=True, slots=True, eq=False)
class _Fitted:
    guards: tuple[Guard, ...]
    report: list[dict[str, Any]]
    self_test: SelfTest


def _collected(case: _Case, network: Classifier | OnnxRuntimeEngine) -> dict[int, Samples]:
    """Of each target what a guard is fitted to.

    All classes but the target have a density, as published: a single-class trigger spills over to some of them.
    """
    return {
        target: collect(
            network,
            case.pixels,
            case.data.labels,
            case.inspection.estimates[target],
            made,
            case.preprocess,
            seed=case.seed,
            progress=case.progress,
        )
        for target, made in case.plans.items()
    }


def _choose(case: _Case, samples: dict[int, Samples]) -> list[_Chosen]:
    """The density of each target."""
    return [
        _Chosen(
            target, s, select(s.features, s.labels, target, images=s.images, seed=case.seed, progress=case.progress)
        )
        for target, s in samples.items()
    ]


def _best_layers(case: _Case, classifier: Classifier) -> tuple[Classifier, list[_Chosen], list[dict[str, Any]]]:
    """The classifier with the best feature layers on offer, its densities, and a record of each that was tried."""
    best: tuple[tuple[float, float], Classifier, list[_Chosen]] | None = None
    records: list[dict[str, Any]] = []
    failures: list[DataError | GuardError] = []
    samples = _collected(case, classifier.together or classifier)
    n_images = min(len(s.one_each) for s in samples.values())
    first = 0
    for network in (classifier, *classifier.alternatives):
        columns = slice(first, first + network.n_features)
        first = columns.stop
        record: dict[str, Any] = {"feature_layer": network.feature_layer, "n_features": network.n_features}
        records.append(record)
        own = {
            target: replace(s, features=np.ascontiguousarray(s.features[:, columns])) for target, s in samples.items()
        }
        try:
            choices = _choose(case, own)
        except (DataError, GuardError) as error:  # a dead unit of one layer leaves the others
            record["error"] = str(error)
            failures.append(error)
            continue
        errors = record["verdict_error"], record["source_error"] = _errors([chosen.choice.best for chosen in choices])
        rank = preference(*errors, n_images)
        if best is None or rank < best[0]:
            best = rank, network, choices
    if best is None:
        raise failures[0]
    return best[1], best[2], records


def _errors(trials: list[Trial]) -> tuple[float, float]:
    """Held-out errors of the verdict and of the source, means over the targets."""
    return float(np.mean([t.verdict_error for t in trials])), float(np.mean([t.source_error for t in trials]))


def _with_copy(case: _Case, classifier: Classifier, base: Classifier) -> Classifier:
    """The classifier with the logits of a copy of ``base`` that has unlearned all targets' patterns behind its features."""
    patterns = [p for target, made in case.plans.items() for p in made.patterns(case.inspection.estimates[target])]
    return joined(
        classifier,
        unlearned(
            base,
            case.pixels,
            case.data.labels,
            patterns,
            case.views,
            case.preprocess,
            seed=case.seed,
            progress=case.progress,
        ),
    )


def copy_helps(gain: Mapping[str, Any]) -> bool:
    """Whether the held-out errors with an unlearned copy are lower: of the verdict, then of the source."""
    with_it, without = (
        preference(gain[name]["verdict_error"], gain[name]["source_error"], gain["held_out_images"])
        for name in ("with", "without")
    )
    return with_it < without


def _with_copy_perhaps(
    case: _Case, classifier: Classifier, choices: list[_Chosen], base: Classifier, unlearn: str
) -> tuple[Classifier, list[_Chosen], dict[str, Any]]:
    """With an unlearned copy joined where that is wanted, and what it buys.

    With "auto" a copy that is no better, or that cannot be made, is left out, the latter with the reason.
    """
    try:
        gain = _gain(case, classifier, base)
        if unlearn == "auto" and not copy_helps(gain):
            return classifier, choices, {**gain, "joined": False}
        network = _with_copy(case, classifier, base)
        return network, _choose(case, _collected(case, network)), {**gain, "joined": True}
    except (DataError, GuardError, ModelError) as error:
        if unlearn == "always":
            raise
        return classifier, choices, {"joined": False, "reason": str(error)}


def _gain(case: _Case, classifier: Classifier, base: Classifier) -> dict[str, Any]:
    """Errors of the verdict and of the source without an unlearned copy and with one, means over the targets.

    On a fifth of the images that neither the copy nor the densities were fitted to, with the estimated patterns: the logits
    that a copy has of images it was trained on are clearer than others, so that cross-fitting the densities alone would
    flatter it.
    """
    held_out = next(folds(case.data.labels, np.arange(len(case.data)), 5, case.seed))
    kept = case.part(~held_out)
    network = _with_copy(kept, classifier, base)
    seen, unseen = _collected(kept, network), _collected(case.part(held_out), network)
    errors: dict[str, tuple[float, float]] = {}
    for name, n_features in (("without", classifier.n_features), ("with", network.n_features)):
        trials = []
        for target, new in unseen.items():
            known, other = (np.ascontiguousarray(s.features[:, :n_features]) for s in (seen[target], new))
            best = _choose(case, {target: replace(seen[target], features=known)})[0].choice.best
            trials.append(tried(known, seen[target].labels, other, new.labels, target, best.candidate))
        errors[name] = _errors(trials)
    return {
        "held_out_images": int(held_out.sum()),
        **{name: {"verdict_error": verdict, "source_error": source} for name, (verdict, source) in errors.items()},
    }


def _fit(case: _Case, network: Classifier | OnnxRuntimeEngine, choices: list[_Chosen], precision: str) -> _Fitted:
    """Guards of the chosen densities and a self-test on the features of one network."""
    pixels = case.pixels
    step = max(1, len(pixels) // 4)
    guards: list[Guard] = []
    report: list[dict[str, Any]] = []
    frames: list[NDArray[np.float32]] = []
    for chosen in choices:
        target, samples, choice, made = chosen.target, chosen.samples, chosen.choice, case.plans[chosen.target]
        embed = case.inspection.estimates[target].embed
        others = np.flatnonzero(case.data.labels != target)
        guards.append(fit(samples.features, samples.labels, target, choice))
        entry = {"target": target, "asr_estimated": made.success, "density": choice.as_dict()}
        if precision == PRECISIONS[0]:  # one is enough for people, and the manifest is bounded
            entry["samples"] = {"n": len(samples.labels), **made.as_dict()}
            entry["evidence"] = guard_evidence(
                pixels[others[0]],
                embed(pixels[others[:1]])[0],
                samples,
                target,
                choice,
                n_guards=len(case.plans),
                seed=case.seed,
            )
        report.append(entry)
        frames.extend((pixels[case.data.labels == target][:2], embed(pixels[others[::step]])))
    frames.append(pixels[::step])
    test = _self_test(network, case.preprocess, guards, np.concatenate(frames), *_CLEAR[precision])
    return _Fitted(tuple(guards), report, test)


def _agreement(precision: str, logits: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Share of equal predictions.  Raises ModelError when the precision changes the classifier."""
    share = float((logits.argmax(1) == expected.argmax(1)).mean())
    if not share >= _LEAST_AGREEMENT:
        raise ModelError(
            f"model: in {precision} only {share:.1%} of the predictions stay, expected {_LEAST_AGREEMENT:.0%}; "
            f"leave {precision} out of --precision"
        )
    return share


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


def _self_test(
    network: Classifier | OnnxRuntimeEngine,
    preprocess: Preprocess,
    guards: list[Guard],
    pixels: NDArray[np.float32],
    least_margin: float,
    least_gap: float,
) -> SelfTest:
    """Frames whose verdict is far from a tie, so that every correct engine and scorer must reach it."""
    rounded = np.rint(pixels)
    frames = rounded.astype(np.uint8).transpose(0, 2, 3, 1)
    logits, features = extract(network, rounded, preprocess)
    scores = [log_likelihoods(guard, features).astype(np.float32) for guard in guards]
    verdicts: list[Verdict] = []
    for i, predicted in enumerate(logits.argmax(1)):
        guard = next((g for g in guards if g.target == predicted), None)
        if guard is None:
            verdicts.append(Verdict(Decision.UNGUARDED, int(predicted)))
        else:
            row = scores[guards.index(guard)][i]
            verdicts.append(decide(int(predicted), row, guard.classes, guard.target_row))
    clear = [i for i, v in enumerate(verdicts) if v.decision is Decision.UNGUARDED or abs(v.margin) > least_margin]
    gap = np.diff(np.sort(logits, axis=1)[:, -2:], axis=1)[:, 0]
    clear = [i for i in clear if gap[i] > least_gap]
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
