"""The guard's estimator: standardise features, fit one Gaussian mixture per class, export a Guard."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cholesky, solve_triangular
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from sklearn.utils.validation import check_array, check_is_fitted, check_X_y

from inflight_edge.errors import DataError, OptionError
from inflight_edge.guard import KINDS, MAX_FEATURES, Guard, Kind
from inflight_edge.scoring.reference import log_likelihoods

__all__ = [
    "Components",
    "GuardEstimator",
    "balanced",
    "best_other",
    "build_guard",
    "fit_components",
    "margins",
    "standardiser",
    "whiteners",
]

Float64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Components:
    """Mixture components of all classes before a covariance form is chosen.

    With D features, M components over R classes:
    offsets (R + 1,) component ranges; weights (M,); means (M, D); residuals, one (n, D) array per
    component: its class's samples minus the mean, times the root of their responsibility and weight; totals (M,)
    responsibility times weight.
    """

    offsets: NDArray[np.int32]
    weights: Float64
    means: Float64
    residuals: list[Float64]
    totals: Float64


class GuardEstimator(BaseEstimator):  # type: ignore[misc]
    """Class-conditional densities of standardised features, in scikit-learn's manner.

    Parameters
    ----------
    target : int
        The suspected target class.
    kind : {"diagonal", "shared", "full"}
        Covariance form: per component and diagonal; one matrix for all classes; one matrix per component.
    n_components : int
        Gaussian components per class, at least 1 (fewer where a class has fewer samples).
    regularisation : float
        Added to the variances of the standardised features, > 0.
    shrinkage : float
        For ``full``: weight in 0..1 of the covariance pooled over all classes against the class's own.
        Source: Friedman, "Regularized Discriminant Analysis", JASA 1989.
    balance : bool
        In the standardiser and the pooled covariance the target weighs as much as all other classes together, since the
        verdict is between these two.  False: every sample weighs the same.
    random_state : int
        Seed of the mixtures' initialisation.

    Attributes
    ----------
    guard_ : Guard
        The fitted parameters, ready for the scorers and the bundle.
    classes_ : (R,) int64
        Classes that have a density.
    n_features_in_ : int
        D.
    """

    def __init__(
        self,
        target: int = 0,
        *,
        kind: Kind = "diagonal",
        n_components: int = 1,
        regularisation: float = 0.1,
        shrinkage: float = 0.0,
        balance: bool = True,
        random_state: int = 0,
    ) -> None:
        self.target = target
        self.kind = kind
        self.n_components = n_components
        self.regularisation = regularisation
        self.shrinkage = shrinkage
        self.balance = balance
        self.random_state = random_state

    def fit(self, features: NDArray[np.floating], labels: NDArray[np.integer]) -> GuardEstimator:
        """Fit to features (N, D) and their true classes (N,): the target's clean, all others' with the pattern.

        Raises OptionError for a parameter out of range, DataError when a class has fewer than 2 samples.
        """
        self._check_parameters()
        features, labels = check_X_y(features, labels, dtype=np.float64, ensure_min_features=1)
        if features.shape[1] > MAX_FEATURES:
            raise DataError(
                f"features: expected at most {MAX_FEATURES}, got {features.shape[1]}; name another feature layer"
            )
        self.classes_ = np.unique(labels)
        self.n_features_in_ = int(features.shape[1])
        if self.target not in self.classes_ or len(self.classes_) < 2:
            raise DataError(
                f"labels: expected samples of the target {self.target} and of another class, got {self.classes_}"
            )
        weights = balanced(labels, self.target) if self.balance else np.ones(len(labels))
        mean, scale = standardiser(features, weights)
        components = fit_components(
            (features - mean) / scale,
            labels,
            weights,
            n_components=self.n_components,
            random_state=self.random_state,
        )
        self.guard_ = build_guard(
            self.target,
            self.classes_,
            (mean, scale),
            components,
            kind=self.kind,
            regularisation=self.regularisation,
            shrinkage=self.shrinkage,
        )
        return self

    def score_samples(self, features: NDArray[np.floating]) -> Float64:
        """Log-likelihood in nats of features (N, D) under every class: (N, R), columns as ``classes_``."""
        check_is_fitted(self, "guard_")
        features = check_array(features, dtype=np.float32)
        if features.shape[1] != self.n_features_in_:
            raise DataError(f"features: expected {self.n_features_in_} columns, got {features.shape[1]}")
        return np.asarray(log_likelihoods(self.guard_, features), dtype=np.float64)

    def decision_function(self, features: NDArray[np.floating]) -> Float64:
        """Margin (N,) in nats: best non-target log-likelihood minus the target's; >= 0 is a trigger."""
        return margins(self.score_samples(features), self.guard_.target_row)

    def predict(self, features: NDArray[np.floating]) -> NDArray[np.int64]:
        """The class (N,) that explains the features best: the target (clean) or a trigger's source."""
        scores = self.score_samples(features)
        row = np.where(
            self.decision_function(features) < 0, self.guard_.target_row, best_other(scores, self.guard_.target_row)
        )
        return np.asarray(self.classes_[row], dtype=np.int64)

    def _check_parameters(self) -> None:
        if self.kind not in KINDS:
            raise OptionError(f"kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.n_components < 1:
            raise OptionError(f"n_components: expected at least 1, got {self.n_components}")
        if not self.regularisation > 0:
            raise OptionError(f"regularisation: expected a number > 0, got {self.regularisation}")
        if not 0 <= self.shrinkage <= 1:
            raise OptionError(f"shrinkage: expected a number in 0..1, got {self.shrinkage}")


def best_other(scores: Float64, target_row: int) -> NDArray[np.intp]:
    """Column (N,) of the best log-likelihood (N, R) that is not the target's."""
    others = scores.copy()
    others[:, target_row] = -np.inf
    return np.argmax(others, axis=1)


def margins(scores: Float64, target_row: int) -> Float64:
    """Margins (N,) from log-likelihoods (N, R): best non-target minus target."""
    best = best_other(scores, target_row)
    result: Float64 = scores[np.arange(len(scores)), best] - scores[:, target_row]
    return result


def build_guard(
    target: int,
    classes: NDArray[np.integer],
    standard: tuple[Float64, Float64],
    components: Components,
    *,
    kind: Kind,
    regularisation: float,
    shrinkage: float,
) -> Guard:
    """A Guard (float32, without clean margins) from a standardiser (mean, scale) and fitted components."""
    whitener = whiteners(components, kind=kind, regularisation=regularisation, shrinkage=shrinkage)
    return Guard(
        target=int(target),
        kind=kind,
        classes=classes.astype(np.int32),
        offsets=components.offsets.copy(),
        mean=standard[0].astype(np.float32),
        scale=standard[1].astype(np.float32),
        means=components.means.astype(np.float32),
        log_weights=np.log(components.weights).astype(np.float32),
        whitener=whitener.astype(np.float32),
        clean_margins=np.empty(0, np.float32),
    )


def balanced(labels: NDArray[np.integer], target: int) -> Float64:
    """Weights (N,) of mean 1 by which the target's samples count as much as all others together."""
    own = labels == target
    return np.where(own, 0.5 / own.mean(), 0.5 / (1.0 - own.mean()))


def standardiser(features: Float64, weights: Float64) -> tuple[Float64, Float64]:
    """Mean and standard deviation (D,) of each feature under the samples' weights (N,); 1 where a feature is constant."""
    mean: Float64 = np.average(features, axis=0, weights=weights)
    deviation: Float64 = np.sqrt(np.average((features - mean) ** 2, axis=0, weights=weights))
    floor = 1e-6 * max(float(deviation.max()), float(np.finfo(np.float32).tiny))
    return mean, np.where(deviation > floor, deviation, 1.0)


def fit_components(
    z: Float64, labels: NDArray[np.integer], weights: Float64, *, n_components: int, random_state: int
) -> Components:
    """Mixture components of every class from standardised features z (N, D), by EM with diagonal covariances.

    weights  (N,) of the samples in a pooled covariance, the same within a class.
    A class never gets more components than a third of its samples.  Raises DataError for a class with one sample.
    """
    offsets, shares, means, residuals, totals = [0], [], [], [], []
    for label in np.unique(labels):
        own = z[labels == label]
        if len(own) < 2:
            raise DataError(f"class {label}: expected at least 2 samples to fit a density, got {len(own)}")
        count = max(1, min(n_components, len(own) // 3))
        if count == 1:
            responsibility = np.ones((len(own), 1))
        else:
            mixture = GaussianMixture(count, covariance_type="diag", reg_covar=0.1, random_state=random_state)
            with warnings.catch_warnings():  # duplicates among few samples: the mixture is still a valid density
                warnings.simplefilter("ignore", ConvergenceWarning)
                responsibility = mixture.fit(own).predict_proba(own)
            responsibility = responsibility[:, responsibility.sum(axis=0) > 1e-3]
        responsibility = responsibility * weights[labels == label][:, None]
        total = responsibility.sum(axis=0)
        centre = (responsibility.T @ own) / total[:, None]
        for k in range(len(total)):
            residuals.append(np.sqrt(responsibility[:, k : k + 1]) * (own - centre[k]))
        means.append(centre)
        totals.append(total)
        shares.append(total / total.sum())
        offsets.append(offsets[-1] + len(total))
    return Components(
        np.asarray(offsets, np.int32), np.concatenate(shares), np.concatenate(means), residuals, np.concatenate(totals)
    )


def whiteners(components: Components, *, kind: Kind, regularisation: float, shrinkage: float) -> Float64:
    """The whitening factors of a covariance form, packed as Guard.whitener wants them."""
    if kind == "diagonal":
        variances = np.stack(
            [(r**2).sum(axis=0) / t for r, t in zip(components.residuals, components.totals, strict=True)]
        )
        result: Float64 = 1.0 / np.sqrt(variances + regularisation)
        return result
    stacked = np.concatenate(components.residuals)
    pooled = (stacked.T @ stacked) / components.totals.sum()
    if kind == "shared":
        return _packed_whitener(pooled, regularisation)
    factors = []
    for residual, total in zip(components.residuals, components.totals, strict=True):
        own = (residual.T @ residual) / total
        factors.append(_packed_whitener((1 - shrinkage) * own + shrinkage * pooled, regularisation))
    return np.stack(factors)


def _packed_whitener(covariance: Float64, regularisation: float) -> Float64:
    n_features = len(covariance)
    root = cholesky(covariance + regularisation * np.eye(n_features), lower=True)
    inverse: Float64 = solve_triangular(root, np.eye(n_features), lower=True)
    return inverse[np.tril_indices(n_features)]
