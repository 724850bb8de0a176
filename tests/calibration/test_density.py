"""The guard's estimator against closed forms and scikit-learn, and the corners of its input."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from scipy.stats import multivariate_normal
from sklearn.base import clone
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.exceptions import NotFittedError
from sklearn.mixture import GaussianMixture

from inflight_edge import Decision, Scorer, decide
from inflight_edge.calibration import density
from inflight_edge.calibration.density import (
    GuardEstimator,
    balanced,
    best_other,
    fit_components,
    margins,
    standardiser,
)
from inflight_edge.errors import DataError, OptionError

KINDS = ("diagonal", "shared", "full")
D, PER_CLASS = 5, 60
RNG = np.random.default_rng(0)
MIXING = RNG.normal(size=(3, D, D)) * 0.6 + np.eye(D)
LABELS = np.repeat([0, 1, 2], PER_CLASS)
FEATURES = (
    np.concatenate([RNG.normal(size=(PER_CLASS, D)) @ MIXING[c] + 1.5 * c for c in range(3)])
    * np.array([1.0, 10.0, 0.1, 1.0, 3.0])
    + 4.0
).astype(np.float32)
# The target, class 0 unless said, weighs as much as the two others.
WEIGHTS = np.where(LABELS == 0, 1.5, 0.75)
MEAN = np.average(FEATURES.astype(np.float64), axis=0, weights=WEIGHTS)
SCALE = np.sqrt(np.average((FEATURES.astype(np.float64) - MEAN) ** 2, axis=0, weights=WEIGHTS))
Z = (FEATURES - MEAN) / SCALE
# Parameters are kept in float32: their rounding, over distances of some tens of nats.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-3}


def covariance(label: int) -> np.ndarray:
    """Of one class's standardised features, normalised by the number of samples."""
    return np.cov(Z[label == LABELS].T, bias=True)


POOLED = covariance(0) / 2 + (covariance(1) + covariance(2)) / 4


def fitted(**parameters: Any) -> GuardEstimator:
    return GuardEstimator(**parameters).fit(FEATURES, LABELS)


def normal_scores(covariances: list[np.ndarray]) -> np.ndarray:
    """Log-likelihoods (N, 3) of one Gaussian per class."""
    means = [Z[c == LABELS].mean(0) for c in range(3)]
    return np.stack([multivariate_normal(means[c], covariances[c]).logpdf(Z) for c in range(3)], 1)


@pytest.mark.parametrize("regularisation", [0.01, 0.5])
def test_diagonal_with_one_component_is_the_closed_form(regularisation: float) -> None:
    covariances = [np.diag(np.diag(covariance(c)) + regularisation) for c in range(3)]
    got = fitted(kind="diagonal", regularisation=regularisation).score_samples(FEATURES)
    np.testing.assert_allclose(got, normal_scores(covariances), **TOLERANCE)
    mixtures = [GaussianMixture(1, covariance_type="diag", reg_covar=regularisation) for _ in range(3)]
    expected = [m.fit(Z[c == LABELS]).score_samples(Z) for c, m in enumerate(mixtures)]
    np.testing.assert_allclose(got, np.stack(expected, 1), **TOLERANCE)


@pytest.mark.parametrize("regularisation", [0.01, 0.5])
def test_shared_is_the_pooled_covariance(regularisation: float) -> None:
    got = fitted(kind="shared", regularisation=regularisation).score_samples(FEATURES)
    np.testing.assert_allclose(got, normal_scores([POOLED + regularisation * np.eye(D)] * 3), **TOLERANCE)


def test_shared_without_regularisation_is_linear_discriminant_analysis() -> None:
    scores = fitted(kind="shared", regularisation=1e-9).score_samples(FEATURES)
    priors = np.array([0.5, 0.25, 0.25])  # scikit-learn pools by them
    discriminant = LinearDiscriminantAnalysis(solver="lsqr", priors=priors).fit(Z, LABELS)
    expected = discriminant.decision_function(Z) - np.log(priors)
    np.testing.assert_allclose(scores - scores[:, :1], expected - expected[:, :1], rtol=1e-3, atol=5e-3)


@pytest.mark.parametrize("shrinkage", [0.0, 0.3, 1.0])
def test_full_is_shrunk_towards_the_pooled_covariance(shrinkage: float) -> None:
    covariances = [(1 - shrinkage) * covariance(c) + shrinkage * POOLED + 0.1 * np.eye(D) for c in range(3)]
    got = fitted(kind="full", regularisation=0.1, shrinkage=shrinkage).score_samples(FEATURES)
    np.testing.assert_allclose(got, normal_scores(covariances), **TOLERANCE)


def test_full_without_shrinkage_is_scikit_learns_mixture() -> None:
    got = fitted(kind="full", regularisation=0.1).score_samples(FEATURES)
    mixtures = [GaussianMixture(1, covariance_type="full", reg_covar=0.1).fit(Z[c == LABELS]) for c in range(3)]
    np.testing.assert_allclose(got, np.stack([m.score_samples(Z) for m in mixtures], 1), **TOLERANCE)


def test_full_with_all_shrinkage_is_shared() -> None:
    full, shared = fitted(kind="full", shrinkage=1.0).guard_, fitted(kind="shared").guard_
    for row in full.whitener:
        np.testing.assert_allclose(row, shared.whitener, rtol=1e-5, atol=1e-6)


def test_the_target_weighs_as_much_as_all_others() -> None:
    """Of the standardiser and of the pooled covariance; the others weigh by their samples."""
    keep = np.concatenate([np.arange(60), np.arange(60, 75), np.arange(120, 180)])
    features, labels = FEATURES[keep].astype(np.float64), LABELS[keep]
    guard = GuardEstimator(1, kind="shared", regularisation=0.1).fit(features, labels).guard_
    own = labels == 1
    np.testing.assert_allclose(guard.mean, (features[own].mean(0) + features[~own].mean(0)) / 2, rtol=1e-5)
    squares = (features - guard.mean) ** 2
    np.testing.assert_allclose(guard.scale**2, (squares[own].mean(0) + squares[~own].mean(0)) / 2, rtol=1e-5)
    z = (features - guard.mean) / guard.scale
    centred = np.concatenate([z[labels == c] - z[labels == c].mean(0) for c in (1, 0, 2)])
    pooled = (np.cov(centred[:15].T, bias=True) + centred[15:].T @ centred[15:] / 120) / 2
    triangle = np.zeros((D, D))
    triangle[np.tril_indices(D)] = guard.whitener
    np.testing.assert_allclose(triangle.T @ triangle, np.linalg.inv(pooled + 0.1 * np.eye(D)), rtol=1e-4, atol=1e-4)
    assert balanced(labels, 1).sum() == pytest.approx(len(labels))
    assert balanced(labels, 1)[own].sum() == pytest.approx(len(labels) / 2)


def test_without_balance_every_sample_weighs_the_same() -> None:
    keep = np.concatenate([np.arange(60), np.arange(60, 75), np.arange(120, 180)])
    features, labels = FEATURES[keep], LABELS[keep]
    guard = GuardEstimator(1, kind="shared", regularisation=0.1, balance=False).fit(features, labels).guard_
    np.testing.assert_allclose(guard.mean, features.astype(np.float64).mean(0), rtol=1e-5)
    z = (features - guard.mean) / guard.scale
    centred = np.concatenate([z[labels == c] - z[labels == c].mean(0) for c in range(3)])
    triangle = np.zeros((D, D))
    triangle[np.tril_indices(D)] = guard.whitener
    expected = np.linalg.inv(centred.T @ centred / len(keep) + 0.1 * np.eye(D))
    np.testing.assert_allclose(triangle.T @ triangle, expected, rtol=1e-4, atol=1e-4)


def test_copies_of_the_target_change_nothing() -> None:
    more = np.concatenate([np.arange(180), np.arange(60, 120), np.arange(60, 120)])
    for kind in KINDS:
        once, copied = (GuardEstimator(1, kind=kind).fit(FEATURES[i], LABELS[i]).guard_ for i in (np.arange(180), more))
        for name in ("mean", "scale", "means", "whitener"):
            np.testing.assert_allclose(getattr(once, name), getattr(copied, name), rtol=1e-4, atol=1e-5)


def test_separated_components_are_scikit_learns_mixture() -> None:
    rng = np.random.default_rng(1)
    centres = rng.normal(size=(2, 2, 3)) * 6
    features = np.concatenate([centres[c, k] + rng.normal(size=(40, 3)) for c in range(2) for k in range(2)])
    labels = np.repeat([0, 1], 80)
    estimator = GuardEstimator(0, n_components=2, regularisation=0.1).fit(features, labels)
    assert estimator.guard_.offsets.tolist() == [0, 2, 4]
    np.testing.assert_allclose(np.exp(estimator.guard_.log_weights), 0.5, atol=1e-3)
    z = (features - features.mean(0)) / features.std(0)
    mixtures = [GaussianMixture(2, covariance_type="diag", reg_covar=0.1, random_state=0) for _ in range(2)]
    expected = np.stack([m.fit(z[labels == c]).score_samples(z) for c, m in enumerate(mixtures)], 1)
    np.testing.assert_allclose(estimator.score_samples(features), expected, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_components", [1, 2])
def test_predictions_scores_and_margins_agree(kind: str, n_components: int) -> None:
    estimator = fitted(target=1, kind=kind, n_components=n_components)
    scores, margin = estimator.score_samples(FEATURES), estimator.decision_function(FEATURES)
    assert scores.shape == (180, 3)
    np.testing.assert_allclose(margin, np.maximum(scores[:, 0], scores[:, 2]) - scores[:, 1])
    predicted = estimator.predict(FEATURES)
    np.testing.assert_array_equal(predicted == 1, margin < 0)
    np.testing.assert_array_equal(predicted, estimator.classes_[scores.argmax(1)])
    assert (predicted == LABELS).mean() > 0.8
    # The device's scorer and rule say the same.
    scorer = Scorer(estimator.guard_)
    for i in range(0, 180, 20):
        row = scorer.score(FEATURES[i])
        np.testing.assert_allclose(row, scores[i], rtol=1e-4, atol=1e-3)
        verdict = decide(1, row, estimator.guard_.classes, estimator.guard_.target_row)
        assert (verdict.decision is Decision.ACCEPT) == (predicted[i] == 1)
        assert verdict.source in (None, predicted[i])


def test_a_tie_is_not_accepted() -> None:
    features = np.array([[-1.0], [-3.0], [1.0], [3.0]], np.float32)
    for target, source in ((5, 7), (7, 5)):
        estimator = GuardEstimator(target).fit(features, np.array([5, 5, 7, 7]))
        assert estimator.decision_function(np.zeros((1, 1))).tolist() == [0.0]
        assert estimator.predict(np.zeros((1, 1))).tolist() == [source]


def test_helpers_by_hand() -> None:
    scores = np.array([[1.0, 5.0, 2.0], [7.0, -np.inf, 7.0], [-3.0, -1.0, -2.0]])
    assert best_other(scores, 1).tolist() == [2, 0, 2]
    assert margins(scores, 1).tolist() == [-3.0, np.inf, -1.0]
    np.testing.assert_array_equal(scores[0], [1.0, 5.0, 2.0])
    mean, scale = standardiser(np.array([[1.0, 5.0], [3.0, 5.0]]), np.ones(2))
    assert (mean.tolist(), scale.tolist()) == ([2.0, 5.0], [1.0, 1.0])


def test_classes_may_have_gaps() -> None:
    labels = np.array([1, 4, 9])[LABELS]
    estimator = GuardEstimator(4).fit(FEATURES, labels)
    assert estimator.classes_.tolist() == estimator.guard_.classes.tolist() == [1, 4, 9]
    assert estimator.guard_.target_row == 1
    np.testing.assert_array_equal(estimator.predict(FEATURES), np.array([1, 4, 9])[fitted(target=1).predict(FEATURES)])


def test_scikit_learns_manners() -> None:
    estimator = GuardEstimator(2, kind="full", shrinkage=0.5)
    parameters = {"target": 2, "kind": "full", "n_components": 1, "regularisation": 0.1, "shrinkage": 0.5}
    assert estimator.get_params() == {**parameters, "balance": True, "random_state": 0}
    copy = clone(estimator).set_params(kind="shared", n_components=2)
    assert (copy.kind, copy.n_components, copy.target, estimator.kind) == ("shared", 2, 2, "full")
    with pytest.raises(ValueError, match="Invalid parameter 'covariance'"):
        estimator.set_params(covariance="full")
    assert estimator.fit(FEATURES, LABELS) is estimator
    assert estimator.n_features_in_ == D
    assert not hasattr(clone(estimator), "guard_")
    assert "GuardEstimator(kind='full', shrinkage=0.5, target=2)" in repr(estimator)


def test_fitting_is_deterministic_and_leaves_its_input_alone() -> None:
    features, labels = FEATURES.copy(), LABELS.copy()
    one, two = (GuardEstimator(0, n_components=3, random_state=3).fit(features, labels).guard_ for _ in range(2))
    for name in ("mean", "scale", "means", "log_weights", "whitener"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    np.testing.assert_array_equal(features, FEATURES)
    np.testing.assert_array_equal(labels, LABELS)


@pytest.mark.parametrize("kind", KINDS)
def test_dead_features_change_no_verdict(kind: str) -> None:
    dead = np.concatenate([FEATURES, np.zeros((180, 2), np.float32), np.full((180, 1), 37.5, np.float32)], 1)
    with_dead = GuardEstimator(0, kind=kind).fit(dead, LABELS)
    assert (with_dead.guard_.scale[-3:] == 1).all()
    np.testing.assert_allclose(
        with_dead.decision_function(dead), fitted(kind=kind).decision_function(FEATURES), rtol=1e-3, atol=1e-3
    )
    assert np.isfinite(with_dead.score_samples(dead + 1e4)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_all_features_constant(kind: str) -> None:
    estimator = GuardEstimator(0, kind=kind).fit(np.full((6, 3), 2.0), np.array([0, 0, 0, 1, 1, 1]))
    assert estimator.decision_function(np.full((1, 3), 2.0)).tolist() == [0.0]


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_samples_than_features(kind: str) -> None:
    rng = np.random.default_rng(2)
    features, labels = rng.normal(size=(8, 40)), np.repeat([0, 1], 4)
    features[labels == 1] += 2
    estimator = GuardEstimator(0, kind=kind, n_components=3).fit(features, labels)
    assert estimator.guard_.n_components == 2  # 4 samples: one component each
    np.testing.assert_array_equal(estimator.predict(features), labels)


def test_component_count_is_at_most_a_third_of_the_samples() -> None:
    rng = np.random.default_rng(3)
    labels = np.repeat([0, 1, 2], [2, 6, 30])
    components = fit_components(rng.normal(size=(38, 2)), labels, np.ones(38), n_components=3, random_state=0)
    assert components.offsets.tolist() == [0, 1, 3, 6]
    np.testing.assert_allclose(np.add.reduceat(components.weights, components.offsets[:-1]), 1.0)
    np.testing.assert_allclose(np.add.reduceat(components.totals, components.offsets[:-1]), [2, 6, 30])


def test_identical_samples_give_a_density_without_a_warning() -> None:
    features = np.concatenate([np.zeros((12, 2)), np.ones((12, 2))])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimator = GuardEstimator(0, n_components=3).fit(features, np.repeat([0, 1], 12))
    np.testing.assert_array_equal(estimator.predict(features), np.repeat([0, 1], 12))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"kind": "tied"}, "^kind: expected one of diagonal, shared, full, got 'tied'"),
        ({"n_components": 0}, "^n_components: expected at least 1, got 0"),
        ({"regularisation": 0.0}, "^regularisation: expected a number > 0, got 0.0"),
        ({"regularisation": float("nan")}, "^regularisation: expected a number > 0, got nan"),
        ({"shrinkage": -0.1}, r"^shrinkage: expected a number in 0\.\.1, got -0.1"),
        ({"shrinkage": 1.5}, r"^shrinkage: expected a number in 0\.\.1, got 1.5"),
        ({"shrinkage": float("nan")}, r"^shrinkage: expected a number in 0\.\.1, got nan"),
    ],
)
def test_parameters_out_of_range(parameters: dict[str, Any], message: str) -> None:
    estimator = GuardEstimator(**parameters)  # the constructor stores, fit validates
    with pytest.raises(OptionError, match=message):
        estimator.fit(FEATURES, LABELS)


def test_data_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        DataError, match=r"^labels: expected samples of the target 7 and of another class, got \[0 1 2\]"
    ):
        fitted(target=7)
    with pytest.raises(DataError, match=r"^labels: expected samples of the target 0 and of another class, got \[0\]"):
        GuardEstimator(0).fit(FEATURES, np.zeros(180, int))
    with pytest.raises(DataError, match=r"^class 2: expected at least 2 samples to fit a density, got 1"):
        GuardEstimator(0).fit(FEATURES[:121], LABELS[:121])
    with pytest.raises(NotFittedError):
        GuardEstimator(0).score_samples(FEATURES)
    with pytest.raises(DataError, match=r"^features: expected 5 columns, got 4"):
        fitted().decision_function(FEATURES[:, :4])
    with pytest.raises(ValueError, match="NaN"):
        fitted().predict(np.full((1, D), np.nan))
    monkeypatch.setattr(density, "MAX_FEATURES", 4)
    with pytest.raises(DataError, match=r"^features: expected at most 4, got 5; name another feature layer"):
        fitted()
