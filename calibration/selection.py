"""Which density a guard gets: cross-fitting on the defence set, without any true trigger."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from joblib import Parallel, delayed
from numpy.typing import NDArray
from scipy.stats import norm
from sklearn.model_selection import StratifiedKFold
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from inflight_edge.calibration.density import (
    GuardEstimator,
    balanced,
    best_other,
    build_guard,
    fit_components,
    margins,
    standardiser,
)
from inflight_edge.errors import DataError
from inflight_edge.guard import Guard, Kind, packed_size
from inflight_edge.scoring.reference import log_likelihoods

__all__ = [
    "Candidate",
    "Choice",
    "Trial",
    "candidates",
    "fit",
    "folds",
    "preference",
    "select",
    "tried",
    "verdict_error",
]

MAX_FACTOR_FEATURES = 4096
MAX_PARAMETER_BYTES = 256 << 20
MAX_FULL_FEATURES = 1024


@dataclass(frozen=True, slots=True)
class Candidate:
    """One form of density; the fields are GuardEstimator's parameters."""

    kind: Kind
    n_components: int
    regularisation: float
    shrinkage: float = 0.0

    def __str__(self) -> str:
        text = f"{self.kind}, {self.n_components} component{'s' if self.n_components > 1 else ''}"
        text += f", regularisation {self.regularisation:g}"
        return text + (f", shrinkage {self.shrinkage:g}" if self.kind == "full" else "")


@dataclass(frozen=True, slots=True)
class Trial:
    """Held-out figures of a candidate.

    false_alarms   share of clean target features flagged.     missed  share of triggered features not flagged.
    verdict_error  see verdict_error: a hundred margins may all be right and yet lie close to 0.
    source_error   share of triggered features without their right source.
    """

    candidate: Candidate
    false_alarms: float
    missed: float
    verdict_error: float
    source_error: float


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """The winner with its reason, all trials in order of preference, and the winner's held-out figures.

    clean_margins  ascending, one of each of the target's images.     margins, sources  (N,) of every sample, in their order:
    nats, and the best class but the target.
    """

    best: Trial
    reason: str
    trials: tuple[Trial, ...]
    clean_margins: NDArray[np.float32]
    margins: NDArray[np.float32]
    sources: NDArray[np.int64]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for the bundle's metrics."""
        return {"reason": self.reason, "chosen": asdict(self.best), "trials": [asdict(trial) for trial in self.trials]}


def candidates(n_features: int, n_classes: int) -> list[Candidate]:
    """The forms worth trying for D features: full ones only where their parameters stay affordable."""
    result = [Candidate("diagonal", k, r) for k in (1, 2, 3) for r in (0.1, 0.5)]
    if n_features <= MAX_FACTOR_FEATURES:
        result += [Candidate("shared", k, r) for k in (1, 2) for r in (0.01, 0.03, 0.1)]
    if n_features <= MAX_FULL_FEATURES and n_classes * packed_size(n_features) * 4 <= MAX_PARAMETER_BYTES:
        result += [Candidate("full", 1, r, s) for r in (0.03, 0.1) for s in (0.5, 0.8, 0.95)]
        result += [Candidate("full", 1, 0.5, s) for s in (0.0, 0.5)]
    return result


def select(
    features: NDArray[np.float32],
    labels: NDArray[np.int64],
    target: int,
    *,
    images: NDArray[np.int64] | None = None,
    options: list[Candidate] | None = None,
    n_folds: int = 5,
    seed: int = 0,
    progress: bool = True,
) -> Choice:
    """Choose among candidates by cross-fitting; the standardiser is fitted inside the folds.

    features  (N, D): clean ones of the target, triggered-by-estimate ones of every other class.
    labels    (N,) true classes.   n_folds  lowered where a class has fewer images.
    images    (N,) which image each sample shows: all views of an image are held out together.  None: one sample each.
    The folds run where joblib is told to, one after another unless told: joblib.parallel_config(backend="dask") spreads
    them over a cluster.  The numbers do not depend on it.
    First the lowest verdict error, where all up to 1 / images are alike; then the lowest source error.
    Raises DataError when a class has too few images, and for features that are not finite; GuardError for features whose
    densities float32 cannot hold.
    """
    if not np.isfinite(features).all():
        raise DataError("the model's features are not finite; check --scale, --mean and --std")
    features64 = np.asarray(features, np.float64)
    classes = np.unique(labels)
    images = np.arange(len(labels)) if images is None else images
    first = np.unique(images, return_index=True)[1]
    smallest = int(min(np.count_nonzero(labels[first] == c) for c in classes))
    if smallest < 3:
        raise DataError(
            f"expected at least 3 images of each class to choose a density, got {smallest}; add clean images"
        )
    if options is None:
        options = candidates(features.shape[1], len(classes))
    held_out_margins = np.full((len(options), len(labels)), np.nan)
    sources = np.full((len(options), len(labels)), -1)
    parts = [(~held_out, held_out) for held_out in folds(labels, images, min(n_folds, smallest), seed)]
    with tqdm(parts, desc="densities", unit="fold", disable=not progress) as bar:
        held = Parallel()(
            delayed(_score_fold)(features64[kept], labels[kept], features[held_out], target, options)
            for kept, held_out in bar
        )
    for (_, held_out), (margin, source) in zip(parts, held, strict=True):
        held_out_margins[:, held_out], sources[:, held_out] = margin, source
    trials = [
        _trial(option, margin, source, labels, target)
        for option, margin, source in zip(options, held_out_margins, sources, strict=True)
    ]
    order = sorted(range(len(trials)), key=lambda i: _preference(trials[i], len(first)))
    ranked = [trials[i] for i in order]
    winner = held_out_margins[order[0]].astype(np.float32)
    clean = np.sort(winner[first[labels[first] == target]])
    return Choice(ranked[0], _reason(ranked, len(first)), tuple(ranked), clean, winner, sources[order[0]])


def folds(labels: NDArray[np.int64], images: NDArray[np.int64], n_folds: int, seed: int) -> Iterator[NDArray[np.bool_]]:
    """Which samples (N,) each fold holds out, stratified by class; all views of an image are held out together."""
    numbers, first = np.unique(images, return_index=True)
    splitter = StratifiedKFold(n_folds, shuffle=True, random_state=seed)
    for _, held_out in splitter.split(first, labels[first]):
        yield np.isin(images, numbers[held_out])


def fit(features: NDArray[np.float32], labels: NDArray[np.int64], target: int, choice: Choice) -> Guard:
    """The guard of the chosen density, fitted to all features, with the held-out clean margins of the choice."""
    estimator = GuardEstimator(target, **asdict(choice.best.candidate)).fit(features, labels)
    return replace(estimator.guard_, clean_margins=choice.clean_margins)


def tried(
    features: NDArray[np.float32],
    labels: NDArray[np.int64],
    held_out: NDArray[np.float32],
    held_out_labels: NDArray[np.int64],
    target: int,
    candidate: Candidate,
) -> Trial:
    """Figures on held-out features (M, D) of a density that is fitted to features (N, D)."""
    fitted = np.asarray(features, np.float64)
    (margin,), (source,) = _score_fold(fitted, labels, held_out, target, [candidate])
    return _trial(candidate, margin, source, held_out_labels, target)


def _score_fold(
    features: NDArray[np.float64],
    labels: NDArray[np.int64],
    held_out: NDArray[np.float32],
    target: int,
    options: list[Candidate],
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Margins and sources (options, held-out samples) by the guards fitted to a fold's features."""
    found: dict[int, tuple[NDArray[np.float64], NDArray[np.int64]]] = {}
    # Small matrices: on a busy machine the threads of the linear algebra wait on each other.
    with threadpool_limits(1) if features.shape[1] < 1024 else nullcontext():
        for number, guard in _fit_all(features, labels, target, options):
            scores = log_likelihoods(guard, held_out)
            found[number] = margins(scores, guard.target_row), guard.classes[best_other(scores, guard.target_row)]
    in_order = [found[number] for number in range(len(options))]
    return np.stack([margin for margin, _ in in_order]), np.stack([source for _, source in in_order])


def _fit_all(
    features: NDArray[np.float64], labels: NDArray[np.int64], target: int, options: list[Candidate]
) -> Iterator[tuple[int, Guard]]:
    """One guard per option, with its position; options with equal component counts share the mixtures, of which one count's are
    held at a time: their residuals are as large as all features.
    """
    weights = balanced(labels, target)
    standard = standardiser(features, weights)
    z = (features - standard[0]) / standard[1]
    classes = np.unique(labels)
    for count in sorted({option.n_components for option in options}):
        fitted = fit_components(z, labels, weights, n_components=count, random_state=0)
        for number, option in enumerate(options):
            if option.n_components == count:
                guard = build_guard(
                    target,
                    classes,
                    standard,
                    fitted,
                    kind=option.kind,
                    regularisation=option.regularisation,
                    shrinkage=option.shrinkage,
                )
                yield number, guard


def _trial(
    candidate: Candidate,
    margin: NDArray[np.float64],
    sources: NDArray[np.int64],
    labels: NDArray[np.int64],
    target: int,
) -> Trial:
    clean, flagged = labels == target, ~(margin < 0)
    right = flagged & (sources == labels)
    false_alarms, missed = float(flagged[clean].mean()), float(1.0 - flagged[~clean].mean())
    error = verdict_error(margin[clean], margin[~clean])
    return Trial(candidate, false_alarms, missed, error, float(1.0 - right[~clean].mean()))


def verdict_error(clean: NDArray[np.float64], triggered: NDArray[np.float64]) -> float:
    """Mean of the shares of clean margins that are flagged and of triggered ones that are not.

    Either counted or that of normal distributions with the margins' means and deviations, whichever is larger.
    """
    counted = (float((clean >= 0).mean()), float((triggered < 0).mean()))
    normal = (_tail(clean, counted[0]), _tail(-triggered, counted[1]))
    return max(sum(counted), sum(normal)) / 2


def _tail(values: NDArray[np.float64], counted: float) -> float:
    """Probability of more than 0 under the normal distribution with the values' mean and deviation."""
    deviation = values.std()
    return float(norm.sf(-values.mean() / deviation)) if deviation > 0 else counted


def preference(verdict_error: float, source_error: float, n_images: int) -> tuple[float, float]:
    """Order of held-out errors, the best first: the verdict's, then the source's.

    Verdict errors up to 1 / n_images are alike.  A clean image of the target that is flagged weighs more than that, half of
    its share among these: false alarms come first.
    """
    return max(verdict_error, 1 / n_images), source_error


def _preference(trial: Trial, n_images: int) -> tuple[float, float, float]:
    return (*preference(trial.verdict_error, trial.source_error, n_images), trial.verdict_error)


def _reason(order: list[Trial], n_images: int) -> str:
    best = order[0]
    alike = [t for t in order if _preference(t, n_images)[0] == _preference(best, n_images)[0]]
    text = (
        f"{best.candidate}: held-out verdict error {best.verdict_error:.4f} (false alarms {best.false_alarms:.4f}, missed "
        f"{best.missed:.4f}), "
    )
    if len(alike) == 1:
        return text + f"the lowest of {len(order)} densities"
    return (
        text + f"source error {best.source_error:.4f}, the lowest of the {len(alike)} of {len(order)} densities as good"
    )
