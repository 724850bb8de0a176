"""Random valid guards for every test that needs one; nothing here is a test."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from inflight_edge.guard import FloatArray, Guard, Kind, packed_size


def random_guard(
    rng: np.random.Generator,
    kind: Kind,
    n_rows: int,
    n_components_per_row: int | Sequence[int],
    n_features: int,
) -> Guard:
    """Valid guard with random parameters of plausible size.

    n_rows: R >= 2 density rows; their class indices increase with gaps, the target is a random one of them.
    n_components_per_row: K for every row, or one K per row.  n_features: D.
    """
    counts = np.broadcast_to(np.asarray(n_components_per_row, dtype=np.int64), (n_rows,))
    n_components = int(counts.sum())
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    classes = np.cumsum(rng.integers(1, 3, n_rows)).astype(np.int32) - 1
    weights = [rng.dirichlet(np.full(int(count), 2.0)) for count in counts]
    return Guard(
        target=int(rng.choice(classes)),
        kind=kind,
        classes=classes,
        offsets=offsets,
        mean=rng.normal(0.5, 1.0, n_features).astype(np.float32),
        scale=rng.uniform(0.2, 3.0, n_features).astype(np.float32),
        means=rng.standard_normal((n_components, n_features), dtype=np.float32),
        log_weights=np.log(np.concatenate(weights)).astype(np.float32),
        whitener=random_whitener(rng, kind, n_components, n_features),
        clean_margins=np.sort(rng.normal(-50.0, 20.0, 200)).astype(np.float32),
    )


def random_features(rng: np.random.Generator, guard: Guard, n_frames: int) -> FloatArray:
    """Features (N, D) float32 drawn around the components of a guard: inliers, not standardised."""
    centres = guard.means[rng.integers(0, guard.n_components, n_frames)]
    z = centres + rng.standard_normal(centres.shape, dtype=np.float32)
    return np.ascontiguousarray(z * guard.scale + guard.mean, dtype=np.float32)


def random_whitener(rng: np.random.Generator, kind: Kind, n_components: int, n_features: int) -> FloatArray:
    """Whitener of the given kind: diagonal in 0.5..2, off-diagonal entries of order 0.3 / sqrt(D)."""
    if kind == "diagonal":
        return rng.uniform(0.5, 2.0, (n_components, n_features)).astype(np.float32)
    n_matrices = 1 if kind == "shared" else n_components
    packed = rng.standard_normal((n_matrices, packed_size(n_features)), dtype=np.float32)
    packed *= np.float32(0.3 / np.sqrt(n_features))
    rows = np.arange(n_features, dtype=np.int64)
    packed[:, rows * (rows + 3) // 2] = rng.uniform(0.5, 2.0, (n_matrices, n_features))
    return packed[0] if kind == "shared" else packed
