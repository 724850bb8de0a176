"""Scorer: checks once, chooses a backend, and gives a guard's log-likelihoods of a frame without allocating."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol, get_args

import numpy as np

from inflight_edge._optional import require
from inflight_edge.errors import DependencyError, OptionError, ScoreError
from inflight_edge.guard import FloatArray, Guard
from inflight_edge.scoring.parameters import prepare
from inflight_edge.scoring.reference import log_likelihoods
from inflight_edge.scoring.verdict_record import DECISIONS, VERDICT_DTYPE, VerdictArray, is_record, write_verdict
from inflight_edge.verdict import Decision, Verdict, decide

__all__ = [
    "DECISIONS",
    "VERDICT_DTYPE",
    "Backend",
    "Scorer",
    "available_backends",
    "instruction_set",
    "instruction_sets",
    "predictor",
]

Backend = Literal["auto", "cpu", "cuda", "triton", "reference"]


class Scorer:
    """Log-likelihoods of feature vectors under the class densities of one guard.

    guard       what the frames are judged by.
    backend     ``cpu``: the C extension, float32; ``cuda``: an NVIDIA GPU, frames copied to it, float32;
                ``triton``: the same on a Jetson Orin with the kernel of the Triton language, compiled beforehand;
                ``reference``: float64 NumPy, the definition, slow;
                ``auto``: the fastest native one, ``cpu``; never the reference behind the caller's back.
                The attribute holds the one chosen.
    instruction_set  for ``cpu``: one of instruction_sets(), None for the fastest; for tests and comparisons.
                The attribute holds the one chosen, "" for the others.
    n_features  D, the length of a feature vector.
    n_rows      R, the number of density rows.

    Any number of threads may call one Scorer.  A frame with a NaN or infinite feature scores NaN in every row.
    Raises OptionError for an unknown backend or instruction set and DependencyError when the chosen one cannot run here.
    """

    def __init__(self, guard: Guard, *, backend: Backend = "auto", instruction_set: str | None = None) -> None:
        if backend not in get_args(Backend):
            raise OptionError(f"backend: expected one of {', '.join(get_args(Backend))}, got {backend!r}")
        if instruction_set is not None and backend not in ("auto", "cpu"):
            raise OptionError(
                f"instruction set: expected None for the backend {backend}, got {instruction_set!r}; only cpu has a choice"
            )
        self.guard = guard
        self.backend: str = "cpu" if backend == "auto" else backend
        self.n_features = guard.n_features
        self.n_rows = int(guard.classes.shape[0])
        self.instruction_set = _choose(instruction_set) if self.backend == "cpu" else ""
        self._native: _Backend = _BACKENDS[self.backend](guard, self.instruction_set)
        # Of the C extension alone; the others write a record, as judge_into does.
        self._verdict: Callable[[FloatArray, bool], Verdict | None] | None = getattr(self._native, "verdict", None)

    def score_into(self, features: FloatArray, out: FloatArray) -> None:
        """Write the log-likelihoods of one frame.

        features: (D,) float32, not standardised, may be read-only.  out: (R,) float32, nats, one per density row.
        Both C-contiguous.  With the backend ``cpu`` nothing is allocated and the GIL is released.
        Raises ScoreError when an array does not fit; out is untouched then.
        """
        if not self._native.score_into(features, out):
            raise ScoreError(
                _mismatch("features", features, (self.n_features,))
                or _mismatch("out", out, (self.n_rows,), writeable=True)
                or _REFUSED
            )

    def score(self, features: FloatArray) -> FloatArray:
        """Log-likelihoods of one frame: (D,) float32 C-contiguous -> (R,) float32 nats.  Raises ScoreError."""
        out = np.empty(self.n_rows, np.float32)
        self.score_into(features, out)
        return out

    def judge_into(self, features: FloatArray, out: VerdictArray) -> None:
        """Write the verdict on one frame that was predicted as the guard's target, by the rule of verdict.decide.

        features: as in score_into.  out: (1,) of VERDICT_DTYPE: decision, an index in DECISIONS; source, the class
        index of a TRIGGER, else -1; margin, nats, NaN when INVALID.  Reads fewer parameters than score_into where the
        verdict needs fewer.  With the backend ``cpu`` nothing is allocated and the GIL is released.
        Raises ScoreError when an array does not fit; out is untouched then.
        """
        if not self._native.judge_into(features, out):
            raise ScoreError(
                _mismatch("features", features, (self.n_features,))
                or "out: expected a writeable C-contiguous array of shape (1,) and dtype VERDICT_DTYPE; "
                "pass numpy.zeros(1, VERDICT_DTYPE)"
            )

    def verdict(self, features: FloatArray, *, log_likelihoods: bool = True) -> Verdict:
        """Verdict on one frame that was predicted as the guard's target, by the rule of verdict.decide.

        features: as in score_into.  log_likelihoods: False leaves them out; the verdict alone may read less.
        With the backend ``cpu`` both come from one pass over the parameters.  Raises ScoreError.
        """
        verdict = None
        if self._verdict is not None:
            verdict = self._verdict(features, log_likelihoods)
        elif not log_likelihoods:
            verdict = self._judge(features)
        if verdict is not None:
            return verdict
        guard = self.guard
        return decide(guard.target, self.score(features), guard.classes, guard.target_row)

    def _judge(self, features: FloatArray) -> Verdict | None:
        """The record of judge_into as a Verdict; None when INVALID: the record has no reason."""
        out = np.zeros(1, VERDICT_DTYPE)
        self.judge_into(features, out)
        decision, source, margin, _, _ = out.item()
        if DECISIONS[decision] is Decision.INVALID:
            return None
        return Verdict(DECISIONS[decision], self.guard.target, None if source < 0 else source, margin)

    def score_batch(self, features: FloatArray) -> FloatArray:
        """Log-likelihoods of N >= 0 frames: (N, D) float32 C-contiguous -> (N, R) float32 nats.

        Each frame scores as it would alone.  Raises ScoreError.
        """
        mismatch = _mismatch("features", features, (None, self.n_features))
        if mismatch:
            raise ScoreError(mismatch)
        out = np.empty((features.shape[0], self.n_rows), np.float32)
        if not self._native.score_batch_into(features, out):
            raise ScoreError(_REFUSED)
        return out


def available_backends() -> tuple[str, ...]:
    """Backends that can run on this machine: ``cpu`` if its extension is there, ``cuda`` and ``triton`` with a GPU and
    what they need, ``reference`` always.
    """
    names = []
    for name, check in _CHECKS.items():
        try:
            check()
        except DependencyError:
            continue
        names.append(name)
    return (*names, "reference")


def instruction_sets() -> tuple[str, ...]:
    """Instruction sets of the C scorer on this processor, fastest first.  Raises DependencyError without it."""
    names: tuple[str, ...] = require(_EXTENSION, _REMEDY).instruction_sets()
    return names


def instruction_set() -> str:
    """The instruction set that a Scorer with the backend ``cpu`` runs unless told otherwise.  Raises DependencyError."""
    return instruction_sets()[0]


def predictor() -> Callable[[FloatArray, int], int]:
    """Function (logits, n_classes) -> class index of the largest of (n_classes,) float32 logits, the lowest among equals;
    -1 when the array does not fit or is not finite.  The C extension's, or NumPy's where that is not built.
    """
    try:
        native: Callable[[FloatArray, int], int] = require(_EXTENSION, _REMEDY).predict
    except DependencyError:
        return _predict
    return native


def _predict(logits: FloatArray, n_classes: int) -> int:
    fits = _mismatch("logits", logits, (n_classes,)) is None and n_classes > 0 and bool(np.isfinite(logits).all())
    return int(np.argmax(logits)) if fits else -1


_EXTENSION = "inflight_edge.scoring._cpu"
_REMEDY = 'build it with "pip install -e ." (needs a C compiler) or choose backend="reference"'
_REFUSED = "guard: expected parameters that the C interface accepts, got others; build the guard again"


class _Backend(Protocol):
    """All methods return False, and write nothing, when an array does not fit."""

    def score_into(self, features: FloatArray, out: FloatArray) -> bool:
        """(D,) -> (R,)."""

    def score_batch_into(self, features: FloatArray, out: FloatArray) -> bool:
        """(N, D) -> (N, R)."""

    def judge_into(self, features: FloatArray, out: VerdictArray) -> bool:
        """(D,) -> (1,) VERDICT_DTYPE."""


class _ReferenceBackend:
    def __init__(self, guard: Guard, instruction_set: str) -> None:
        self._guard = guard

    def score_into(self, features: FloatArray, out: FloatArray) -> bool:
        shapes = (self._guard.n_features,), (self._guard.classes.shape[0],)
        if _mismatch("features", features, shapes[0]) or _mismatch("out", out, shapes[1], writeable=True):
            return False
        return self.score_batch_into(features[None], out[None])

    def score_batch_into(self, features: FloatArray, out: FloatArray) -> bool:
        with np.errstate(over="ignore"):  # a log-likelihood below the range of float32 is -inf
            out[...] = log_likelihoods(self._guard, features)
        return True

    def judge_into(self, features: FloatArray, out: VerdictArray) -> bool:
        scores = np.empty(self._guard.classes.shape[0], np.float32)
        return is_record(out) and self.score_into(features, scores) and write_verdict(self._guard, scores, out)


def _choose(wanted: str | None) -> str:
    names = instruction_sets()
    if wanted is not None and wanted not in names:
        raise OptionError(f"instruction set: expected one of {', '.join(names)} on this processor, got {wanted!r}")
    return wanted or names[0]


def _cpu_backend(guard: Guard, instruction_set: str) -> _Backend:
    native = require(_EXTENSION, _REMEDY).CpuBackend
    backend: _Backend = native(
        prepare(guard),
        np.require(guard.classes, requirements=["C", "A"]),
        guard.target_row,
        instruction_set,
        VERDICT_DTYPE,
    )
    return backend


def _cuda_backend(guard: Guard, instruction_set: str) -> _Backend:
    backend: _Backend = require("inflight_edge.scoring.cuda", _REMEDY).cuda_backend(guard)
    return backend


def _triton_backend(guard: Guard, instruction_set: str) -> _Backend:
    backend: _Backend = require("inflight_edge.scoring.triton", _REMEDY).triton_backend(guard)
    return backend


_BACKENDS: dict[str, Callable[[Guard, str], _Backend]] = {
    "cpu": _cpu_backend,
    "cuda": _cuda_backend,
    "triton": _triton_backend,
    "reference": _ReferenceBackend,
}


_CHECKS: dict[str, Callable[[], object]] = {
    "cpu": lambda: require(_EXTENSION, _REMEDY),
    "cuda": lambda: require("inflight_edge.scoring.cuda", _REMEDY).check(),
    "triton": lambda: require("inflight_edge.scoring.triton", _REMEDY).check(),
}


def _mismatch(name: str, array: object, shape: tuple[int | None, ...], *, writeable: bool = False) -> str | None:
    """What keeps an array from being an aligned C-contiguous float32 array of that shape (None: any length)."""
    wanted = f"({', '.join('N' if size is None else str(size) for size in shape)}{',' if len(shape) == 1 else ''})"
    if not isinstance(array, np.ndarray):
        return f"{name}: expected a float32 NumPy array of shape {wanted}, got {type(array).__name__}"
    if array.dtype != np.float32:
        return f"{name}: expected dtype float32, got {array.dtype}; pass {name}.astype(numpy.float32)"
    if array.ndim != len(shape) or any(want not in (None, got) for want, got in zip(shape, array.shape, strict=True)):
        return f"{name}: expected shape {wanted}, got {array.shape}; the guard was made for other features or classes"
    if not array.flags.c_contiguous or not array.flags.aligned:
        return f"{name}: expected a C-contiguous aligned array, got strides {array.strides}; pass {name}.copy()"
    if writeable and not array.flags.writeable:
        return f"{name}: expected a writeable array, got a read-only one"
    return None
