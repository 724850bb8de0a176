"""What is computed at load, and what is not copied."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from guards import random_guard

from inflight_edge import GuardError
from inflight_edge.guard import KINDS, Kind
from inflight_edge.scoring import VERDICT_DTYPE
from inflight_edge.scoring.parameters import Parameters, prepare
from inflight_edge.scoring.reference import whiten


@pytest.mark.parametrize("kind", KINDS)
def test_big_arrays_are_not_copied(rng: np.random.Generator, kind: Kind) -> None:
    guard = random_guard(rng, kind, 3, 2, 9)
    parameters = prepare(guard)
    assert parameters.whitener is guard.whitener
    assert (parameters.centres is guard.means) == (kind != "shared")


def test_shared_centres_are_projected_once(rng: np.random.Generator) -> None:
    guard = random_guard(rng, "shared", 4, 2, 9)
    parameters = prepare(guard)
    np.testing.assert_allclose(parameters.origin, guard.means.mean(axis=0), atol=1e-6)
    expected = whiten(guard.whitener, guard.means.astype(np.float64) - parameters.origin)
    np.testing.assert_array_equal(parameters.centres, expected.astype(np.float32))
    assert parameters.centres.flags.c_contiguous


def test_misaligned_arrays_are_copied_to_aligned_ones(rng: np.random.Generator) -> None:
    guard = random_guard(rng, "diagonal", 2, 1, 4)
    misaligned = np.frombuffer(b"\0" + guard.mean.tobytes(), np.uint8)[1:].view(np.float32)
    assert not misaligned.flags.aligned
    mean = prepare(replace(guard, mean=misaligned)).mean
    assert mean.flags.aligned
    np.testing.assert_array_equal(mean, guard.mean)


def test_extension_refuses_parameters_that_do_not_fit(rng: np.random.Generator) -> None:
    from inflight_edge.scoring._cpu import CpuBackend

    parameters = prepare(random_guard(rng, "diagonal", 3, 1, 4))
    broken: list[Parameters] = [
        replace(parameters, offsets=np.array([0, 2, 1, 3], np.int32)),
        replace(parameters, constants=parameters.constants[:2]),
        replace(parameters, mean=np.empty(0, np.float32)),
    ]
    for wrong in broken:
        with pytest.raises(
            ValueError, match="parameters: counts, offsets and arrays do not fit together, or are not finite"
        ):
            CpuBackend(wrong, np.arange(3, dtype=np.int32), 0, "portable", VERDICT_DTYPE)


def test_whitened_means_that_overflow_are_refused_with_one_line(rng: np.random.Generator) -> None:
    guard = random_guard(rng, "shared", 3, 1, 4)
    means = guard.means.copy()
    means[0, 0] = 3e38
    with pytest.raises(GuardError, match="expected whitened means that fit float32, got larger; calibrate again"):
        prepare(replace(guard, means=means, whitener=guard.whitener * np.float32(100)))
