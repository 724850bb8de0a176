"""Log-likelihoods and verdict from one pass: what score and the rule give."""

from __future__ import annotations

import numpy as np
import pytest
from guards import random_features, random_guard
from scorers import INSTRUCTION_SETS, make_scorer

from inflight_edge.errors import ScoreError
from inflight_edge.guard import KINDS, Kind
from inflight_edge.scoring import instruction_sets
from inflight_edge.verdict import Decision, decide


@pytest.fixture(params=[*INSTRUCTION_SETS, "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param != "reference" and request.param not in instruction_sets():
        pytest.skip(f"this processor or this build has no {request.param}")
    return str(request.param)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n_rows", "components"), [(2, 1), (10, 3), (70, 1)])
def test_explain_is_score_and_the_rule(
    rng: np.random.Generator, backend: str, kind: Kind, n_rows: int, components: int
) -> None:
    guard = random_guard(rng, kind, n_rows, components, 33)
    scorer = make_scorer(guard, backend)
    for frame in random_features(rng, guard, 10):
        decision, source, margin, rows = scorer.explain(frame)
        np.testing.assert_array_equal(rows, scorer.score(frame))
        want = decide(guard.target, rows, guard.classes, guard.target_row)
        assert (decision, margin) == (want.decision, want.margin)
        assert source == (-1 if want.source is None else want.source)


def test_frame_that_is_not_finite_is_invalid(rng: np.random.Generator, backend: str) -> None:
    guard = random_guard(rng, "diagonal", 4, 1, 33)
    frame = random_features(rng, guard, 1)[0]
    frame[32] = np.nan
    decision, source, margin, rows = make_scorer(guard, backend).explain(frame)
    assert (decision, source) == (Decision.INVALID, -1)
    assert np.isnan(margin)
    assert np.isnan(rows).all()


def test_wrong_features_are_refused(rng: np.random.Generator, backend: str) -> None:
    scorer = make_scorer(random_guard(rng, "diagonal", 4, 1, 33), backend)
    for wrong in (np.zeros(32, np.float32), np.zeros(33), np.zeros((33, 2), np.float32)[:, 0]):
        for method in (scorer.explain, scorer.judge):
            with pytest.raises(ScoreError, match="features"):
                method(wrong)  # type: ignore[arg-type]
