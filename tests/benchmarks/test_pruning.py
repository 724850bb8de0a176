"""Bytes that a verdict on many classes reads: counted in C, on verdicts that are checked."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from guards import random_features, random_guard

from benchmarks.latency import pruning
from benchmarks.latency.native import NativeScorer, build_shared
from benchmarks.latency.tables import render
from inflight_edge.environment import describe_environment

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="compiles the C library")


def test_a_verdict_on_many_classes_reads_less_and_is_the_same(tmp_path: Path, rng: np.random.Generator) -> None:
    library = build_shared(tmp_path)
    guard = random_guard(rng, "diagonal", 300, 1, 256)
    frames = random_features(rng, guard, 20)
    scorer = NativeScorer(None, library, guard)
    record = pruning._count(library, scorer, guard, frames)
    # Means, deviations and standardiser of every row, four bytes a number; a few more for the padding.
    assert record["plain_bytes"] == pytest.approx(4 * 256 * (2 * 300 + 3), rel=0.05)
    assert record["verdict_bytes"] < 0.5 * record["plain_bytes"]
    assert record["share"] == round(record["verdict_bytes"] / record["plain_bytes"], 4)
    row = {"kind": "diagonal", "classes": 300, "features": 256, **record}
    result = {"records": [], "quick": False, "notes": [], "skipped": [], "pruning": [row]}
    text = render(result | {"environment": describe_environment() | {"commit": ""}})
    assert f"| {record['share']:.1%} |" in text

    class Wrong:
        scores = staticmethod(scorer.scores)

        @staticmethod
        def verdicts(frames: np.ndarray) -> np.ndarray:
            verdicts = scorer.verdicts(frames)
            verdicts["margin"][3] += 1.0
            return verdicts

    with pytest.raises(AssertionError, match="not counted"):
        pruning._count(library, Wrong(), guard, frames)  # type: ignore[arg-type]
