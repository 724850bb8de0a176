"""Scorers by the name of what runs them, for tests that run on each; nothing here is a test."""

from __future__ import annotations

import os

from inflight_edge.guard import Guard
from inflight_edge.scoring import Scorer

# Written out, so that one which this processor lacks is seen to be skipped.
INSTRUCTION_SETS = ("avx512", "avx2", "neon", "portable")

# Run on this processor by emulators.  Triton's interpreter takes milliseconds for each block of a kernel: fewer and
# smaller cases; CUDA's threads as fibers take microseconds each: smaller cases where there are many.
EMULATED = ("cuda", "triton")
INTERPRETED = ("triton",)
# The same backends on a device.
DEVICES = ("cuda-gpu", "triton-gpu")
# All of Python runs under an emulator (tests/arm/run.sh), where random numbers alone take a second for a million.
PROCESSOR_EMULATED = os.environ.get("PROCESSOR_EMULATED") == "1"


def examples(count: int) -> int:
    """How many random cases to try."""
    return count // 4 if PROCESSOR_EMULATED else count


def make_scorer(guard: Guard, backend: str) -> Scorer:
    """backend: ``reference``, ``cpu`` or one of INSTRUCTION_SETS, EMULATED, DEVICES."""
    if backend in INSTRUCTION_SETS:
        return Scorer(guard, backend="cpu", instruction_set=backend)
    if backend in EMULATED:
        from emulated import emulated_scorer  # compiles the CUDA source

        return emulated_scorer(guard, backend)
    return Scorer(guard, backend=backend.removesuffix("-gpu"))  # type: ignore[arg-type]
