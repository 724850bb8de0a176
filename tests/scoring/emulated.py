"""The backends cuda and triton of Scorer on this processor; nothing here is a test.

Their own Python side runs on the driver's double; the kernels run as fibers (CUDA) and in triton's interpreter, in a
process of its own, since triton either interprets or compiles for as long as it lives.
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
from driver_double import Binding, Driver, compile_library

from inflight_edge.guard import KINDS, Guard
from inflight_edge.scoring import Scorer
from inflight_edge.scoring.triton import read_kernels


def why_not(backend: str) -> str | None:
    """What is missing to emulate a backend here."""
    if backend == "triton" and not all(importlib.util.find_spec(name) for name in ("triton", "torch")):
        return "needs triton and torch to interpret the kernel"
    return None if shutil.which("g++") else "needs g++ to run the CUDA source on the CPU"


@functools.cache
def _double() -> tuple[Driver, Binding]:
    driver, library = Driver(), compile_library()
    driver.cubins = {cubin: KINDS.index(kind) for kind, (_, cubin) in read_kernels().items()}
    driver.library, driver.interpret = library, Interpreter()
    return driver, Binding(driver, library)


@contextmanager
def _installed() -> Iterator[None]:
    """The doubles in the place of pycuda and the binding while a scorer is made; it keeps them."""
    driver, binding = _double()
    modules = {"pycuda": SimpleNamespace(driver=driver), "pycuda.driver": driver}
    with mock.patch.dict(sys.modules, {**modules, "inflight_edge.scoring._cuda": binding}):
        yield


def emulated_scorer(guard: Guard, backend: Any) -> Scorer:
    with _installed():
        return Scorer(guard, backend=backend)


class Interpreter:
    """Runs score_kernel of _triton_kernel.py on arrays, in a process that starts with the first call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parent)},
        )
        atexit.register(_stop, process)
        return process

    def __call__(self, kind: int, arrays: dict[str, np.ndarray]) -> np.ndarray:
        """arrays: the kernel's by name, features (N, D).  Returns (N, R) float32."""
        with self._lock:
            if self._process is None:
                self._process = self._start()
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            pickle.dump((kind, arrays), self._process.stdin)
            self._process.stdin.flush()
            scores: np.ndarray = pickle.load(self._process.stdout)  # noqa: S301  from our own process
            return scores


def _stop(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    process.wait(timeout=20)
    process.stdout.close()


def _serve() -> None:
    import torch
    from triton_fused import fuse

    from inflight_edge.scoring._triton_kernel import score_kernel
    from inflight_edge.scoring.triton import BLOCKS

    fuse()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    while True:
        try:
            kind, arrays = pickle.load(sys.stdin.buffer)  # noqa: S301  from our own process
        except EOFError:
            return
        n_frames, n_features = arrays["features"].shape
        n_rows = arrays["offsets"].size - 1
        out = torch.empty((n_frames, n_rows), dtype=torch.float32)
        tensors = [torch.tensor(array) for array in arrays.values()]
        score_kernel[(n_frames, n_rows)](*tensors, out, n_features, n_rows, KIND=kind, **BLOCKS)
        pickle.dump(out.numpy(), answers)
        answers.flush()


if __name__ == "__main__":
    _serve()
