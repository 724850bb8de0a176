"""A guard: what is needed to judge frames predicted as one suspected target class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from inflight_edge.errors import GuardError

__all__ = ["KINDS", "MAX_COMPONENTS", "MAX_FEATURES", "FloatArray", "Guard", "IntArray", "Kind", "packed_size"]

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int32]
Kind = Literal["diagonal", "shared", "full"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# The C scorers keep vectors of this length on the stack: a call takes up to 224 KiB of it.
MAX_FEATURES = 16384
MAX_COMPONENTS = 1 << 20


def packed_size(n_features: int) -> int:
    """Number of entries of a lower-triangular (D, D) matrix packed row by row: D (D + 1) / 2."""
    return n_features * (n_features + 1) // 2


@dataclass(frozen=True, slots=True, eq=False)
class Guard:
    """Standardiser and one Gaussian mixture per class, for one suspected target class.

    Density row r belongs to class ``classes[r]`` and owns the components ``offsets[r]:offsets[r + 1]``.
    With D features, R density rows and M components in all:

    target       class whose predictions this guard judges; one of ``classes``.
    kind         ``diagonal``, ``shared`` or ``full``: the form of ``whitener``.
    classes      (R,) int32, strictly increasing class indices.
    offsets      (R + 1,) int32, strictly increasing from 0 to M.
    mean, scale  (D,) float32: standardised z = (features - mean) / scale; scale >= 2^-126.
    means        (M, D) float32, component means of z.
    log_weights  (M,) float32, natural logarithms of the mixture weights; each row's weights sum to 1.
    whitener     float32, W with y = W (z - means[m]) white, so precision = W^T W:
                 diagonal (M, D): 1 / standard deviation;
                 shared (D (D + 1) / 2,): one lower-triangular W, packed row by row;
                 full (M, D (D + 1) / 2): one lower-triangular W per component, packed row by row.
                 Diagonal entries of every W are > 0.
    clean_margins (n,) float32, ascending: held-out margins of clean target frames (may be empty).

    All arrays are C-contiguous and read-only.  Raises GuardError when an invariant is broken.
    Source: Li, Xiang, Miller, Kesidis, ICASSP 2022, section 4.2.
    """

    target: int
    kind: Kind
    classes: IntArray
    offsets: IntArray
    mean: FloatArray
    scale: FloatArray
    means: FloatArray
    log_weights: FloatArray
    whitener: FloatArray
    clean_margins: FloatArray

    @property
    def n_features(self) -> int:
        """D, the length of a feature vector."""
        return int(self.mean.shape[0])

    @property
    def n_components(self) -> int:
        """M, the number of Gaussian components of all classes together."""
        return int(self.means.shape[0])

    @property
    def target_row(self) -> int:
        """Index of the target among the density rows."""
        return int(np.searchsorted(self.classes, self.target))

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise GuardError(f"kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        _check_vector("mean", self.mean, np.float32)
        n_features = int(self.mean.shape[0])
        if not 1 <= n_features <= MAX_FEATURES:
            raise GuardError(f"mean: expected 1 to {MAX_FEATURES} features, got {n_features}")
        _check_vector("classes", self.classes, np.int32)
        _check_vector("offsets", self.offsets, np.int32)
        n_rows = int(self.classes.shape[0])
        _check_rows(self.classes, self.offsets, self.target)
        n_components = int(self.offsets[-1])
        if n_components > MAX_COMPONENTS:
            raise GuardError(f"offsets: expected at most {MAX_COMPONENTS} components, got {n_components}")
        size = packed_size(n_features)
        shapes: dict[str, tuple[int, ...]] = {
            "scale": (n_features,),
            "means": (n_components, n_features),
            "log_weights": (n_components,),
            "whitener": {"diagonal": (n_components, n_features), "shared": (size,), "full": (n_components, size)}[
                self.kind
            ],
        }
        for name, shape in shapes.items():
            _check_array(name, getattr(self, name), shape, np.float32)
        _check_vector("clean_margins", self.clean_margins, np.float32)
        for name in ("mean", "scale", "means", "log_weights", "whitener"):
            _check_finite(name, getattr(self, name))
        if not (self.scale >= np.finfo(np.float32).tiny).all():  # below it 1 / scale may be infinite
            raise GuardError(f"scale: expected every entry > 0, got {float(self.scale.min())!r}; calibrate again")
        diagonal = self.whitener if self.kind == "diagonal" else self.whitener[..., _diagonal_index(n_features)]
        if not (diagonal > 0).all():
            raise GuardError(f"whitener: expected a positive diagonal, got {float(diagonal.min())!r}; calibrate again")
        with np.errstate(over="ignore"):  # an infinite sum is refused below
            totals = np.add.reduceat(np.exp(self.log_weights.astype(np.float64)), self.offsets[:-1])
        if not (np.abs(totals - 1.0) < 1e-3).all():
            row = int(np.argmax(np.abs(totals - 1.0)))
            raise GuardError(f"log_weights: weights of class {self.classes[row]} sum to {totals[row]:.6g}, expected 1")
        margins = self.clean_margins
        if np.isnan(margins).any() or (margins[1:] < margins[:-1]).any():
            raise GuardError("clean_margins: expected ascending numbers without NaN; calibrate again")
        assert n_rows >= 2
        for name in ("classes", "offsets", "mean", "scale", "means", "log_weights", "whitener", "clean_margins"):
            getattr(self, name).flags.writeable = False


def _diagonal_index(n_features: int) -> NDArray[np.int64]:
    """Positions of the diagonal in a packed lower triangle: 0, 2, 5, 9, ..."""
    rows = np.arange(n_features, dtype=np.int64)
    return rows * (rows + 3) // 2


def _check_array(name: str, array: object, shape: tuple[int, ...], dtype: type[np.generic]) -> None:
    if not isinstance(array, np.ndarray):
        raise GuardError(f"{name}: expected a NumPy array, got {type(array).__name__}")
    if array.dtype != dtype:
        raise GuardError(f"{name}: expected dtype {np.dtype(dtype)}, got {array.dtype}")
    if array.shape != shape:
        raise GuardError(f"{name}: expected shape {shape}, got {array.shape}")
    if not array.flags.c_contiguous:
        raise GuardError(f"{name}: expected a C-contiguous array; pass numpy.ascontiguousarray({name})")


def _check_vector(name: str, array: object, dtype: type[np.generic]) -> None:
    length = array.shape[0] if isinstance(array, np.ndarray) and array.ndim == 1 else -1
    _check_array(name, array, (length,), dtype)


def _check_finite(name: str, array: FloatArray) -> None:
    if not np.isfinite(array).all():
        count = int(np.count_nonzero(~np.isfinite(array)))
        raise GuardError(f"{name}: expected finite numbers, got {count} NaN or infinite; calibrate again")


def _check_rows(classes: IntArray, offsets: IntArray, target: int) -> None:
    n_rows = int(classes.shape[0])
    if n_rows < 2:
        raise GuardError(f"classes: expected at least 2 density rows, got {n_rows}")
    if classes[0] < 0 or (np.diff(classes.astype(np.int64)) <= 0).any():
        raise GuardError("classes: expected strictly increasing class indices from 0 upwards")
    if isinstance(target, bool) or not isinstance(target, int) or target not in classes:
        raise GuardError(f"target: expected one of the guard's classes, got {target!r}")
    if offsets.shape[0] != n_rows + 1:
        raise GuardError(f"offsets: expected shape ({n_rows + 1},), got {offsets.shape}")
    if offsets[0] != 0 or (np.diff(offsets.astype(np.int64)) <= 0).any():
        raise GuardError("offsets: expected strictly increasing numbers from 0: every class needs a component")
