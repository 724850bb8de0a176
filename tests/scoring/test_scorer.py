"""What every backend does with any frame."""

from __future__ import annotations

import sys
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from guards import random_features, random_guard
from scorers import INSTRUCTION_SETS, INTERPRETED, make_scorer

from inflight_edge.errors import DependencyError, OptionError, ScoreError
from inflight_edge.guard import KINDS, Guard, Kind
from inflight_edge.scoring import Backend, Scorer, available_backends, instruction_set, instruction_sets
from inflight_edge.verdict import Decision, decide

kinds = pytest.mark.parametrize("kind", KINDS)


def decision(guard: Guard, scores: np.ndarray) -> Decision:
    return decide(guard.target, scores, guard.classes, guard.target_row).decision


def test_attributes_describe_the_guard(rng: np.random.Generator, backend: str) -> None:
    guard = random_guard(rng, "diagonal", 4, [1, 2, 3, 1], 5)
    scorer = make_scorer(guard, backend)
    assert (scorer.guard, scorer.n_features, scorer.n_rows) == (guard, 5, 4)
    named = ("cpu", backend) if backend in INSTRUCTION_SETS else (backend.removesuffix("-gpu"), "")
    assert (scorer.backend, scorer.instruction_set) == named


def test_fastest_instruction_set_is_the_default(rng: np.random.Generator) -> None:
    assert Scorer(random_guard(rng, "diagonal", 2, 1, 3)).instruction_set == instruction_set() == instruction_sets()[0]
    assert instruction_sets()[-1] == "portable"


@pytest.mark.parametrize("backend", ["cuda", "triton", "reference"])
def test_instruction_set_of_a_backend_without_a_choice_is_refused(rng: np.random.Generator, backend: Backend) -> None:
    guard = random_guard(rng, "diagonal", 2, 1, 3)
    with pytest.raises(OptionError, match=rf"instruction set: expected None for the backend {backend}, got 'portable'"):
        Scorer(guard, backend=backend, instruction_set="portable")


def test_unknown_instruction_set_is_refused(rng: np.random.Generator) -> None:
    with pytest.raises(OptionError, match=r"instruction set: expected one of .*portable on this processor, got 'mmx'"):
        Scorer(random_guard(rng, "diagonal", 2, 1, 3), instruction_set="mmx")


def test_auto_is_the_c_extension(rng: np.random.Generator) -> None:
    assert Scorer(random_guard(rng, "diagonal", 2, 1, 3)).backend != "reference"
    assert [name for name in available_backends() if name not in ("cuda", "triton")] == ["cpu", "reference"]


@pytest.mark.parametrize("asked", ["auto", "cpu"])
def test_missing_extension_is_an_error_and_never_the_reference(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, asked: Backend
) -> None:
    guard = random_guard(rng, "diagonal", 2, 1, 3)
    monkeypatch.setitem(sys.modules, "inflight_edge.scoring._cpu", None)
    with pytest.raises(DependencyError, match=r'pip install -e \."? .*or choose backend="reference"'):
        Scorer(guard, backend=asked)
    assert "cpu" not in available_backends()
    assert available_backends()[-1] == "reference"
    assert Scorer(guard, backend="reference").score(guard.mean.copy()).shape == (2,)


def test_unknown_backend_is_refused(rng: np.random.Generator) -> None:
    guard = random_guard(rng, "diagonal", 2, 1, 3)
    with pytest.raises(OptionError, match="backend: expected one of auto, cpu, cuda, triton, reference, got 'gpu'"):
        Scorer(guard, backend="gpu")  # type: ignore[arg-type]


@kinds
def test_batch_scores_each_frame_as_alone(rng: np.random.Generator, backend: str, kind: Kind) -> None:
    guard = random_guard(rng, kind, 5, [1, 2, 3, 1, 2], 33)
    scorer = make_scorer(guard, backend)
    features = random_features(rng, guard, 7 if backend != "triton" else 2)
    features.flags.writeable = False
    batch = scorer.score_batch(features)
    assert batch.dtype == np.float32
    out = np.empty(5, np.float32)
    for frame, expected in zip(features, batch, strict=True):
        scorer.score_into(frame, out)
        # float64 sums of the reference depend on the batch through BLAS, hence not bit for bit there.
        np.testing.assert_allclose(out, expected, rtol=0 if backend != "reference" else 1e-6)
        np.testing.assert_array_equal(scorer.score(frame), out)


@kinds
def test_empty_batch_gives_no_scores(rng: np.random.Generator, backend: str, kind: Kind) -> None:
    scorer = make_scorer(random_guard(rng, kind, 3, 2, 4), backend)
    scores = scorer.score_batch(np.empty((0, 4), np.float32))
    assert (scores.shape, scores.dtype) == ((0, 3), np.float32)


@kinds
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nonfinite_feature_anywhere_is_never_accepted(
    rng: np.random.Generator, backend: str, kind: Kind, value: float
) -> None:
    guard = random_guard(rng, kind, 3, [1, 2, 1], 37)
    scorer = make_scorer(guard, backend)
    frame = random_features(rng, guard, 1)[0]
    places = np.arange(37) if backend != "triton" else np.array([0, 20, 36])
    frames = np.tile(frame, (len(places) + 1, 1))
    frames[np.arange(len(places)), places] = value
    scores = scorer.score_batch(frames)
    assert np.isnan(scores[:-1]).all()
    assert {decision(guard, row) for row in scores[:-1]} == {Decision.INVALID}
    np.testing.assert_array_equal(scores[-1], scorer.score(frame))
    assert np.isfinite(scores[-1]).all()
    out = np.zeros(3, np.float32)
    scorer.score_into(frames[0], out)
    assert np.isnan(out).all()


@kinds
@pytest.mark.parametrize("size", [1e25, -1e30, 3.4e38])
def test_overflow_is_minus_infinity_never_nan(rng: np.random.Generator, backend: str, kind: Kind, size: float) -> None:
    guard = random_guard(rng, kind, 4, 2, 130)
    guard = replace(guard, scale=np.full(130, 1e-3, np.float32))
    signs = rng.choice([-1.0, 1.0], 130)
    scores = make_scorer(guard, backend).score((signs * size).astype(np.float32))
    np.testing.assert_array_equal(scores, np.full(4, -np.inf, np.float32))
    assert decision(guard, scores) is Decision.INVALID


@kinds
def test_equal_maxima_are_a_tie_and_not_accepted(rng: np.random.Generator, backend: str, kind: Kind) -> None:
    guard = random_guard(rng, kind, 3, 2, 31)
    row = guard.target_row
    twin = (row + 1) % 3
    means, log_weights, whitener = guard.means.copy(), guard.log_weights.copy(), guard.whitener.copy()
    ours, theirs = slice(2 * row, 2 * row + 2), slice(2 * twin, 2 * twin + 2)
    means[theirs], log_weights[theirs] = means[ours], log_weights[ours]
    if kind != "shared":
        whitener[theirs] = whitener[ours]
    guard = replace(guard, means=means, log_weights=log_weights, whitener=whitener)
    frame = np.ascontiguousarray(means[2 * row] * guard.scale + guard.mean)
    verdict = decide(guard.target, make_scorer(guard, backend).score(frame), guard.classes, row)
    assert (verdict.decision, verdict.margin, verdict.source) == (Decision.TRIGGER, 0.0, guard.classes[twin])


@kinds
def test_equal_components_score_as_one(rng: np.random.Generator, backend: str, kind: Kind) -> None:
    single = random_guard(rng, kind, 2, 1, 33)
    weights = np.log(np.tile([0.5, 0.3, 0.2], 2)).astype(np.float32)
    triple = replace(
        single,
        offsets=np.array([0, 3, 6], np.int32),
        means=np.repeat(single.means, 3, axis=0),
        log_weights=weights,
        whitener=single.whitener if kind == "shared" else np.repeat(single.whitener, 3, axis=0),
    )
    frames = random_features(rng, single, 5)
    expected = make_scorer(replace(single, log_weights=np.zeros(2, np.float32)), backend).score_batch(frames)
    np.testing.assert_allclose(make_scorer(triple, backend).score_batch(frames), expected, rtol=1e-5)


@kinds
def test_component_far_below_the_others_changes_nothing(rng: np.random.Generator, backend: str, kind: Kind) -> None:
    """Its exponential underflows, or its log-likelihood overflows to -inf: neither may become NaN."""
    guard = random_guard(rng, kind, 2, 2, 8)
    log_weights = np.log(np.full(4, 0.5)).astype(np.float32)
    means = guard.means.copy()
    means[[1, 2]] = [[1e4], [1e25]]
    if kind == "shared":  # one origin amid means of 1e25 leaves no digit to the others
        means[2] = -1e4
    guard = replace(guard, means=means, log_weights=log_weights)
    frame = np.ascontiguousarray(means[0] * guard.scale + guard.mean)
    scores = make_scorer(guard, backend).score(frame)
    assert np.isfinite(scores).all()


def test_dead_features_add_the_same_to_every_class(rng: np.random.Generator, backend: str) -> None:
    """A unit that never fires: mean 0, scale 1, component means 0, deviation the regularisation's."""
    alive = random_guard(rng, "diagonal", 3, 1, 20)
    pad = [(0, 0), (0, 12)]
    guard = replace(
        alive,
        mean=np.pad(alive.mean, (0, 12)),
        scale=np.pad(alive.scale, (0, 12), constant_values=1),
        means=np.pad(alive.means, pad),
        whitener=np.pad(alive.whitener, pad, constant_values=1000),
    )
    frames = random_features(rng, alive, 6)
    expected = make_scorer(alive, backend).score_batch(frames) + 12 * (np.log(1000) - 0.5 * np.log(2 * np.pi))
    scores = make_scorer(guard, backend).score_batch(np.pad(frames, pad))
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-3)


WRONG_FEATURES = {
    "list": ([1.0] * 4, r"features: expected a float32 NumPy array of shape \(4,\), got list"),
    "dtype": (np.zeros(4), r"features: expected dtype float32, got float64; pass features.astype\(numpy.float32\)"),
    "byte order": (np.zeros(4, ">f4"), "features: expected dtype float32, got >f4"),
    "length": (np.zeros(5, np.float32), r"features: expected shape \(4,\), got \(5,\)"),
    "axes": (np.zeros((1, 4), np.float32), r"features: expected shape \(4,\), got \(1, 4\)"),
    "layout": (np.zeros(8, np.float32)[::2], r"features: expected a C-contiguous aligned array, got strides \(8,\)"),
    "alignment": (np.zeros(17, np.uint8)[1:].view(np.float32), "features: expected a C-contiguous aligned array"),
}


@pytest.mark.parametrize("case", WRONG_FEATURES)
def test_features_that_do_not_fit_are_refused(rng: np.random.Generator, backend: str, case: str) -> None:
    scorer = make_scorer(random_guard(rng, "diagonal", 3, 1, 4), backend)
    features, message = WRONG_FEATURES[case]
    out = np.full(3, 7, np.float32)
    with pytest.raises(ScoreError, match=message):
        scorer.score_into(features, out)  # type: ignore[arg-type]
    assert (out == 7).all()
    with pytest.raises(ScoreError, match=message):
        scorer.score(features)  # type: ignore[arg-type]


WRONG_OUT = {
    "list": ([0.0] * 3, r"out: expected a float32 NumPy array of shape \(3,\), got list"),
    "dtype": (np.zeros(3, np.int32), "out: expected dtype float32, got int32"),
    "length": (np.zeros(2, np.float32), r"out: expected shape \(3,\), got \(2,\)"),
    "layout": (np.zeros(6, np.float32)[::2], "out: expected a C-contiguous aligned array"),
    "read-only": (np.frombuffer(bytes(12), np.float32), "out: expected a writeable array, got a read-only one"),
}


@pytest.mark.parametrize("case", WRONG_OUT)
def test_out_that_does_not_fit_is_refused(rng: np.random.Generator, backend: str, case: str) -> None:
    scorer = make_scorer(random_guard(rng, "diagonal", 3, 1, 4), backend)
    out, message = WRONG_OUT[case]
    with pytest.raises(ScoreError, match=message):
        scorer.score_into(np.zeros(4, np.float32), out)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.zeros(4, np.float32), r"features: expected shape \(N, 4\), got \(4,\)"),
        (np.zeros((2, 5), np.float32), r"features: expected shape \(N, 4\), got \(2, 5\)"),
        (np.zeros((2, 4)), "features: expected dtype float32, got float64"),
        (np.zeros((4, 2), np.float32).T, r"features: expected a C-contiguous aligned array, got strides \(4, 8\)"),
        (None, r"features: expected a float32 NumPy array of shape \(N, 4\), got NoneType"),
    ],
)
def test_batch_that_does_not_fit_is_refused(
    rng: np.random.Generator, backend: str, features: object, message: str
) -> None:
    scorer = make_scorer(random_guard(rng, "diagonal", 3, 1, 4), backend)
    with pytest.raises(ScoreError, match=message):
        scorer.score_batch(features)  # type: ignore[arg-type]


@kinds
def test_threads_share_one_scorer(rng: np.random.Generator, backend: str, kind: Kind) -> None:
    n_rows, n_components, n_features = (6, 2, 65) if backend != "triton" else (2, 1, 33)
    guard = random_guard(rng, kind, n_rows, n_components, n_features)
    scorer = make_scorer(guard, backend)
    features = random_features(rng, guard, {"reference": 24, "cuda": 4, "triton": 2}.get(backend, 160))
    expected = np.array([scorer.score(frame) for frame in features])

    def score_all(start: int) -> bool:
        out = np.empty(n_rows, np.float32)
        same = True
        for index in np.roll(np.arange(len(features)), start):
            scorer.score_into(features[index], out)
            same &= bool((out == expected[index]).all())
        return same

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(score_all, range(0, 80, 10 if backend not in INTERPRETED else 20)))


def test_cpu_releases_the_interpreter_while_scoring(rng: np.random.Generator) -> None:
    guard = random_guard(rng, "full", 2, 1, 512)
    scorer = Scorer(guard, backend="cpu")
    features = random_features(rng, guard, 3000)
    interval: list[float] = []

    def score() -> None:
        interval.append(time.perf_counter())
        scorer.score_batch(features)
        interval.append(time.perf_counter())

    worker = threading.Thread(target=score)
    samples = []
    worker.start()
    while worker.is_alive():
        samples.append(time.perf_counter())
    start, stop = interval
    quarter = (stop - start) / 4
    assert any(start + quarter < sample < stop - quarter for sample in samples)


@kinds
def test_cpu_allocates_no_python_memory_per_frame(rng: np.random.Generator, kind: Kind) -> None:
    guard = random_guard(rng, kind, 2, 1, 300)
    scorer = Scorer(guard, backend="cpu")
    frame, out = random_features(rng, guard, 1)[0], np.empty(2, np.float32)
    repeats = [None] * 100
    tracemalloc.start()
    try:
        scorer.score_into(frame, out)
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        for _ in repeats:
            scorer.score_into(frame, out)
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # 256 bytes for the interpreter's own frames and integers; one feature vector would be 1200.
    assert after - before < 256
    assert peak - before < 256
