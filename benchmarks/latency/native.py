"""The C interface called by a C program's loop: the library and the driver, compiled here and loaded into this process."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np

from benchmarks.latency.cases import Case
from benchmarks.latency.timing import Samples
from inflight_edge.errors import DependencyError
from inflight_edge.guard import KINDS, FloatArray, Guard
from inflight_edge.scoring import VERDICT_DTYPE
from inflight_edge.scoring.parameters import prepare

__all__ = ["Driver", "NativeScorer", "build_shared"]

_HERE = Path(__file__).parent
_ROOT = _HERE.parents[1]
# The probes use what this processor has; the scorers choose at run time, as they do when installed.
_PROBE_FLAGS = ("-O3", "-march=native", "-std=gnu11", "-Wall", "-Wextra", "-fPIC", "-shared", "-fvisibility=hidden")
_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_size_t


class _Guard(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("kind", "n_features", "n_rows", "n_components")),
        *((name, _POINTER) for name in ("offsets", "mean", "scale", "origin", "centres", "whitener", "constants")),
    )


class Driver:
    """The compiled driver.  Raises DependencyError where it cannot be built.

    clock_ns  median cost of a clock reading, already subtracted from every sample.
    step_ns   what every reading is a multiple of: no sample is finer.
    """

    def __init__(self, folder: Path) -> None:
        self._library = _build(folder)
        samples = np.empty(20_000, np.int64)
        self._library.ife_bench_clock(_SIZE(1000), _SIZE(samples.size), _pointer(samples))
        self.clock_ns = int(np.median(samples))
        self.step_ns = int(np.gcd.reduce(samples))

    def scorer(self, guard: Guard) -> NativeScorer:
        """A guard, loaded by ife_scorer_create."""
        return NativeScorer(self, self._library, guard)

    def time_read(self, n_bytes: int, *, n_calls: int) -> tuple[int, Samples]:
        """Nanoseconds of one pass over a buffer, and its size: n_bytes rounded up to 512."""
        size = (n_bytes + 511) // 512 * 512
        samples = np.empty(n_calls, np.int64)
        if self._library.ife_bench_read(_SIZE(size), _SIZE(n_calls // 10 + 3), _SIZE(n_calls), _pointer(samples)):
            raise MemoryError(f"bandwidth probe: no memory for {size} bytes")
        return size, self.corrected(samples)

    def time_multiply_add(self, *, n_calls: int, rounds: int = 1000) -> tuple[float, Samples]:
        """Operations of one call of independent multiply-adds in registers, and its nanoseconds."""
        samples = np.empty(n_calls, np.int64)
        function = self._library.ife_bench_multiply_add
        function.restype = ctypes.c_double
        operations = function(_SIZE(rounds), _SIZE(n_calls // 10 + 3), _SIZE(n_calls), _pointer(samples))
        return float(operations), self.corrected(samples)

    def corrected(self, samples: Samples) -> Samples:
        """Samples less the cost of the clock."""
        return np.maximum(samples - self.clock_ns, 0)


class NativeScorer:
    """One ife_scorer, timed from C."""

    def __init__(self, driver: Driver | None, library: ctypes.CDLL, guard: Guard) -> None:
        self._driver, self._library, self._scorer = driver, library, _POINTER()
        self._n_features, self._n_rows = guard.n_features, guard.classes.size
        p = prepare(guard)
        arrays = {name: getattr(p, name) for name, _ in _Guard._fields_[4:]}
        pointers = {name: array.ctypes.data if array.size else None for name, array in arrays.items()}
        shape = (KINDS.index(guard.kind), guard.n_features, guard.classes.size, guard.n_components)
        classes = np.ascontiguousarray(guard.classes)
        status = library.ife_scorer_create(
            ctypes.byref(_Guard(*shape, *pointers.values())), _pointer(classes), ctypes.c_int32(guard.target_row),
            None, ctypes.byref(self._scorer),
        )  # fmt: skip
        if status:
            raise ValueError(f"ife_scorer_create: expected status 0, got {status}")

    def __del__(self) -> None:
        self._library.ife_scorer_destroy(self._scorer)

    def scores(self, features: FloatArray) -> FloatArray:
        """(N, D) -> (N, R) by one ife_score a frame: what is compared before anything is timed."""
        out = np.empty((features.shape[0], self._n_rows), np.float32)
        for frame, row in zip(np.ascontiguousarray(features), out, strict=True):
            self._library.ife_score(self._scorer, _pointer(frame), _pointer(row))
        return out

    def batch_scores(self, features: FloatArray) -> FloatArray:
        """(N, D) -> (N, R) by one ife_score_batch."""
        out = np.empty((features.shape[0], self._n_rows), np.float32)
        self._library.ife_score_batch(self._scorer, _pointer(features), _SIZE(features.shape[0]), _pointer(out))
        return out

    def verdicts(self, features: FloatArray) -> np.ndarray:
        """Verdicts (N,) of VERDICT_DTYPE by one ife_judge a frame."""
        out = np.zeros(features.shape[0], VERDICT_DTYPE)
        for i, frame in enumerate(np.ascontiguousarray(features)):
            self._library.ife_judge(self._scorer, _pointer(frame), _POINTER(out[i : i + 1].ctypes.data))
        return out

    def _corrected(self, samples: Samples) -> Samples:
        assert self._driver is not None, "timed with a driver only"
        return self._driver.corrected(samples)

    def time_score(self, case: Case, features: FloatArray, *, n_calls: int) -> Samples:
        """Nanoseconds of one ife_score (batch 1, going round in features) or one ife_score_batch."""
        samples, warm = np.empty(n_calls, np.int64), _SIZE(n_calls // 10 + 3)
        out = np.empty((case.batch, self._n_rows), np.float32)
        where = (_pointer(out), warm, _SIZE(n_calls), _pointer(samples))
        if case.batch == 1:
            pool = (_SIZE(self._n_features), _SIZE(features.shape[0]))
            self._library.ife_bench_score(self._scorer, _pointer(features), *pool, *where)
        else:
            self._library.ife_bench_batch(self._scorer, _pointer(features[: case.batch]), _SIZE(case.batch), *where)
        return self._corrected(samples)

    def time_judge(self, features: FloatArray, *, n_calls: int) -> Samples:
        """Nanoseconds of one ife_judge, going round in features."""
        samples, verdict = np.empty(n_calls, np.int64), np.zeros(1, VERDICT_DTYPE)
        self._library.ife_bench_judge(
            self._scorer, _pointer(features), _SIZE(self._n_features), _SIZE(features.shape[0]), _pointer(verdict),
            _SIZE(n_calls // 10 + 3), _SIZE(n_calls), _pointer(samples),
        )  # fmt: skip
        return self._corrected(samples)


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    assert array.flags.c_contiguous
    return _POINTER(array.ctypes.data)


def _build(folder: Path) -> ctypes.CDLL:
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
    if compiler is None or shutil.which("make") is None:
        raise DependencyError("capi needs a C compiler and make; apt install gcc make")
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"driver-{os.getpid()}.so"
    archive = folder / "libinflight.a"
    _run("make", "-s", "-f", str(_ROOT / "csrc" / "Makefile"), f"CC={compiler}", f"BUILD={folder}", "libraries")
    whole = ("-Wl,--whole-archive", str(archive), "-Wl,--no-whole-archive", "-lm")
    _run(compiler, *_PROBE_FLAGS, f"-I{_ROOT / 'csrc'}", str(_HERE / "driver.c"), *whole, "-o", str(library))
    try:
        return ctypes.CDLL(str(library))
    finally:
        library.unlink()  # stays loaded; another run compiles its own


def build_shared(folder: Path) -> ctypes.CDLL:
    """The library with ife_bytes_read, which counts the parameters' bytes: to be read from one thread, not timed."""
    flags = "CFLAGS=-O3 -DIFE_COUNT_BYTES"
    library = folder / "libinflight.so"
    _run("make", "-s", "-f", str(_ROOT / "csrc" / "Makefile"), flags, f"BUILD={folder}", str(library))
    return ctypes.CDLL(str(library))


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode:
        raise DependencyError(f"capi: {command[0]} failed: {(done.stderr or done.stdout).strip()[:500]}")
