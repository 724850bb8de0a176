"""The verdict over many classes: exact though most parameters are read with 8 bits, and how much is read."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from guards import random_features, random_guard
from hypothesis import given, settings
from hypothesis import strategies as st
from scorers import INSTRUCTION_SETS, examples

from inflight_edge.guard import FloatArray, Guard, Kind
from inflight_edge.scoring import DECISIONS, VERDICT_DTYPE, Scorer, instruction_sets
from inflight_edge.verdict import Decision, decide

kinds = pytest.mark.parametrize("kind", ["diagonal", "shared"])


@pytest.mark.parametrize("spread", [0.0, 1e-4, 1e-2, 1.0, 100.0])
def test_full_guards_leave_rows_early_and_are_exact(backend: str, spread: float) -> None:
    """Rows of one and of several components, equal ones (ties), whiteners from a hundredth to a thousand."""

    @settings(max_examples=examples(20), deadline=None)
    @given(
        seed=st.integers(0, 2**32 - 1),
        n_features=st.sampled_from([1, 15, 16, 17, 33, 64, 129]),
        n_rows=st.integers(3, 9),
        most=st.integers(1, 3),
        power=st.integers(-2, 3),
    )
    def check(seed: int, n_features: int, n_rows: int, most: int, power: int) -> None:
        rng = np.random.default_rng(seed)
        guard = random_guard(rng, "full", n_rows, rng.integers(1, most + 1, n_rows), n_features)
        whitener = guard.whitener * np.float32(10.0**power)
        if spread < 1e-3:
            whitener = np.repeat(whitener[:1], guard.n_components, axis=0)
        guard = replace(guard, means=guard.means * np.float32(spread), whitener=whitener)
        frames = np.concatenate([random_features(rng, guard, 4), guard.mean[None], guard.mean[None] * 1e6])
        assert_exact(guard, frames.astype(np.float32), backend)

    check()


def test_full_guard_of_far_classes_reads_few_rows(rng: np.random.Generator, backend: str) -> None:
    guard = random_guard(rng, "full", 40, 1, 128)
    guard = replace(guard, means=guard.means * np.float32(30.0))
    assert assert_exact(guard, random_features(rng, guard, 20), backend) <= 0.1


@pytest.fixture(params=INSTRUCTION_SETS)
def backend(request: pytest.FixtureRequest) -> str:
    if request.param not in instruction_sets():
        pytest.skip(f"this processor or this build has no {request.param}")
    return request.param


def assert_exact(guard: Guard, frames: FloatArray, instruction_set: str) -> float:
    """Decision, source and margin of every frame, bit for bit.  Returns the mean share of rows read in full."""
    scorer = Scorer(guard, instruction_set=instruction_set)
    out = np.zeros(1, VERDICT_DTYPE)
    shares = []
    for frame in frames:
        scorer.judge_into(frame, out)
        decision, source, margin, n_scored, n_rows = out[0].item()
        want = decide(guard.target, scorer.score(frame), guard.classes, guard.target_row)
        assert DECISIONS[decision] is want.decision
        assert source == (-1 if want.source is None else want.source)
        np.testing.assert_array_equal(margin, want.margin)
        shares.append(n_scored / n_rows)
    return float(np.mean(shares))


def bytes_of_a_verdict(kind: Kind, n_rows: int, n_features: int, share: float) -> tuple[float, float]:
    """(bytes of parameters read by the verdict, by all log-likelihoods), one component a row."""
    whitener = 4 * n_features * (n_features + 1) / 2 if kind == "shared" else 0
    width = n_rows * n_features * (1 if kind == "shared" else 2)
    return whitener + width * (1 + 4 * share), whitener + 4 * width


@kinds
def test_thousand_classes_read_half_the_bytes(rng: np.random.Generator, backend: str, kind: Kind) -> None:
    if backend == "portable":
        pytest.skip("unpacking bytes costs the portable scorer more than reading floats: it reads them all")
    guard = random_guard(rng, kind, 1000, 1, 512)
    share = assert_exact(guard, random_features(rng, guard, 20), backend)
    read, plain = bytes_of_a_verdict(kind, 1000, 512, share)
    assert read <= 0.5 * plain


@kinds
def test_random_guards_are_exact(backend: str, kind: Kind) -> None:
    @settings(max_examples=examples(25), deadline=None)
    @given(
        seed=st.integers(0, 2**32 - 1),
        n_features=st.sampled_from([33, 129, 512, 1040]),
        n_components=st.integers(1, 3),
        spread=st.sampled_from([0.0, 1e-4, 1e-2, 1.0, 100.0]),
        power=st.integers(-2, 3),
    )
    def check(seed: int, n_features: int, n_components: int, spread: float, power: int) -> None:
        """Classes from equal (ties) to far apart, deviations from a hundredth to a thousand."""
        rng = np.random.default_rng(seed)
        # Large enough for codes, and too many means for a subspace.
        n_rows = max(140_000 // n_features, n_features) // n_components + 1
        guard = random_guard(rng, kind, n_rows, n_components, n_features)
        whitener = guard.whitener * np.float32(10.0**power)
        if kind == "diagonal" and spread < 1.0:
            whitener = np.repeat(whitener[:1], guard.n_components, axis=0)
        guard = replace(guard, means=guard.means * np.float32(spread), whitener=whitener)
        frames = np.concatenate([random_features(rng, guard, 3), guard.mean[None], guard.mean[None] * 1e6])
        assert_exact(guard, frames.astype(np.float32), backend)

    check()


@kinds
def test_equal_classes_are_a_tie(rng: np.random.Generator, backend: str, kind: Kind) -> None:
    guard = random_guard(rng, kind, 600, 1, 256)
    whitener = guard.whitener if kind == "shared" else np.repeat(guard.whitener[:1], 600, axis=0)
    guard = replace(guard, means=np.repeat(guard.means[:1], 600, axis=0), whitener=whitener)
    assert assert_exact(guard, random_features(rng, guard, 3), backend) == 1.0


@kinds
@pytest.mark.parametrize("value", [np.nan, np.inf, 3.4e38])
def test_frame_without_a_verdict_is_invalid(rng: np.random.Generator, backend: str, kind: Kind, value: float) -> None:
    guard = random_guard(rng, kind, 600, 1, 256)
    guard = replace(guard, scale=np.full(256, 1e-3, np.float32))
    frame = random_features(rng, guard, 1)[0]
    frame[255] = value
    out = np.ones(1, VERDICT_DTYPE)
    Scorer(guard, instruction_set=backend).judge_into(frame, out)
    assert DECISIONS[out["decision"][0]] is Decision.INVALID
    assert np.isnan(out["margin"][0])
