"""The scorer beside its peers, its roofline, and its scaling curves: answers compared first, then timed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.latency.cases import POOL, Case, make_features, make_guard
from benchmarks.latency.native import Driver
from benchmarks.latency.peers import PEERS, Score, missing
from benchmarks.latency.report import Report
from benchmarks.latency.timing import time_python
from inflight_edge.guard import KINDS, FloatArray
from inflight_edge.scoring import DECISIONS, VERDICT_DTYPE, Scorer
from inflight_edge.scoring.reference import log_likelihoods, term_magnitudes
from inflight_edge.verdict import decide

__all__ = ["run_scaling", "run_scorer"]

# Largest |answer - reference| in units of the sum of the magnitudes of the terms added.  Ours as documented; the
# peers sum in float32 with the square expanded.
TOLERANCE = 1e-5
PEER_TOLERANCE = 1e-3
_MAIN = [Case(kind) for kind in KINDS]
_MORE = [
    Case("diagonal", components=4), Case("diagonal", components=16), Case("diagonal", features=84),
    Case("diagonal", classes=1000), Case("shared", classes=1000),
]  # fmt: skip
_BATCHES = [Case(kind, batch=256) for kind in KINDS]


class Limits:
    """How long a measurement may take: ``quick`` is for tests, whose figures mean nothing."""

    def __init__(self, *, quick: bool) -> None:
        self.quick = quick
        self.native_calls = 200 if quick else 10_000
        self.python_calls = 50 if quick else 10_000
        self.seconds = 0.05 if quick else 1.5

    def calls(self, case: Case) -> int:
        """Native calls for a case: 10,000, fewer only where a batch takes milliseconds (4e10 operations in all)."""
        if case.batch == 1:
            return self.native_calls
        return int(max(200 if not self.quick else 20, min(self.native_calls, 4e10 / case.flops)))


def run_scorer(report: Report, driver: Driver | None, *, quick: bool) -> None:
    """Groups ``scorer`` (log-likelihoods), ``verdict`` (judge) and ``roofline``."""
    limits = Limits(quick=quick)
    if driver is not None:
        roofline(report, driver, limits)
    main = [Case(kind, features=64) for kind in KINDS] if quick else [*_MAIN, *_MORE, *_BATCHES]
    for case in main:
        peers = [name for name in PEERS if not (quick and name in ("torch_compile", "scipy", "skl2onnx"))]
        if case.classes > 100:
            report.skip(
                f"{case.identity}", "sklearn, scipy, skl2onnx, torch_compile: one object per class takes minutes"
            )
            peers = ["numpy", "torch"]
        elif case not in _MAIN and not quick:
            peers = [name for name in peers if name != "torch_compile"]
        _compare_and_time("scorer", report, driver, case, peers, limits)
        if case.batch == 1:
            _judge(report, driver, case, limits)


def run_scaling(report: Report, driver: Driver | None, *, quick: bool) -> None:
    """Group ``scaling``: one of classes, components, features and batch varies, the others stay at 10, 1, 512, 1."""
    limits = Limits(quick=quick)
    limits.seconds = 0.05 if quick else 0.3
    limits.native_calls = 100 if quick else 2000
    axes: dict[str, tuple[int, ...]] = {
        "classes": (2, 10, 32, 100, 316, 1000),
        "components": (1, 2, 4, 8, 16),
        "features": (16, 64, 128, 256, 512, 1024, 2048),
        "batch": (1, 4, 16, 64, 256),
    }
    done = set()
    for kind in KINDS:
        for axis, values in axes.items():
            for value in values[:2] if quick else values:
                case = Case(kind, **{axis: value})
                if case.bytes > 1 << 28 or case in done:
                    if case not in done:
                        report.skip(f"{case.identity}", f"{case.bytes >> 20} MiB of parameters")
                    continue
                done.add(case)
                _compare_and_time("scaling", report, driver, case, ["numpy"], limits)


def roofline(report: Report, driver: Driver, limits: Limits) -> None:
    """What one core reads per second at the working sets of the cases, and computes in registers at most.

    Records: backend ``capi``, kind ``read`` (bytes: the buffer) and ``multiply_add`` (flops: of one call); the other
    numbers are 0.
    """
    for size in sorted({case.working_set for case in [*_MAIN, *_MORE]}):
        n_bytes, samples = driver.time_read(size, n_calls=limits.native_calls)
        report.add_probe("read", samples, n_bytes=n_bytes, flops=0)
    operations, samples = driver.time_multiply_add(n_calls=limits.native_calls)
    report.add_probe("multiply_add", samples, n_bytes=0, flops=int(operations))


def _compare_and_time(
    group: str, report: Report, driver: Driver | None, case: Case, peers: list[str], limits: Limits
) -> None:
    guard = make_guard(case)
    features = make_features(case, guard, max(case.batch, POOL))
    checked = features[: max(1, min(16, (1 << 24) // guard.whitener.size))]
    expected, magnitudes = log_likelihoods(guard, checked), term_magnitudes(guard, checked)

    def check(backend: str, got: NDArray[np.floating], tolerance: float) -> None:
        error = float((np.abs(got - expected) / magnitudes).max())
        report.compared(backend, case, error, tolerance)

    if driver is not None:
        native = driver.scorer(guard)
        check("capi", native.scores(checked), TOLERANCE)
        check("capi", native.batch_scores(checked), TOLERANCE)
        report.add(group, "capi", case, native.time_score(case, features, n_calls=limits.calls(case)))
    scorer = Scorer(guard)
    check("python", scorer.score_batch(checked), TOLERANCE)
    report.add(group, "python", case, _time(_own_call(scorer, case, features), limits))
    for name in peers:
        library, make = PEERS[name]
        if missing(library):
            report.skip(name, f"{library} is not installed")
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peers warn about their own internals
            score = make(guard)
            check(name, score(checked), PEER_TOLERANCE)
            report.add(group, name, case, _time(_peer_call(score, case, features), limits))


def _judge(report: Report, driver: Driver | None, case: Case, limits: Limits) -> None:
    """The verdict: ife_judge from C, judge_into from Python; the same decision as the float64 reference."""
    guard = make_guard(case)
    features = make_features(case, guard, POOL)
    scores = log_likelihoods(guard, features)
    magnitudes = term_magnitudes(guard, features).max(axis=1)
    expected = [decide(guard.target, row, guard.classes, guard.target_row) for row in scores]

    def check(backend: str, got: np.ndarray) -> None:
        errors = np.abs(got["margin"] - [verdict.margin for verdict in expected]) / (2.0 * magnitudes)
        report.compared(f"{backend} verdict", case, float(errors.max()), TOLERANCE)
        for row, verdict, allowed in zip(got, expected, magnitudes, strict=True):
            close = abs(verdict.margin) <= 2.0 * TOLERANCE * allowed
            if not close and DECISIONS[row["decision"]] is not verdict.decision:
                raise AssertionError(f"{backend}: expected {verdict.decision.value}, got {row}; not timed")

    out = np.zeros(POOL, VERDICT_DTYPE)
    scorer = Scorer(guard, backend="cpu")
    for i in range(POOL):
        scorer.judge_into(features[i], out[i : i + 1])
    check("python", out)
    if (out["n_scored"] < out["n_rows"]).any():
        read = f"{int(np.median(out['n_scored']))} of {int(out['n_rows'][0])} rows"
        report.note(f"verdict {case.kind}, C={case.classes}: {read} read in full, random features around the means")
    if driver is not None:
        native = driver.scorer(guard)
        check("capi", native.verdicts(features))
        report.add("verdict", "capi", case, native.time_judge(features, n_calls=limits.native_calls))
    one, rows = np.zeros(1, VERDICT_DTYPE), list(features)
    report.add("verdict", "python", case, _time(lambda i: scorer.judge_into(rows[i % POOL], one), limits))


def _own_call(scorer: Scorer, case: Case, features: FloatArray) -> Callable[[int], object]:
    """Scorer.score_into on the next frame, or Scorer.score_batch."""
    if case.batch > 1:
        batch = features[: case.batch]
        return lambda i: scorer.score_batch(batch)
    rows, out = list(features), np.empty(scorer.n_rows, np.float32)
    return lambda i: scorer.score_into(rows[i % POOL], out)


def _peer_call(score: Score, case: Case, features: FloatArray) -> Callable[[int], object]:
    frames = [features[i : i + case.batch] for i in range(POOL if case.batch == 1 else 1)]
    score(frames[0])  # torch.compile compiles for this shape
    return lambda i: score(frames[i % len(frames)])


def _time(call: Callable[[int], object], limits: Limits) -> Any:
    return time_python(call, n_calls=limits.python_calls, seconds=limits.seconds)
