"""Run by test_triton.py with TRITON_INTERPRET=1: the kernel on the CPU against the float64 definition.

Prints a line per size: kind, features, components per row, largest error as a share of the terms added.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import torch
from guards import random_features, random_guard
from triton_fused import fuse

from inflight_edge.guard import KINDS, Guard, Kind
from inflight_edge.scoring.reference import log_likelihoods, term_magnitudes
from inflight_edge.scoring.triton import TorchScorer

# The other sizes are those of test_scorer_accuracy.py, by the same interpreter.
SIZES = [33, 129]


def score(guard: Guard, frames: np.ndarray) -> np.ndarray:
    return np.asarray(TorchScorer(guard, "cpu").score_batch(torch.tensor(frames)))


def parity(rng: np.random.Generator, kind: Kind, n_features: int, counts: list[int]) -> None:
    guard = random_guard(rng, kind, len(counts), counts, n_features)
    frames = random_features(rng, guard, 1)
    error = np.abs(score(guard, frames) - log_likelihoods(guard, frames)) / term_magnitudes(guard, frames)
    print(kind, n_features, max(counts), error.max())


def special(rng: np.random.Generator, kind: Kind) -> None:
    guard = random_guard(rng, kind, 3, [2, 5, 2], 37)
    frames = random_features(rng, guard, 4)
    frames[1, 36], frames[2, 0] = np.nan, -np.inf
    frames[3] = rng.choice([-1.0, 1.0], 37) * 3e38
    scores = score(guard, frames)
    assert np.isfinite(scores[0]).all()
    assert np.isnan(scores[1:3]).all()
    assert (scores[3] == -np.inf).all()
    assert score(guard, frames[:0]).shape == (0, 3)
    # Equal rows score equal bit for bit.
    means, whitener = guard.means.copy(), guard.whitener.copy()
    means[7:], log_weights = means[:2], guard.log_weights.copy()
    log_weights[7:] = log_weights[:2]
    if kind != "shared":
        whitener[7:] = whitener[:2]
    guard = replace(guard, means=means, log_weights=log_weights, whitener=whitener)
    scores = score(guard, frames[:1])
    assert scores[0, 0] == scores[0, 2]
    # A component so far away that it is -inf, or its exponential 0, beside a finite one.
    means = guard.means.copy()
    means[1] = -1e4 if kind == "shared" else 1e25
    assert np.isfinite(score(replace(guard, means=means), frames[:1])).all()


def main() -> None:
    fuse()
    kind: Kind = KINDS[int(sys.argv[1])]
    rng = np.random.default_rng(2022)
    for size in SIZES:
        parity(rng, kind, size, [1, 2])
        parity(rng, kind, 3, [size, 1])
    special(rng, kind)


if __name__ == "__main__":
    main()
