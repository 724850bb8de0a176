"""The definition against two independent libraries."""

from __future__ import annotations

import numpy as np
import pytest
from guards import random_features, random_guard

from inflight_edge.guard import KINDS, Guard, Kind
from inflight_edge.scoring import reference
from inflight_edge.scoring.reference import log_likelihoods, term_magnitudes, whiten


def dense_whiteners(guard: Guard) -> list[np.ndarray]:
    """W of each component as a (D, D) float64 matrix."""
    if guard.kind == "diagonal":
        return [np.diag(row.astype(np.float64)) for row in guard.whitener]
    matrices = []
    for packed in np.atleast_2d(guard.whitener):
        matrix = np.zeros((guard.n_features, guard.n_features))
        matrix[np.tril_indices(guard.n_features)] = packed
        matrices.append(matrix)
    return matrices if guard.kind == "full" else matrices * guard.n_components


@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_scipy(rng: np.random.Generator, kind: Kind) -> None:
    special = pytest.importorskip("scipy.special", reason="needs SciPy to compare with")
    stats = pytest.importorskip("scipy.stats", reason="needs SciPy to compare with")
    guard = random_guard(rng, kind, 3, [1, 2, 3], 6)
    features = random_features(rng, guard, 9)
    z = (features.astype(np.float64) - guard.mean) / guard.scale
    components = np.stack(
        [
            log_weight + stats.multivariate_normal(mean, np.linalg.inv(W.T @ W)).logpdf(z)
            for log_weight, mean, W in zip(guard.log_weights, guard.means, dense_whiteners(guard), strict=True)
        ],
        axis=1,
    )
    rows = [components[:, a:b] for a, b in zip(guard.offsets[:-1], guard.offsets[1:], strict=True)]
    expected = np.stack([special.logsumexp(row, axis=1) for row in rows], axis=1)
    np.testing.assert_allclose(log_likelihoods(guard, features), expected, rtol=1e-10)


@pytest.mark.parametrize(("kind", "covariance"), [("diagonal", "diag"), ("shared", "tied"), ("full", "full")])
def test_agrees_with_sklearn(rng: np.random.Generator, kind: Kind, covariance: str) -> None:
    """Both rows of the guard are the same mixture, fitted by scikit-learn on standardised features."""
    sklearn_mixture = pytest.importorskip("sklearn.mixture", reason="needs scikit-learn to compare with")
    z = rng.normal(size=(200, 5)) @ rng.normal(size=(5, 5)) + rng.choice([-3.0, 3.0], (200, 1))
    mixture = sklearn_mixture.GaussianMixture(2, covariance_type=covariance, random_state=0).fit(z)
    factors = mixture.precisions_cholesky_.astype(np.float32)  # upper P with y = (z - mean) @ P, so W = P^T
    if kind != "diagonal":
        factors = factors.swapaxes(-1, -2)[(..., *np.tril_indices(5))]
    guard = Guard(
        target=0,
        kind=kind,
        classes=np.array([0, 1], np.int32),
        offsets=np.array([0, 2, 4], np.int32),
        mean=np.zeros(5, np.float32),
        scale=np.ones(5, np.float32),
        means=np.tile(mixture.means_, (2, 1)).astype(np.float32),
        log_weights=np.tile(np.log(mixture.weights_), 2).astype(np.float32),
        whitener=np.ascontiguousarray(factors if kind == "shared" else np.concatenate([factors, factors])),
        clean_margins=np.empty(0, np.float32),
    )
    expected = np.repeat(mixture.score_samples(z)[:, None], 2, axis=1)
    # The guard's parameters are rounded to float32.
    np.testing.assert_allclose(log_likelihoods(guard, z), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_do_not_show(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, kind: Kind) -> None:
    guard = random_guard(rng, kind, 4, [1, 2, 3, 1], 11)
    features = random_features(rng, guard, 5)
    scores, magnitudes = log_likelihoods(guard, features), term_magnitudes(guard, features)
    monkeypatch.setattr(reference, "_CHUNK", 25)
    np.testing.assert_allclose(log_likelihoods(guard, features), scores, rtol=1e-13)
    np.testing.assert_allclose(term_magnitudes(guard, features), magnitudes, rtol=1e-13)


def test_whiten_is_the_lower_triangle_by_rows() -> None:
    packed = np.array([1, 2, 3, 4, 5, 6], np.float32)
    np.testing.assert_array_equal(whiten(packed, np.array([[1.0, 10.0, 100.0]])), [[1.0, 32.0, 654.0]])


@pytest.mark.parametrize("kind", KINDS)
def test_magnitudes_bound_the_score(rng: np.random.Generator, kind: Kind) -> None:
    """One component: the terms are the score's own, so their magnitudes sum to no less than its magnitude."""
    guard = random_guard(rng, kind, 3, 1, 7)
    features = random_features(rng, guard, 20)
    assert (term_magnitudes(guard, features) >= np.abs(log_likelihoods(guard, features))).all()


def test_magnitudes_by_hand() -> None:
    guard = Guard(
        target=0,
        kind="diagonal",
        classes=np.array([0, 1], np.int32),
        offsets=np.array([0, 1, 2], np.int32),
        mean=np.zeros(2, np.float32),
        scale=np.full(2, 2, np.float32),
        means=np.array([[0, 0], [1, 1]], np.float32),
        log_weights=np.zeros(2, np.float32),
        whitener=np.array([[0.5, 2], [1, 4]], np.float32),
        clean_margins=np.empty(0, np.float32),
    )
    frame = np.array([[4.0, 2.0]])  # z = (2, 1)
    constant = np.log(2 * np.pi)
    expected = [constant + 2 * np.log(2) + 0.5 * (1 + 4), constant + np.log(4) + 0.5 * 1]
    np.testing.assert_allclose(term_magnitudes(guard, frame)[0], expected)
    np.testing.assert_allclose(log_likelihoods(guard, frame)[0], [-constant - 2.5, -constant + np.log(4) - 0.5])
