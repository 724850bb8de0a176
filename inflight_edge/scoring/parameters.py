"""Parameters as the native scorers read them: what can be computed once per guard, computed in float64 at load."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from inflight_edge.errors import GuardError
from inflight_edge.guard import FloatArray, Guard, IntArray, Kind
from inflight_edge.scoring.reference import component_constants, whiten

__all__ = ["Parameters", "prepare"]


@dataclass(frozen=True, slots=True, eq=False)
class Parameters:
    """Arrays of ``ife_guard`` in csrc/inflight.h, C-contiguous and aligned; the big ones are the guard's own.

    With D features, R density rows and M components:

    kind         ``diagonal``, ``shared`` or ``full``.
    offsets      (R + 1,) int32, first component of each row.
    mean, scale  (D,) float32, z = (features - mean) / scale.
    origin       (D,) float32, mean of the component means, for ``shared``; (0,) for the other kinds.
    centres      (M, D) float32: component means of z, or for ``shared`` W (means - origin).
    whitener     float32, as in the guard.
    constants    (M,) float32 nats: log weight - D/2 log(2 pi) + sum of log diag(W).
    """

    kind: Kind
    offsets: IntArray
    mean: FloatArray
    scale: FloatArray
    origin: FloatArray
    centres: FloatArray
    whitener: FloatArray
    constants: FloatArray


def prepare(guard: Guard) -> Parameters:
    """Parameters of a guard.  Copies an array only where it is not aligned to its item size.

    Raises GuardError when whitened means overflow.
    """
    origin = np.empty(0, np.float32)
    centres = guard.means
    if guard.kind == "shared":
        origin = guard.means.mean(axis=0, dtype=np.float64).astype(np.float32)
        # With the rounded origin, which the scorer subtracts: W (z - origin) - W (means - origin) is then exact.
        with np.errstate(over="ignore"):
            centres = whiten(guard.whitener, guard.means.astype(np.float64) - origin).astype(np.float32)
        if not np.isfinite(centres).all():
            raise GuardError("means, whitener: expected whitened means that fit float32, got larger; calibrate again")
    return Parameters(
        kind=guard.kind,
        offsets=_aligned(guard.offsets),
        mean=_aligned(guard.mean),
        scale=_aligned(guard.scale),
        origin=origin,
        centres=_aligned(centres),
        whitener=_aligned(guard.whitener),
        constants=component_constants(guard).astype(np.float32),
    )


def _aligned(array: np.ndarray) -> np.ndarray:
    return np.require(array, requirements=["C", "A"])
