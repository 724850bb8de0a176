"""A guard is right or it is not made."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from guards import random_guard
from hypothesis import given
from hypothesis import strategies as st

from inflight_edge import Guard, GuardError
from inflight_edge.guard import KINDS, MAX_COMPONENTS, MAX_FEATURES, Kind, packed_size

ARRAYS = ("classes", "offsets", "mean", "scale", "means", "log_weights", "whitener", "clean_margins")


def fields(kind: Kind = "diagonal", **changes: Any) -> dict[str, Any]:
    """Constructor arguments of a valid guard: R = 3, M = 5, D = 4, with ``changes``."""
    guard = random_guard(np.random.default_rng(0), kind, 3, [1, 2, 2], 4)
    arguments = {name: getattr(guard, name) for name in Guard.__slots__}
    arguments |= {name: arguments[name].copy() for name in ARRAYS}
    arguments |= {"classes": np.array([0, 2, 5], np.int32), "target": 2}
    return arguments | changes


@given(
    kind=st.sampled_from(KINDS),
    counts=st.lists(st.integers(1, 4), min_size=2, max_size=5),
    n_features=st.integers(1, 9),
    seed=st.integers(0, 1 << 32),
)
def test_random_guards_are_valid_and_frozen(kind: Kind, counts: list[int], n_features: int, seed: int) -> None:
    guard = random_guard(np.random.default_rng(seed), kind, len(counts), counts, n_features)
    assert (guard.n_features, guard.n_components) == (n_features, sum(counts))
    assert guard.classes[guard.target_row] == guard.target
    assert not any(getattr(guard, name).flags.writeable for name in ARRAYS)


def test_packed_size() -> None:
    assert [packed_size(n) for n in (1, 2, 3, 1280)] == [1, 3, 6, 819840]


def test_no_clean_margins_are_allowed() -> None:
    assert Guard(**fields(clean_margins=np.empty(0, np.float32))).clean_margins.size == 0


def with_value(name: str, index: Any, value: float, kind: Kind = "diagonal") -> dict[str, Any]:
    arguments = fields(kind)
    arguments[name][index] = value
    return arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (fields() | {"kind": "tied"}, "kind: expected one of diagonal, shared, full, got 'tied'"),
        (fields(target=1), "target: expected one of the guard's classes, got 1"),
        (fields(target=np.int64(2)), "target: expected one of the guard's classes, got"),
        (fields(target=True), "target: expected one of the guard's classes, got True"),
        (fields(classes=np.array([0, 2, 2], np.int32)), "classes: expected strictly increasing class indices from 0"),
        (fields(classes=np.array([-1, 2, 5], np.int32)), "classes: expected strictly increasing class indices from 0"),
        (fields(classes=np.array([2], np.int32)), "classes: expected at least 2 density rows, got 1"),
        (fields(classes=np.array([0, 2, 5])), "classes: expected dtype int32, got int64"),
        (fields(offsets=np.array([0, 1, 3], np.int32)), r"offsets: expected shape \(4,\), got \(3,\)"),
        (fields(offsets=np.array([0, 1, 1, 5], np.int32)), "offsets: expected strictly increasing numbers from 0"),
        (fields(offsets=np.array([1, 2, 3, 5], np.int32)), "offsets: expected strictly increasing numbers from 0"),
        (fields(offsets=np.array([0, 1, 3, 6], np.int32)), r"means: expected shape \(6, 4\), got \(5, 4\)"),
        (
            fields(offsets=np.array([0, 1, 2, MAX_COMPONENTS + 1], np.int32)),
            f"offsets: expected at most {MAX_COMPONENTS} components, got {MAX_COMPONENTS + 1}",
        ),
        (fields(mean=np.zeros((4, 1), np.float32)), "mean: expected shape"),
        (fields(mean=np.zeros(0, np.float32)), f"mean: expected 1 to {MAX_FEATURES} features, got 0"),
        (
            fields(mean=np.zeros(MAX_FEATURES + 1, np.float32)),
            f"mean: expected 1 to {MAX_FEATURES} features, got {MAX_FEATURES + 1}",
        ),
        (fields(mean=[0.0] * 4), "mean: expected a NumPy array, got list"),
        (fields(means=np.zeros((5, 4))), "means: expected dtype float32, got float64"),
        (
            fields(means=np.zeros((4, 5), np.float32).T),
            "means: expected a C-contiguous array; pass",
        ),
        (with_value("mean", 0, np.nan), "mean: expected finite numbers, got 1 NaN or infinite; calibrate again"),
        (with_value("means", (1, 2), np.inf), "means: expected finite numbers, got 1 NaN or infinite"),
        (with_value("scale", 0, np.nan), "scale: expected finite numbers"),
        (with_value("scale", 0, 0.0), "scale: expected every entry > 0, got 0.0; calibrate again"),
        (with_value("scale", 0, -1.0), "scale: expected every entry > 0, got -1.0"),
        (with_value("log_weights", 0, -np.inf), "log_weights: expected finite numbers"),
        (with_value("log_weights", 0, 0.1), "log_weights: weights of class 0 sum to 1.10517, expected 1"),
        (with_value("whitener", (0, 0), np.nan), "whitener: expected finite numbers"),
        (with_value("whitener", (0, 0), 0.0), "whitener: expected a positive diagonal, got 0.0; calibrate again"),
        (with_value("whitener", 9, -1.0, "shared"), "whitener: expected a positive diagonal, got -1.0"),
        (with_value("whitener", (4, 5), 0.0, "full"), "whitener: expected a positive diagonal, got 0.0"),
        (fields("shared", whitener=np.ones((1, 10), np.float32)), r"whitener: expected shape \(10,\), got \(1, 10\)"),
        (fields("full", whitener=np.ones((5, 9), np.float32)), r"whitener: expected shape \(5, 10\), got \(5, 9\)"),
        (fields(clean_margins=np.array([1, 0], np.float32)), "clean_margins: expected ascending numbers without NaN"),
        (fields(clean_margins=np.array([np.nan], np.float32)), "clean_margins: expected ascending numbers without NaN"),
        (fields(clean_margins=np.zeros((2, 2), np.float32)), "clean_margins: expected shape"),
        (fields(clean_margins=np.zeros((), np.float32)), "clean_margins: expected shape"),
        (fields(clean_margins=np.array([np.inf, np.inf, 0], np.float32)), "clean_margins: expected ascending"),
        (fields(clean_margins=[1.0]), "clean_margins: expected a NumPy array, got list"),
    ],
)
def test_broken_invariant_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(GuardError, match=message):
        Guard(**arguments)


def test_off_diagonal_zeros_and_negatives_are_fine() -> None:
    whitener = fields("full")["whitener"]
    whitener[:, [1, 3, 4, 6, 7, 8]] = [0.0, -1.0, 0.0, -2.0, 3.0, 0.0]
    assert Guard(**fields("full", whitener=whitener)).n_components == 5


def test_weights_that_overflow_are_refused_quietly() -> None:
    with pytest.raises(GuardError, match="log_weights: weights of class 0 sum to inf, expected 1"):
        Guard(**with_value("log_weights", 0, 3e38))
