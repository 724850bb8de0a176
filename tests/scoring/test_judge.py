"""The native verdict against its twin: decide() on the log-likelihoods of the same scorer."""

from __future__ import annotations

import math
import re
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from guards import random_features, random_guard
from hypothesis import given, settings
from hypothesis import strategies as st
from scorers import EMULATED, INTERPRETED, examples, make_scorer

from inflight_edge.errors import ScoreError
from inflight_edge.guard import KINDS, FloatArray, Guard, Kind
from inflight_edge.scoring import DECISIONS, VERDICT_DTYPE, Scorer
from inflight_edge.scoring.reference import term_magnitudes
from inflight_edge.verdict import Decision, decide

kinds = pytest.mark.parametrize("kind", KINDS)


def judge(scorer: Scorer, frame: FloatArray) -> tuple[Decision, int | None, float]:
    """(decision, source, margin) as a Verdict names them."""
    out = np.array([(7, 7, 7.0, 7, 7)], VERDICT_DTYPE)
    scorer.judge_into(frame, out)
    decision, source, margin, n_scored, n_rows = out[0].item()
    assert 0 <= n_scored <= n_rows == scorer.n_rows
    return DECISIONS[decision], None if source == -1 else source, margin


def assert_twins(guard: Guard, frames: FloatArray, backend: str) -> None:
    """Equal wherever the verdict uses the same log-likelihoods; within their error where it uses a subspace."""
    scorer = make_scorer(guard, backend)
    finite = np.isfinite(frames).all(axis=1)
    allowed = np.zeros(len(frames))
    few = 2 * (guard.n_components - 1) < guard.n_features
    if guard.kind == "shared" and few and backend != "reference":
        allowed[finite] = 2e-5 * term_magnitudes(guard, frames[finite]).max(axis=1)
    for frame, bound in zip(frames, allowed, strict=True):
        want = decide(guard.target, scorer.score(frame), guard.classes, guard.target_row)
        decision, source, margin = judge(scorer, frame)
        if want.decision is Decision.INVALID:
            assert (decision, source) == (Decision.INVALID, None)
            assert math.isnan(margin)
        elif math.isinf(want.margin) or bound == 0:
            assert (decision, source, margin) == (want.decision, want.source, want.margin)
        else:
            assert abs(margin - want.margin) <= bound
            assert decision is (Decision.ACCEPT if margin < 0 else Decision.TRIGGER)
            assert abs(want.margin) <= bound or decision is want.decision


@pytest.mark.parametrize("components", [3, 50, 150])
def test_a_row_is_the_same_alone_and_among_many_rows(rng: np.random.Generator, backend: str, components: int) -> None:
    """23 rows of three components lie on both sides of the 64 that are added up together; 150 are more than that."""
    if backend in INTERPRETED:
        pytest.skip("interpreted: minutes")
    for _ in range(5 if backend not in EMULATED else 1):
        guard = random_guard(rng, "full", 23, components, 1)
        assert_twins(guard, random_features(rng, guard, 10), backend)


@kinds
def test_verdict_is_that_of_decide(backend: str, kind: Kind) -> None:
    slow = backend in INTERPRETED
    rows, sizes = st.integers(2, 40 if not slow else 4), st.sampled_from([1, 5, 16, 40, 130])

    @settings(max_examples=examples(30) if not slow else 2, deadline=None)
    @given(st.integers(0, 2**32 - 1), rows, st.integers(1, 3), sizes)
    def check(seed: int, n_rows: int, n_components: int, n_features: int) -> None:
        rng = np.random.default_rng(seed)
        guard = random_guard(rng, kind, n_rows, n_components, n_features)
        frames = np.concatenate([random_features(rng, guard, 6 if not slow else 2), guard.mean[None]])
        assert_twins(guard, frames, backend)

    check()


@kinds
def test_more_rows_than_are_judged_at_a_time(rng: np.random.Generator, backend: str, kind: Kind) -> None:
    n_rows, n_frames = {"cuda": (40, 1), "triton": (10, 1)}.get(backend, (1100, 8))
    guard = random_guard(rng, kind, n_rows, 1, 6)
    for target in (int(guard.classes[0]), int(guard.classes[n_rows * 6 // 11]), int(guard.classes[-1])):
        assert_twins(replace(guard, target=target), random_features(rng, guard, n_frames), backend)


@kinds
def test_means_far_apart_and_outliers(rng: np.random.Generator, backend: str, kind: Kind) -> None:
    guard = random_guard(rng, kind, 4, 1, 200)
    frames = random_features(rng, guard, 4 if backend not in INTERPRETED else 1)
    assert_twins(guard, np.concatenate([frames, frames * 1e3, frames * 1e9]), backend)


@kinds
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3.4e38])
def test_nonfinite_or_overflowing_frame_is_invalid(
    rng: np.random.Generator, backend: str, kind: Kind, value: float
) -> None:
    guard = random_guard(rng, kind, 3, [1, 2, 1], 37)
    guard = replace(guard, scale=np.full(37, 1e-3, np.float32))
    frame = random_features(rng, guard, 1)[0]
    frame[36] = value
    decision, source, margin = judge(make_scorer(guard, backend), frame)
    assert (decision, source) == (Decision.INVALID, None)
    assert math.isnan(margin)


@kinds
def test_tie_is_a_trigger_with_the_lowest_class(rng: np.random.Generator, backend: str, kind: Kind) -> None:
    guard = random_guard(rng, kind, 4, 1, 31)
    means = np.repeat(guard.means[:1], 4, axis=0)
    whitener = guard.whitener if kind == "shared" else np.repeat(guard.whitener[:1], 4, axis=0)
    guard = replace(guard, means=means, whitener=whitener, log_weights=np.zeros(4, np.float32))
    lowest = guard.classes[1] if guard.target_row == 0 else guard.classes[0]
    assert judge(make_scorer(guard, backend), random_features(rng, guard, 1)[0]) == (Decision.TRIGGER, lowest, 0.0)


@pytest.mark.parametrize(
    "out",
    [None, np.zeros(2, VERDICT_DTYPE), np.zeros((), VERDICT_DTYPE), np.zeros(1), np.zeros(2, VERDICT_DTYPE)[::2]],
)
def test_out_that_does_not_fit_is_refused(rng: np.random.Generator, backend: str, out: np.ndarray | None) -> None:
    if out is not None and out.shape == (1,) and out.dtype == VERDICT_DTYPE:
        out.flags.writeable = False
    scorer = make_scorer(random_guard(rng, "diagonal", 3, 1, 4), backend)
    message = "out: expected a writeable C-contiguous array of shape (1,) and dtype VERDICT_DTYPE"
    with pytest.raises(ScoreError, match=re.escape(message)):
        scorer.judge_into(np.zeros(4, np.float32), out)  # type: ignore[arg-type]


def test_features_that_do_not_fit_are_refused(rng: np.random.Generator, backend: str) -> None:
    scorer = make_scorer(random_guard(rng, "diagonal", 3, 1, 4), backend)
    with pytest.raises(ScoreError, match=r"features: expected shape \(4,\), got \(5,\)"):
        scorer.judge_into(np.zeros(5, np.float32), np.zeros(1, VERDICT_DTYPE))


@kinds
def test_cpu_verdict_allocates_no_python_memory_per_frame(rng: np.random.Generator, kind: Kind) -> None:
    guard = random_guard(rng, kind, 2, 1, 300)
    scorer = Scorer(guard, backend="cpu")
    frame, out = random_features(rng, guard, 1)[0], np.zeros(1, VERDICT_DTYPE)
    repeats = [None] * 100
    tracemalloc.start()
    try:
        scorer.judge_into(frame, out)
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        for _ in repeats:
            scorer.judge_into(frame, out)
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 256
    assert peak - before < 256
