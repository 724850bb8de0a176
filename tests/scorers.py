"""Scorers by the name of what runs them, for tests that run on each; nothing here is a test."""

from __future__ import annotations

from inflight_edge.guard import Guard
from inflight_edge.scoring import Scorer

# Written out, so that one which this processor lacks is seen to be skipped.
INSTRUCTION_SETS = ("avx512", "avx2", "neon", "portable")


def make_scorer(guard: Guard, backend: str) -> Scorer:
    """backend: ``reference``, ``cpu`` or one of INSTRUCTION_SETS."""
    if backend in INSTRUCTION_SETS:
        return Scorer(guard, backend="cpu", instruction_set=backend)
    return Scorer(guard, backend=backend)  # type: ignore[arg-type]
