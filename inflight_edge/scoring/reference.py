"""The definition of the score, float64 NumPy: slow, plain, and what every other scorer is compared with."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from inflight_edge.guard import FloatArray, Guard, packed_size

__all__ = ["component_constants", "log_likelihoods", "term_magnitudes", "whiten"]

Float64Array = NDArray[np.float64]
LOG_2PI = float(np.log(2.0 * np.pi))
# Entries of a temporary: 16 MiB of float64, whatever the size of the guard.
_CHUNK = 1 << 21


def log_likelihoods(guard: Guard, features: NDArray[np.floating]) -> Float64Array:
    """Log-likelihood of each feature vector under each class density.

    features: (N, D) float, not standardised.  Returns (N, R) float64 nats; a frame with a NaN or infinite feature
    has NaN in every row.  The caller checks the shape.
    z = (x - mean) / scale; a component's log-likelihood is its constant - 1/2 ||W (z - means[m])||^2; a row's is the
    logarithm of the sum of their exponentials.  Source: Bishop 2006, eq. 2.43 and 9.7.
    """
    scores = np.full((features.shape[0], guard.classes.shape[0]), np.nan)
    finite = np.isfinite(features).all(axis=1)
    constants = component_constants(guard)
    distances = _distances(guard, _standardise(guard, features[finite]))
    scores[finite] = _log_sum_exp(constants - 0.5 * distances, guard)[0]
    return scores


def term_magnitudes(guard: Guard, features: NDArray[np.floating]) -> Float64Array:
    """Sum of the magnitudes of the terms added in each log-likelihood: what a rounding error is measured against.

    features: (N, D) finite float.  Returns (N, R) float64: per component |log weight| + D/2 log(2 pi)
    + sum |log diag(W)| + 1/2 ||W (z - means[m])||^2, averaged over a row's components by their share in the row.
    (The share is the derivative of the log-sum-exp, so errors of the components reach the row in this proportion.)
    """
    log_diagonals = np.log(_diagonals(guard).astype(np.float64))
    fixed = np.abs(guard.log_weights.astype(np.float64)) + 0.5 * guard.n_features * LOG_2PI
    fixed = fixed + np.abs(log_diagonals).sum(axis=1)
    half_distances = 0.5 * _distances(guard, _standardise(guard, features))
    shares = _log_sum_exp(component_constants(guard) - half_distances, guard)[1]
    total: Float64Array = np.add.reduceat(shares * (fixed + half_distances), guard.offsets[:-1], axis=1)
    return total


def component_constants(guard: Guard) -> Float64Array:
    """Part of each component's log-likelihood that no frame changes: (M,) float64 nats.

    log weight - D/2 log(2 pi) + sum of log diag(W), the last being half the log determinant of the precision.
    """
    log_determinants = np.log(_diagonals(guard).astype(np.float64)).sum(axis=1)
    constants: Float64Array = guard.log_weights.astype(np.float64) - 0.5 * guard.n_features * LOG_2PI + log_determinants
    return constants


def whiten(packed: FloatArray, vectors: Float64Array) -> Float64Array:
    """W @ v for each row v of vectors.  packed: (D (D + 1) / 2,) lower triangle W by rows; vectors: (N, D) float64.

    Returns (N, D) float64.  W is unpacked some rows at a time.
    """
    n_features = vectors.shape[1]
    columns = np.arange(n_features)
    white = np.empty(vectors.shape)
    for rows in _chunks(n_features, n_features):
        block = np.zeros((rows.stop - rows.start, rows.stop))
        lower = columns[None, : rows.stop] <= columns[rows, None]
        block[lower] = packed[packed_size(rows.start) : packed_size(rows.stop)]
        white[:, rows] = vectors[:, : rows.stop] @ block.T
    return white


def _standardise(guard: Guard, features: NDArray[np.floating]) -> Float64Array:
    z: Float64Array = (features.astype(np.float64) - guard.mean) / guard.scale
    return z


def _diagonals(guard: Guard) -> FloatArray:
    """diag(W) of each component: (M, D), or (1, D) when all share one."""
    if guard.kind == "diagonal":
        return guard.whitener
    rows = np.arange(guard.n_features, dtype=np.int64)
    return np.atleast_2d(guard.whitener)[:, rows * (rows + 3) // 2]


def _distances(guard: Guard, z: Float64Array) -> Float64Array:
    """Squared Mahalanobis distances ||W (z - means[m])||^2: z (N, D) -> (N, M)."""
    if guard.kind == "diagonal":
        return _squared_distances(z, guard.means, guard.whitener)
    if guard.kind == "shared":
        # W is linear, so whiten once and take distances afterwards; centred first, so that nothing cancels.
        origin = guard.means.mean(axis=0, dtype=np.float64)
        return _squared_distances(whiten(guard.whitener, z - origin), whiten(guard.whitener, guard.means - origin))
    distances = np.empty((z.shape[0], guard.n_components))
    for m in range(guard.n_components):
        distances[:, m] = np.square(whiten(guard.whitener[m], z - guard.means[m])).sum(axis=1)
    return distances


def _squared_distances(
    points: Float64Array, centres: NDArray[np.floating], weights: FloatArray | None = None
) -> Float64Array:
    """Sum over d of ((points - centres) * weights)^2: points (N, D), centres and weights (M, D) -> (N, M)."""
    distances = np.empty((points.shape[0], centres.shape[0]))
    for rows in _chunks(centres.shape[0], centres.shape[1]):
        for frames in _chunks(points.shape[0], centres[rows].size):
            difference = points[frames, None, :] - centres[rows]
            if weights is not None:
                difference *= weights[rows]
            distances[frames, rows] = np.square(difference).sum(axis=2)
    return distances


def _log_sum_exp(components: Float64Array, guard: Guard) -> tuple[Float64Array, Float64Array]:
    """Row totals (N, R) of the components (N, M) and each component's share in its row (N, M)."""
    starts, counts = guard.offsets[:-1], np.diff(guard.offsets)
    largest = np.maximum.reduceat(components, starts, axis=1)
    exponentials = np.exp(components - np.repeat(largest, counts, axis=1))
    sums = np.add.reduceat(exponentials, starts, axis=1)
    return largest + np.log(sums), exponentials / np.repeat(sums, counts, axis=1)


def _chunks(length: int, width: int) -> Iterator[slice]:
    """Slices of range(length), each with at most _CHUNK entries of the given width (but one row at least)."""
    step = max(1, _CHUNK // max(1, width))
    for start in range(0, length, step):
        yield slice(start, min(length, start + step))
