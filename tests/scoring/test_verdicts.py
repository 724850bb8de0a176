"""Scorer.verdict: the log-likelihoods of score and the verdict of the rule, from one pass."""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle
import sys

import numpy as np
import pytest
from guards import random_features, random_guard
from scorers import INSTRUCTION_SETS, make_scorer

from inflight_edge.errors import ScoreError
from inflight_edge.guard import KINDS, Kind
from inflight_edge.scoring import instruction_sets
from inflight_edge.verdict import Decision, Verdict, decide


@pytest.fixture(params=[*INSTRUCTION_SETS, "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param != "reference" and request.param not in instruction_sets():
        pytest.skip(f"this processor or this build has no {request.param}")
    return str(request.param)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n_rows", "components"), [(2, 1), (10, 3), (70, 1)])
def test_verdict_is_score_and_the_rule(
    rng: np.random.Generator, backend: str, kind: Kind, n_rows: int, components: int
) -> None:
    guard = random_guard(rng, kind, n_rows, components, 33)
    scorer = make_scorer(guard, backend)
    for frame in random_features(rng, guard, 10):
        verdict = scorer.verdict(frame)
        want = decide(guard.target, scorer.score(frame), guard.classes, guard.target_row)
        assert verdict == want
        np.testing.assert_array_equal(verdict.log_likelihoods, want.log_likelihoods)
        np.testing.assert_array_equal(verdict.classes, guard.classes)
        short = scorer.verdict(frame, log_likelihoods=False)
        assert (short.decision, short.source, short.predicted) == (want.decision, want.source, guard.target)
        assert short.margin == pytest.approx(want.margin, rel=1e-4)
        assert short.log_likelihoods.shape == short.classes.shape == (0,)


@pytest.mark.parametrize("explain", [True, False])
def test_the_object_is_what_its_class_makes(rng: np.random.Generator, backend: str, explain: bool) -> None:
    guard = random_guard(rng, "diagonal", 4, 1, 33)
    verdict = make_scorer(guard, backend).verdict(random_features(rng, guard, 1)[0], log_likelihoods=explain)
    made = Verdict(**{field.name: getattr(verdict, field.name) for field in dataclasses.fields(Verdict)})
    assert type(verdict) is Verdict
    assert (verdict, hash(verdict), repr(verdict)) == (made, hash(made), repr(made))
    assert isinstance(verdict.predicted, int)
    assert verdict.log_likelihoods.dtype == np.float32
    assert verdict.classes.dtype == np.int32
    with pytest.raises(dataclasses.FrozenInstanceError):
        verdict.margin = -1.0  # type: ignore[misc]


@pytest.mark.parametrize("explain", [True, False])
def test_the_object_lives_as_any_other(rng: np.random.Generator, backend: str, explain: bool) -> None:
    """Copied, pickled, seen by the garbage collector, and freed with all that it holds."""
    guard = random_guard(rng, "diagonal", 4, 1, 33)
    scorer, frame = make_scorer(guard, backend), random_features(rng, guard, 1)[0]
    verdict = scorer.verdict(frame, log_likelihoods=explain)
    for copied in (copy.copy(verdict), copy.deepcopy(verdict), pickle.loads(pickle.dumps(verdict))):  # noqa: S301 our own bytes
        assert (type(copied), copied, repr(copied)) == (Verdict, verdict, repr(verdict))
    assert gc.is_tracked(verdict)
    assert any(held is verdict.log_likelihoods for held in gc.get_referents(verdict))
    counted = (Verdict, Decision.ACCEPT, Decision.TRIGGER, guard.classes)
    before = [sys.getrefcount(item) for item in counted]
    for _ in range(1000):
        scorer.verdict(frame, log_likelihoods=explain)
    assert all(abs(sys.getrefcount(item) - count) < 10 for item, count in zip(counted, before, strict=True))


@pytest.mark.parametrize("explain", [True, False])
def test_frame_that_is_not_finite_is_invalid(rng: np.random.Generator, backend: str, explain: bool) -> None:
    guard = random_guard(rng, "diagonal", 4, 1, 33)
    frame = random_features(rng, guard, 1)[0]
    frame[32] = np.nan
    verdict = make_scorer(guard, backend).verdict(frame, log_likelihoods=explain)
    assert (verdict.decision, verdict.source, verdict.predicted) == (Decision.INVALID, None, guard.target)
    assert np.isnan(verdict.margin)
    assert "NaN" in verdict.reason


def test_wrong_features_are_refused(rng: np.random.Generator, backend: str) -> None:
    scorer = make_scorer(random_guard(rng, "diagonal", 4, 1, 33), backend)
    for wrong in (np.zeros(32, np.float32), np.zeros(33), np.zeros((33, 2), np.float32)[:, 0]):
        for explain in (True, False):
            with pytest.raises(ScoreError, match="features"):
                scorer.verdict(wrong, log_likelihoods=explain)  # type: ignore[arg-type]
