"""The promise on false alarms: right by hand, held in simulation, refused where it cannot be kept."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from bundles import CLEAN_WEST, TRIGGERED_NORTH, tiny_bundle
from hypothesis import given
from hypothesis import strategies as st

from inflight_edge import Decision, Detector, OptionError
from inflight_edge.guarantee import margin_limit, p_values, smallest_alpha

NATS = st.floats(-1e6, 1e6, width=32)


def test_p_values_by_hand() -> None:
    clean = [-3.0, -1.0, -1.0, 2.0]
    np.testing.assert_allclose(
        p_values([-4, -3, -2, -1, 0, 2, 3, np.nan, np.inf], clean), [1, 1, 0.8, 0.8, 0.4, 0.4, 0.2, 0, 0.2]
    )


@pytest.mark.parametrize(
    ("alpha", "limit"), [(0.2, 2.0), (0.39, 2.0), (0.4, -1.0), (0.6, -1.0), (0.8, -3.0), (0.99, -3.0)]
)
def test_limit_by_hand(alpha: float, limit: float) -> None:
    assert margin_limit([2.0, -1.0, -3.0, -1.0], alpha) == limit


@given(st.lists(NATS, min_size=1, max_size=40), st.lists(NATS, min_size=1, max_size=20), st.floats(0.001, 0.999))
def test_limit_and_p_value_say_the_same(clean: list[float], tested: list[float], alpha: float) -> None:
    if alpha < smallest_alpha(len(clean)):
        with pytest.raises(OptionError, match="alpha: expected"):
            margin_limit(clean, alpha)
        return
    flagged = np.asarray(tested) > margin_limit(clean, alpha)
    np.testing.assert_array_equal(flagged, p_values(tested, clean) <= alpha)


@pytest.mark.parametrize("n_clean", [19, 99, 100, 250])
@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.29])
def test_false_alarms_of_exchangeable_frames_keep_the_promise(n_clean: int, alpha: float) -> None:
    n_trials = 20_000
    rng = np.random.default_rng(n_clean)
    drawn = rng.standard_t(3, (n_trials, n_clean + 1))
    alarms = sum(row[-1] > margin_limit(row[:-1], alpha) for row in drawn)
    exact = math.floor(alpha * (n_clean + 1) + 1e-9) / (n_clean + 1)  # of a continuous distribution
    assert exact <= alpha + 1e-9
    assert abs(alarms / n_trials - exact) < 4 * math.sqrt(exact * (1 - exact) / n_trials)


@pytest.mark.parametrize("alpha", [1e-9, 0.009])
def test_alpha_that_cannot_be_kept_is_refused_with_the_reason(alpha: float) -> None:
    with pytest.raises(OptionError, match=r"alpha: expected 0\.0099\d* <= alpha < 1, got .* of 100 clean margins"):
        margin_limit(np.arange(100.0), alpha)


@pytest.mark.parametrize("alpha", [0.0, -1.0, 1.0, 2.0, math.nan, "0.05", None])
def test_alpha_that_is_no_rate_is_refused(alpha: Any) -> None:
    with pytest.raises(OptionError, match=r"alpha: expected a rate of false alarms, 0 < alpha < 1, got"):
        margin_limit(np.arange(100.0), alpha)


@pytest.mark.parametrize("clean", [[], [1.0, np.nan]])
def test_clean_margins_that_are_none_are_refused(clean: list[float]) -> None:
    with pytest.raises(OptionError, match="clean margins: expected at least one and no NaN"):
        p_values([0.0], clean)


def test_detector_with_alpha_judges_by_the_clean_margins() -> None:
    bundle = tiny_bundle()
    plain = Detector(bundle, threads=1)
    accepted, flagged = plain(CLEAN_WEST), plain(TRIGGERED_NORTH)
    assert (accepted.decision, flagged.decision) == (Decision.ACCEPT, Decision.TRIGGER)

    def with_clean(margins: list[float], alpha: float) -> Detector:
        guards = tuple(replace(guard, clean_margins=np.array(margins, np.float32)) for guard in bundle.guards)
        return Detector(replace(bundle, guards=guards), threads=1, alpha=alpha)

    usual = with_clean([-30.0, -20.0, -12.0, -1.0], 0.2)
    assert usual(CLEAN_WEST) == accepted
    assert usual(TRIGGERED_NORTH) == flagged
    strict = with_clean([-40.0, -30.0, -30.0, -20.0], 0.2)(CLEAN_WEST)
    assert (strict.decision, strict.margin) == (Decision.TRIGGER, accepted.margin)
    assert strict.source in {0, 1, 2}
    lenient = with_clean([-40.0, 0.0, 10.0, 1e6], 0.2)(TRIGGERED_NORTH)
    assert (lenient.decision, lenient.source, lenient.margin) == (Decision.ACCEPT, None, flagged.margin)
    with pytest.raises(OptionError, match=r"guard of class \d: alpha: expected 0\.2 <= alpha < 1, got 0\.1"):
        with_clean([0.0] * 4, 0.1)
