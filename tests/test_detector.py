"""The detector: right on what can be followed by hand, and never accepting what it could not judge."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import (
    CLEAN_EAST,
    CLEAN_NORTH,
    CLEAN_WEST,
    TRIGGERED_NORTH,
    TRIGGERED_SOUTH,
    TRIGGERED_TO_NORTH,
    frame,
    tiny_bundle,
    tiny_guard,
    tiny_model,
    tiny_self_test,
    written,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from inflight_edge import (
    BundleError,
    Decision,
    Detector,
    EngineError,
    InflightError,
    OptionError,
    Preprocess,
    ScoreError,
)
from inflight_edge.scoring import predictor
from inflight_edge.verdict import Verdict

FloatArray = np.ndarray[Any, np.dtype[np.float32]]


class StubEngine:
    """Engine that returns the flattened batch times ``factor``, or raises ``error`` when a batch holds ``poison``."""

    name = "stub"

    def __init__(self, factor: float = 1.0, error: Exception | None = None, poison: float | None = None) -> None:
        self.factor, self.error, self.poison = np.float32(factor), error, poison
        self.batch_sizes: list[int] = []

    def run(self, batch: FloatArray) -> tuple[FloatArray, FloatArray]:
        self.batch_sizes.append(len(batch))
        if self.error and (self.poison is None or self.poison in batch):
            raise self.error
        flat = batch.reshape(len(batch), -1)
        return flat, flat * self.factor


@pytest.fixture(scope="module")
def detector() -> Detector:
    return Detector(tiny_bundle(), threads=1)


@pytest.mark.parametrize("scorer", ["auto", "cpu", "reference"])
def test_six_frames_from_a_bundle_on_disk(tmp_path: Path, scorer: Any) -> None:
    detector = Detector.load(written(tmp_path / "bundle"), scorer=scorer, threads=1)
    frames = [CLEAN_WEST, TRIGGERED_NORTH, TRIGGERED_SOUTH, CLEAN_EAST, CLEAN_NORTH, TRIGGERED_TO_NORTH]
    verdicts = detector.run(frames)
    assert [(v.decision, v.predicted, v.source) for v in verdicts] == [
        (Decision.ACCEPT, 3, None),
        (Decision.TRIGGER, 3, 0),
        (Decision.TRIGGER, 3, 2),
        (Decision.UNGUARDED, 1, None),
        (Decision.ACCEPT, 0, None),
        (Decision.TRIGGER, 0, 2),
    ]
    assert [v.as_dict() for v in verdicts] == [detector(f).as_dict() for f in frames]
    assert [v.passes for v in verdicts] == [True, False, False, True, True, False]
    # One pixel .5 away at standard deviation .1: 25 / 2 nats.
    assert verdicts[0].margin == pytest.approx(-12.5, rel=1e-5)
    assert verdicts[0].log_likelihoods.shape == verdicts[0].classes.shape == (4,)
    assert sorted(detector.guards) == [0, 3]
    assert detector.class_names == ("north", "east", "south", "west")


def test_frames_of_other_sizes_and_channels_are_fitted(detector: Detector) -> None:
    big = np.repeat(np.repeat(TRIGGERED_NORTH, 5, axis=0), 5, axis=1)
    coloured = np.repeat(TRIGGERED_NORTH, 3, axis=2)
    flat = TRIGGERED_NORTH[:, :, 0]
    assert [v.source for v in detector.run([big, coloured, flat])] == [0, 0, 0]


def test_empty_run(detector: Detector) -> None:
    assert detector.run([]) == []


def test_run_batches_and_keeps_the_order() -> None:
    engine = StubEngine()
    detector = Detector(tiny_bundle(), engine=engine)
    frames = [frame(*np.roll([255, 0, 0, 0], i)) for i in range(10)]
    verdicts = detector.run(frames, batch_size=4)
    assert engine.batch_sizes == [4, 4, 2]
    assert [v.predicted for v in verdicts] == [i % 4 for i in range(10)]
    with pytest.raises(OptionError, match="batch size: expected at least 1, got 0"):
        detector.run(frames, batch_size=0)


BAD_FRAMES: list[tuple[Any, str]] = [
    (CLEAN_WEST.astype(np.float32), "frame: expected a uint8 array, got float32"),
    (None, "frame: expected a uint8 array, got NoneType"),
    (np.zeros((2, 2, 2), np.uint8), r"frame: expected 1 channels, got shape \(2, 2, 2\)"),
    (np.zeros((0, 2), np.uint8), r"frame: expected shape \(H, W\) or \(H, W, channels\), got \(0, 2\)"),
    (np.zeros((1, 2, 2, 1), np.uint8), r"frame: expected shape"),
    (np.zeros(4, np.uint8), r"frame: expected shape"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD_FRAMES)
def test_bad_frame_is_invalid_and_spoils_no_other(detector: Detector, bad: Any, reason: str) -> None:
    verdicts = detector.run([CLEAN_WEST, bad, TRIGGERED_NORTH])
    assert [v.decision for v in verdicts] == [Decision.ACCEPT, Decision.INVALID, Decision.TRIGGER]
    assert re.match(reason, verdicts[1].reason)
    assert verdicts[1].predicted is None
    assert not verdicts[1].passes
    assert detector(bad).decision is Decision.INVALID


def test_failing_engine_invalidates_its_batch_and_says_so() -> None:
    engine = StubEngine(error=EngineError("device lost"), poison=1.0)
    detector = Detector(tiny_bundle(), engine=engine)
    dim, bright = frame(0, 0, 0, 200), frame(0, 0, 0, 255)
    verdicts = detector.run([dim, dim, bright, dim, None, dim], batch_size=2)  # type: ignore[list-item]
    assert [v.decision for v in verdicts[2:4]] == [Decision.INVALID] * 2
    assert {v.reason for v in verdicts[2:4]} == {"engine stub: device lost"}
    assert [v.predicted for v in verdicts] == [3, 3, None, None, None, 3]
    assert verdicts[4].reason.startswith("frame: expected a uint8 array")


@pytest.mark.parametrize(
    ("logits", "features"),
    [((1, 4), (2, 4)), ((2, 4), (1, 4)), ((4,), (2, 4)), ((2, 4), (2, 4, 1)), ((3, 4), (3, 4))],
)
def test_engine_with_another_number_of_rows_is_never_accepted(logits: Any, features: Any) -> None:
    class Wrong:
        name = "wrong"

        def run(self, batch: FloatArray) -> tuple[FloatArray, FloatArray]:
            return np.zeros(logits, np.float32), np.zeros(features, np.float32)

    for verdict in Detector(tiny_bundle(), engine=Wrong()).run([CLEAN_WEST, CLEAN_EAST]):
        assert verdict.decision is Decision.INVALID
        assert "engine wrong: " in verdict.reason
        assert "expected 2 rows, got shape" in verdict.reason


@pytest.mark.parametrize("factor", [np.nan, np.inf])
def test_non_finite_features_are_never_accepted_guarded_or_not(factor: float) -> None:
    detector = Detector(tiny_bundle(), engine=StubEngine(factor))
    with np.errstate(invalid="ignore"):
        verdicts = detector.run([CLEAN_WEST, CLEAN_EAST])
    assert [v.decision for v in verdicts] == [Decision.INVALID] * 2
    assert [v.predicted for v in verdicts] == [3, 1]
    assert all("features: expected finite numbers, got" in v.reason for v in verdicts)


def test_whatever_an_engine_raises_no_frame_passes() -> None:
    detector = Detector(tiny_bundle(), engine=StubEngine(error=ZeroDivisionError("bug")))
    verdict = detector(CLEAN_WEST)
    assert verdict.decision is Decision.INVALID
    assert verdict.reason.endswith("ZeroDivisionError: bug")


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (np.broadcast_to(np.uint8(0), (10**6, 10**6)), "expected at most 268435456 values"),
        (np.broadcast_to(np.uint8(0), (8, 8, 10**12)), "expected at most 268435456 values"),
        (np.zeros((4, 4, 5), np.uint8), "channels"),
    ],
)
def test_frames_that_would_exhaust_the_memory(detector: Detector, frame: np.ndarray, reason: str) -> None:
    verdict = detector(frame)
    assert verdict.decision is Decision.INVALID
    assert reason in verdict.reason


def test_sub_classes_of_arrays_and_iterators_of_frames(detector: Detector) -> None:
    with pytest.warns(PendingDeprecationWarning, match="matrix"):
        matrix = np.asmatrix(CLEAN_WEST.reshape(CLEAN_WEST.shape[:2]))
    plain, other = detector.run(iter([CLEAN_WEST, matrix]))
    assert plain == other


def test_scorer_that_fails_is_never_accepted(detector: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        backend = "cpu"

        def verdict(self, features: FloatArray, *, log_likelihoods: bool) -> Verdict:
            raise ScoreError("out of order")

    monkeypatch.setattr(detector, "guards", {3: Failing()})
    verdict = detector(CLEAN_WEST)
    assert (verdict.decision, verdict.predicted) == (Decision.INVALID, 3)
    assert verdict.reason == "scorer cpu: out of order"


GOOD = np.array([0, 0, 0, 1], np.float32)


@pytest.mark.parametrize(
    ("features", "logits", "reason", "predicted"),
    [
        (GOOD[:3], GOOD, "features: expected a float32 array (4,), got float32 (3,)", 3),
        (GOOD[None], GOOD, "features: expected a float32 array (4,), got float32 (1, 4)", 3),
        (GOOD.astype(np.float64), GOOD, "features: expected a float32 array (4,), got float64 (4,)", 3),
        (GOOD.tolist(), GOOD, "features: expected a float32 array (4,), got list", 3),
        (GOOD, GOOD[:3], "logits: expected a float32 array (4,), got float32 (3,)", None),
        (GOOD, GOOD.astype(np.float16), "logits: expected a float32 array (4,), got float16 (4,)", None),
        (GOOD, None, "logits: expected a float32 array (4,), got NoneType", None),
        (GOOD, GOOD * np.float32(np.nan), "logits: expected finite numbers, got 4 NaN or infinite of 4", None),
    ],
)
def test_score_of_wrong_arrays_is_invalid(
    detector: Detector, features: Any, logits: Any, reason: str, predicted: int | None
) -> None:
    verdict = detector.score(features, logits)
    assert (verdict.decision, verdict.reason, verdict.predicted) == (Decision.INVALID, reason, predicted)


def test_score_takes_views_that_are_not_contiguous(detector: Detector) -> None:
    strided = np.repeat(np.array([0.5, 0, 0, 1], np.float32), 2)[::2]
    assert detector.score(strided, GOOD).source == 0


def test_first_of_equal_logits_is_predicted(detector: Detector) -> None:
    assert detector.score(GOOD, np.ones(4, np.float32)).predicted == 0


def test_frame_that_no_class_explains_is_invalid(detector: Detector) -> None:
    """Features so far out that every log-likelihood is -inf in float32."""
    verdict = detector.score(np.full(4, 3e38, np.float32), GOOD)
    assert verdict.decision is Decision.INVALID
    assert verdict.predicted == 3


anything = st.floats(width=32)


@settings(max_examples=200, deadline=None)
@given(features=st.lists(anything, min_size=4, max_size=4), logits=st.lists(anything, min_size=4, max_size=4))
def test_nothing_non_finite_ever_passes(detector: Detector, features: list[float], logits: list[float]) -> None:
    verdict = detector.score(np.array(features, np.float32), np.array(logits, np.float32))
    if not np.isfinite([*features, *logits]).all():
        assert verdict.decision is Decision.INVALID
        assert verdict.reason
    if verdict.passes and verdict.decision is Decision.ACCEPT:
        assert verdict.margin < 0
        assert verdict.predicted in detector.guards


def test_judge_takes_each_frames_colour_and_gives_its_times(detector: Detector) -> None:
    blue = np.zeros((2, 2, 3), np.uint8)
    blue[1, 1] = 0, 0, 255
    red = blue[:, :, ::-1]
    stages: list[dict[str, int]] = [{} for _ in range(4)]
    frames = [blue, red, CLEAN_WEST.astype(np.float32), CLEAN_EAST]
    verdicts = detector.judge(frames, ["rgb", "bgr", "rgb", "rgb"], stages)
    assert verdicts[0] == verdicts[1] == detector(blue)
    assert [v.decision for v in verdicts[2:]] == [Decision.INVALID, Decision.UNGUARDED]
    assert [set(times) for times in stages] == [
        {"preprocess", "engine", "guard"}, {"preprocess", "engine", "guard"}, {"preprocess"},
        {"preprocess", "engine", "guard"},
    ]  # fmt: skip
    assert stages[0]["engine"] == stages[3]["engine"] > 0
    assert all(time >= 0 for times in stages for time in times.values())


# --- making one


def test_unknown_engine_and_scorer_are_named() -> None:
    with pytest.raises(OptionError, match="engine: expected one of onnxruntime, openvino, tensorrt, got 'tflite'"):
        Detector(tiny_bundle(), engine="tflite")
    with pytest.raises(OptionError, match="backend: expected one of auto, cpu, cuda, triton, reference, got 'gpu'"):
        Detector(tiny_bundle(), scorer="gpu")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": tiny_model(n_features=3)},
            "model.onnx: features: expected 4 as in the bundle, got 3; calibrate",
        ),
        ({"preprocess": Preprocess((1, 4, 2))}, "model.onnx: input height: expected 4 as in the bundle, got 2"),
        ({"preprocess": Preprocess((3, 2, 2))}, "model.onnx: input channels: expected 3 as in the bundle, got 1"),
        ({"model": b"junk"}, "model: expected an ONNX file"),
    ],
)
def test_model_that_contradicts_its_bundle_is_refused_at_load(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InflightError, match=message):
        Detector(tiny_bundle(**changes))


def test_model_with_another_number_of_classes_is_refused_at_load() -> None:
    test = tiny_self_test((tiny_guard(3),))
    wider = np.pad(test.logits, ((0, 0), (0, 1)))
    self_test = type(test)(test.frames, wider, test.features, test.log_likelihoods, test.decisions, test.sources)
    bundle = tiny_bundle(guards=(tiny_guard(3),), class_names=tuple("abcde"), self_test=self_test)
    with pytest.raises(BundleError, match=r"model.onnx: logits: expected 5 as in the bundle, got 4"):
        Detector(bundle)


def test_load_refuses_a_broken_bundle(tmp_path: Path) -> None:
    path = written(tmp_path / "bundle")
    (path / "model.onnx").write_bytes(b"x")
    with pytest.raises(BundleError, match=r"model.onnx: expected \d+ bytes, got 1"):
        Detector.load(path)


@pytest.mark.parametrize("native", [True, False])
def test_prediction_is_the_largest_finite_logit_or_none(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setitem(sys.modules, "inflight_edge.scoring._cpu", None)
    predict = predictor()
    assert predict(np.array([1, 3, 2, 3], np.float32), 4) == 1
    assert predict(np.array([-5], np.float32), 1) == 0
    for bad in (np.nan, np.inf, -np.inf):
        for at in range(3):
            logits = np.array([1, 2, 3], np.float32)
            logits[at] = bad
            assert predict(logits, 3) == -1
    fine = np.zeros(3, np.float32)
    assert [predict(x, 3) for x in (None, fine[:2], fine.astype(float), fine[None], np.zeros(6, np.float32)[::2])] == [
        -1
    ] * 5
    assert predict(fine[:0], 0) == -1


def test_strided_outputs_of_an_engine_are_judged(detector: Detector) -> None:
    logits, features = np.zeros(8, np.float32), np.zeros(8, np.float32)
    logits[6] = features[6] = 1.0
    verdict = detector.score(features[::2], logits[::2])
    assert (verdict.decision, verdict.predicted) == (Decision.ACCEPT, 3)


def test_verdicts_without_log_likelihoods_are_the_same() -> None:
    with_rows, without = Detector(tiny_bundle(), threads=1), Detector(tiny_bundle(), threads=1, log_likelihoods=False)
    for shown in (CLEAN_WEST, TRIGGERED_NORTH, CLEAN_EAST):
        verdict = without(shown)
        assert verdict == with_rows(shown)
        assert verdict.log_likelihoods.size == verdict.classes.size == 0
