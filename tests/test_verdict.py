"""The rule: below zero accepts, zero and above trigger, anything else is no judgement."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inflight_edge import Decision, Verdict, decide

CLASSES = np.array([1, 4, 7], np.int32)
INF = math.inf


def judge(values: list[float], target_row: int = 1) -> Verdict:
    return decide(int(CLASSES[target_row]), np.array(values, np.float32), CLASSES, target_row)


@pytest.mark.parametrize(
    ("values", "decision", "source", "margin"),
    [
        ([-5, -1, -3], Decision.ACCEPT, None, -2.0),
        ([-5, -3, -1], Decision.TRIGGER, 7, 2.0),
        ([-1, -3, -5], Decision.TRIGGER, 1, 2.0),
        ([-5, -3, -3], Decision.TRIGGER, 7, 0.0),
        ([-1, -3, -1], Decision.TRIGGER, 1, 2.0),
        ([-INF, -3, -INF], Decision.ACCEPT, None, -INF),
        ([-INF, -INF, -3], Decision.TRIGGER, 7, INF),
        ([1e38, -3e38, 3e38], Decision.TRIGGER, 7, 6e38),
    ],
)
def test_margin_decides(values: list[float], decision: Decision, source: int | None, margin: float) -> None:
    verdict = judge(values)
    assert (verdict.decision, verdict.source, verdict.predicted) == (decision, source, 4)
    assert verdict.margin == pytest.approx(margin)
    assert verdict.reason == ""
    np.testing.assert_array_equal(verdict.log_likelihoods, np.array(values, np.float32))


@pytest.mark.parametrize(
    "values",
    [
        [math.nan, -1, -2],
        [-9, math.nan, -2],
        [-9, -1, math.nan],
        [-INF, -INF, -INF],
        [INF, -1, -2],
        [-9, INF, -2],
        [INF, INF, -2],
        [math.nan] * 3,
    ],
)
def test_no_judgement_is_never_accepted(values: list[float]) -> None:
    verdict = judge(values)
    assert verdict.decision is Decision.INVALID
    assert math.isnan(verdict.margin)
    assert verdict.source is None
    assert verdict.predicted == 4
    assert verdict.reason == "no class explains the features: a log-likelihood is NaN or all are -inf"


@given(values=st.lists(st.floats(width=32), min_size=2, max_size=6), data=st.data())
def test_accept_means_that_the_target_is_strictly_best(values: list[float], data: st.DataObject) -> None:
    target_row = data.draw(st.integers(0, len(values) - 1))
    classes = np.arange(len(values), dtype=np.int32) * 2
    scores = np.array(values, np.float32)
    before = scores.copy()
    verdict = decide(int(classes[target_row]), scores, classes, target_row)
    others = [float(v) for i, v in enumerate(scores) if i != target_row]
    assert (verdict.decision is Decision.ACCEPT) == (
        not np.isnan(scores).any() and max(others) < float(scores[target_row]) < INF
    )
    assert (verdict.source is not None) == (verdict.decision is Decision.TRIGGER)
    if verdict.source is not None:
        row = verdict.source // 2
        assert row != target_row
        assert float(scores[row]) == max(others)
    np.testing.assert_array_equal(scores, before)


def test_what_passes() -> None:
    assert [Verdict(decision).passes for decision in Decision] == [True, False, True, False]
    assert [decision.value for decision in Decision] == ["accept", "trigger", "unguarded", "invalid"]


def test_dictionary_is_plain_json() -> None:
    verdict = judge([-INF, -1.5, -3])
    text = json.dumps(verdict.as_dict(), allow_nan=False)
    assert json.loads(text) == {
        "decision": "accept",
        "predicted": 4,
        "source": None,
        "margin": -1.5,
        "log_likelihoods": {"1": None, "4": -1.5, "7": -3.0},
        "reason": "",
    }
    assert Verdict(Decision.UNGUARDED, 2).as_dict()["margin"] is None
