"""Builds the CUDA scorer for the CPU and feeds it cases; nothing here is a test."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from inflight_edge.guard import KINDS, FloatArray, Guard
from inflight_edge.scoring.cuda import VERDICT
from inflight_edge.scoring.parameters import prepare

ROOT = Path(__file__).resolve().parents[2]
HOST = ROOT / "tests" / "cuda_host"
CSRC = ROOT / "csrc"
# The arithmetic's branch for processors with FMA, as on a GPU; without the instruction fmaf() is slow and as exact.
FMA = ["-UFP_FAST_FMAF", "-DFP_FAST_FMAF=1"]
WARNINGS = ["-Wall", "-Wextra", "-Werror"]


@dataclass(frozen=True)
class Case:
    """One launch.  features: (N, D) float32.  logits: (N, C) float32 or None.  groups: blocks per frame, 0 for default."""

    guards: Sequence[Guard]
    features: FloatArray
    logits: FloatArray | None = None
    groups: int = 0

    @property
    def max_rows(self) -> int:
        return max(guard.classes.shape[0] for guard in self.guards)

    def encode(self) -> bytes:
        n_classes = 0 if self.logits is None else self.logits.shape[1]
        head = [len(self.guards), self.features.shape[1], n_classes, len(self.features), n_classes > 0, self.groups]
        parts = [np.array(head, np.int32)]
        for guard in self.guards:
            parameters = prepare(guard)
            shape = (guard.classes.shape[0], guard.n_components, guard.target, guard.target_row)
            parts += [np.array([KINDS.index(guard.kind), *shape], np.int32), guard.classes, parameters.offsets]
            parts += [parameters.mean, parameters.scale, parameters.origin, parameters.centres]
            parts += [parameters.whitener, parameters.constants]
        parts += [self.features] if self.logits is None else [self.features, self.logits]
        return b"".join(part.tobytes() for part in parts)


def sanitiser_works(folder: Path, *flags: str) -> bool:
    probe = folder / "probe.c"
    probe.write_text("int main(void) { return 0; }\n")
    command = ["gcc", *flags, str(probe), "-o", str(folder / "probe")]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        return False
    return subprocess.run([folder / "probe"], capture_output=True, check=False).returncode == 0


def compile_fibers(folder: Path, job: str = "score") -> Path:
    """A block's threads as fibers, under AddressSanitizer and UBSan where there are such."""
    sanitisers = ["-fsanitize=address,undefined", "-fsanitize-sections=cuda_shared", "-fno-sanitize-recover=all"]
    flags = sanitisers if sanitiser_works(folder, sanitisers[0]) else []
    return compile_host(folder / "main", "-O1", "-g", *flags, job=job)


def compile_threads(folder: Path, job: str = "score") -> Path | None:
    """One system thread per CUDA thread, 64 in a block, under ThreadSanitizer; None where that cannot run."""
    if not sanitiser_works(folder, "-fsanitize=thread"):
        return None
    flags = "-O1", "-g", "-fsanitize=thread", "-DCUDA_HOST_THREADS", "-DIFE_CUDA_BLOCK=64"
    return compile_host(folder / "main", *flags, job=job)


def barriers(*names: str) -> list[str]:
    """file:line of every barrier within a block, for CUDA_HOST_SKIP."""
    return [
        f"{name}:{number}"
        for name in names
        for number, line in enumerate((CSRC / name).read_text().splitlines(), 1)
        if "__syncthreads();" in line and "between blocks" not in line
    ]


def compile_host(target: Path, *flags: str, job: str = "score") -> Path:
    """Executable of csrc/JOB_cuda.cu on the CPU."""
    sources = ["-x", "c++", CSRC / f"{job}_cuda.cu", HOST / f"{job}_main.cpp"]
    compile_checked("g++", "-std=c++20", *WARNINGS, *FMA, *flags, f"-I{HOST}", f"-I{CSRC}", *sources, "-o", target)
    return target


def compile_checked(*command: str | Path) -> str:
    """What the compiler printed; the assertion shows it when it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def run_host(program: Path, cases: Sequence[Case], **environment: str) -> list[tuple[np.ndarray, FloatArray]]:
    """Per case the verdicts (N,) VERDICT and the log-likelihoods (N, most rows of a guard) float32."""
    done = run_raw(program, cases, **environment)
    assert done.returncode == 0, done.stderr.decode()
    results, at = [], 0
    for case in cases:
        n_frames = len(case.features)
        middle = at + n_frames * VERDICT.itemsize
        end = middle + n_frames * case.max_rows * 4
        verdicts = np.frombuffer(done.stdout[at:middle], VERDICT)
        scores = np.frombuffer(done.stdout[middle:end], np.float32)
        at = end
        results.append((verdicts, scores.reshape(n_frames, case.max_rows)))
    assert at == len(done.stdout)
    return results


class Encoded(Protocol):
    def encode(self) -> bytes: ...


def run_raw(program: Path, cases: Sequence[Encoded], **environment: str) -> subprocess.CompletedProcess[bytes]:
    # LeakSanitizer cannot run under a tracer, as containers and debuggers may be.
    settings = {"ASAN_OPTIONS": "detect_leaks=0", **environment}
    data = b"".join(case.encode() for case in cases)
    return subprocess.run(
        [program], input=data, capture_output=True, timeout=300, check=False, env={**os.environ, **settings}
    )
