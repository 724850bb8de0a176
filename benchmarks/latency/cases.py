"""What is timed: random guards of a given shape, frames for them, and the work that the definition asks for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from inflight_edge.guard import FloatArray, Guard, Kind, packed_size

__all__ = ["POOL", "Case", "make_features", "make_guard", "unpack"]

# Frames that the calls go round in: few, so that the features stay in the first cache, where an engine leaves them.
POOL = 8


@dataclass(frozen=True, slots=True)
class Case:
    """Shape of a guard and the number of frames a call: ``components`` of each of ``classes`` classes."""

    kind: Kind
    classes: int = 10
    components: int = 1
    features: int = 512
    batch: int = 1

    @property
    def n_components(self) -> int:
        """All components together."""
        return self.classes * self.components

    @property
    def bytes(self) -> int:
        """Bytes that must be read and written once: parameters, features, log-likelihoods (4 bytes a number)."""
        d, m = self.features, self.n_components
        whitener = {"diagonal": m * d, "shared": packed_size(d), "full": m * packed_size(d)}[self.kind]
        standardiser = 3 * d if self.kind == "shared" else 2 * d
        return 4 * (whitener + m * d + m + standardiser + self.batch * (d + self.classes))

    @property
    def working_set(self) -> int:
        """Bytes that a loop of calls goes round in: what the caches have to hold."""
        return self.bytes + (4 * self.features * (POOL - 1) if self.batch == 1 else 0)

    @property
    def flops(self) -> int:
        """Additions and multiplications of the definition; a multiply-add is two.  exp and log are left out."""
        d, m = self.features, self.n_components
        triangle = 2 * packed_size(d)
        distances = {"diagonal": 4 * m * d, "shared": triangle + d + 3 * m * d, "full": m * (triangle + 3 * d)}[
            self.kind
        ]
        return self.batch * (2 * d + distances)

    @property
    def identity(self) -> dict[str, str | int]:
        """The keys of a record that say what was timed."""
        names = ("kind", "classes", "components", "features", "batch")
        return {name: getattr(self, name) for name in names}


def make_guard(case: Case, *, seed: int = 0) -> Guard:
    """Random valid guard.  Its standardiser is mean 0, scale 1: peers that have none score the same features."""
    rng = np.random.default_rng(seed)
    m, d = case.n_components, case.features
    if case.kind == "diagonal":
        whitener = rng.uniform(0.5, 2.0, (m, d)).astype(np.float32)
    else:
        count = 1 if case.kind == "shared" else m
        whitener = rng.standard_normal((count, packed_size(d)), dtype=np.float32)
        whitener *= np.float32(0.3 / np.sqrt(d))
        rows = np.arange(d, dtype=np.int64)
        whitener[:, rows * (rows + 3) // 2] = rng.uniform(0.5, 2.0, (count, d))
        whitener = whitener[0] if case.kind == "shared" else whitener
    weights = rng.dirichlet(np.full(case.components, 5.0), case.classes).ravel()
    return Guard(
        target=0,
        kind=case.kind,
        classes=np.arange(case.classes, dtype=np.int32),
        offsets=np.arange(0, m + 1, case.components, dtype=np.int32),
        mean=np.zeros(d, np.float32),
        scale=np.ones(d, np.float32),
        means=rng.standard_normal((m, d), dtype=np.float32),
        log_weights=np.log(weights).astype(np.float32),
        whitener=whitener,
        clean_margins=np.empty(0, np.float32),
    )


def make_features(case: Case, guard: Guard, n_frames: int, *, seed: int = 1) -> FloatArray:
    """Features (n_frames, D) float32 around the guard's components."""
    rng = np.random.default_rng(seed)
    centres = guard.means[rng.integers(0, case.n_components, n_frames)]
    features: FloatArray = centres + rng.standard_normal(centres.shape, dtype=np.float32)
    return features


def unpack(packed: FloatArray, n_features: int) -> NDArray[np.float32]:
    """Lower triangle (D, D) float32 of a packed one (D (D + 1) / 2,)."""
    full = np.zeros((n_features, n_features), np.float32)
    full[np.tril_indices(n_features)] = packed
    return full
