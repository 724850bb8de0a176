"""The CUDA scorer without a GPU: run on the CPU against the float64 definition, and under sanitisers."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cuda_cases import (
    CSRC,
    HOST,
    WARNINGS,
    Case,
    barriers,
    compile_checked,
    compile_fibers,
    compile_threads,
    run_host,
    run_raw,
)
from guards import random_features, random_guard

from inflight_edge.guard import KINDS, MAX_FEATURES, FloatArray, Guard, Kind
from inflight_edge.scoring.cuda import GUARD, OUT, PARAMS, VERDICT, as_verdict
from inflight_edge.scoring.reference import log_likelihoods, term_magnitudes
from inflight_edge.verdict import Decision, Verdict, decide

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to run the CUDA scorer on the CPU")
kinds = pytest.mark.parametrize("kind", KINDS)
# As for the other scorers; see test_scorer_accuracy.py.
TOLERANCE = 1e-5
SIZES = [1, 31, 32, 33, 129, 1280]


@pytest.fixture(scope="module")
def fibers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_fibers(tmp_path_factory.mktemp("fibers"))


@pytest.fixture(scope="module")
def threads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = compile_threads(tmp_path_factory.mktemp("threads"))
    if program is None:
        pytest.skip("ThreadSanitizer is missing or cannot run here")
    return program


def frames_of_all_kinds(rng: np.random.Generator, guard: Guard) -> FloatArray:
    """An inlier, the standardiser's mean, an outlier of 100 and one of 1e6 deviations: (4, D) float32."""
    z = rng.standard_normal((2, guard.n_features)) * [[1e2], [1e6]]
    outliers = (z * guard.scale + guard.mean).astype(np.float32)
    return np.concatenate([random_features(rng, guard, 1), guard.mean[None], outliers])


def expected_verdict(case: Case, index: int) -> Verdict:
    """What the detector's rule says, from float64 log-likelihoods."""
    predicted = case.guards[0].target
    if case.logits is not None:
        if not np.isfinite(case.logits[index]).all():
            return Verdict(Decision.INVALID)
        predicted = int(np.argmax(case.logits[index]))
    if not np.isfinite(case.features[index]).all():
        return Verdict(Decision.INVALID, predicted)
    guard = next((guard for guard in case.guards if guard.target == predicted), None)
    if guard is None:
        return Verdict(Decision.UNGUARDED, predicted)
    scores = log_likelihoods(guard, case.features[index : index + 1])[0]
    return decide(predicted, scores, guard.classes, guard.target_row)  # type: ignore[arg-type]


def assert_accurate(case: Case, verdicts: np.ndarray, scores: FloatArray) -> None:
    """Log-likelihoods within TOLERANCE of the terms added; the same verdict wherever the margin is clear of that."""
    for index, (record, row) in enumerate(zip(verdicts, scores, strict=True)):
        want = expected_verdict(case, index)
        got = as_verdict(record, row, case.guards)
        assert got.predicted == want.predicted
        guard = next((guard for guard in case.guards if guard.target == want.predicted), None)
        n_rows = 0 if guard is None or not np.isfinite(case.features[index]).all() else len(guard.classes)
        assert np.isnan(row[n_rows:]).all()
        if n_rows == 0:
            assert (got.decision, got.source) == (want.decision, None)
            assert np.isnan(got.margin)
            continue
        assert guard is not None
        frame = case.features[index : index + 1]
        bound, truth = TOLERANCE * term_magnitudes(guard, frame)[0], log_likelihoods(guard, frame)[0]
        overflow = truth < np.finfo(np.float32).min
        assert (row[:n_rows][overflow] == -np.inf).all()
        worst = np.max(np.abs(row[:n_rows] - truth) / bound, where=~overflow, initial=0.0)
        assert worst <= 1.0, f"frame {index}: error is {worst:.3g} of what is allowed"
        rule = decide(guard.target, row[:n_rows], guard.classes, guard.target_row)
        assert (got.decision, got.source) == (rule.decision, rule.source)
        np.testing.assert_allclose(got.margin, rule.margin, rtol=1e-6)
        if not overflow.any() and abs(want.margin) > 2 * bound.max():
            assert got.decision is want.decision


def check(program: Path, cases: list[Case]) -> None:
    for case, (verdicts, scores) in zip(cases, run_host(program, cases), strict=True):
        assert_accurate(case, verdicts, scores)


@kinds
def test_feature_sizes(rng: np.random.Generator, fibers: Path, kind: Kind) -> None:
    guards = [random_guard(rng, kind, 3, [1, 2, 1], n_features) for n_features in SIZES]
    n_frames = [1 if guard.n_features > 1000 else 4 for guard in guards]
    check(fibers, [Case([g], frames_of_all_kinds(rng, g)[:n]) for g, n in zip(guards, n_frames, strict=True)])


@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_narrow_components_far_from_the_mean_keep_their_digits(
    rng: np.random.Generator, fibers: Path, kind: Kind
) -> None:
    """Deviations of a thousandth of z: a z of 24 bits alone would leave three of seven digits."""
    guard = random_guard(rng, kind, 3, [1, 2, 1], 65)
    guard = replace(guard, means=guard.means * np.float32(20), whitener=guard.whitener * np.float32(1000))
    z = guard.means[:2] + rng.standard_normal((2, 65)) / 1000
    check(fibers, [Case([guard], (z * guard.scale + guard.mean).astype(np.float32))])


@kinds
def test_component_counts(rng: np.random.Generator, fibers: Path, kind: Kind) -> None:
    """256 components make a chunk: one row longer than it, rows that fill it exactly, and rows that just do not fit."""
    counts = [[size, 1] for size in SIZES] + [[200, 57, 199, 57, 1], [256, 256], [1, 512, 255, 1], [1] * 300]
    guards = [random_guard(rng, kind, len(count), count, 3) for count in counts]
    check(fibers, [Case([guard], frames_of_all_kinds(rng, guard)[: 1 if kind == "full" else 2]) for guard in guards])


@kinds
def test_groups_of_rows_give_the_same_bits(rng: np.random.Generator, fibers: Path, kind: Kind) -> None:
    guard = random_guard(rng, kind, 7, [1, 40, 2, 1, 300, 2, 1], 5 if kind == "full" else 33)
    features = random_features(rng, guard, 2)
    cases = [Case([guard], features, groups=groups) for groups in (1, 2, 3, 7, 9)]
    results = run_host(fibers, cases)
    assert_accurate(cases[0], *results[0])
    for verdicts, scores in results[1:]:
        assert verdicts.tobytes() == results[0][0].tobytes()
        assert scores.tobytes() == results[0][1].tobytes()


def test_largest_feature_vector(rng: np.random.Generator, fibers: Path) -> None:
    """Equal terms: the same rounding 16384 times over is the worst case of a float sum."""
    guard = random_guard(rng, "diagonal", 2, 1, MAX_FEATURES)
    guard = replace(guard, means=np.zeros_like(guard.means), whitener=np.full_like(guard.whitener, 1.1))
    equal = guard.mean + guard.scale * np.float32(0.3)
    check(fibers, [Case([guard], np.stack([equal, random_features(rng, guard, 1)[0]]))])


@kinds
def test_empty_batch(rng: np.random.Generator, fibers: Path, kind: Kind) -> None:
    guard = random_guard(rng, kind, 2, 1, 4)
    ((verdicts, scores),) = run_host(fibers, [Case([guard], np.empty((0, 4), np.float32))])
    assert (len(verdicts), scores.shape) == (0, (0, 2))


def test_guard_of_the_predicted_class_judges(rng: np.random.Generator, fibers: Path) -> None:
    """Three guards of three kinds in one launch; equal and non-finite logits; classes without a guard."""
    guards = [random_guard(rng, kind, n, 2, 40) for kind, n in zip(KINDS, (3, 5, 4), strict=True)]
    guards = [replace(guard, target=int(guard.classes[i])) for i, guard in enumerate(guards)]
    assert len({guard.target for guard in guards}) == 3
    frames = np.concatenate([random_features(rng, guard, 14) for guard in guards])
    logits = rng.normal(size=(42, 300)).astype(np.float32)
    logits[np.arange(42), np.repeat([guard.target for guard in guards], 14)] = 20.0
    logits[0] = 0.0
    logits[1, [7, 290]] = 30.0
    logits[2, 299] = np.nan
    logits[3, 0] = -np.inf
    logits[4, 256] = np.inf
    logits[5, 299] = 40.0
    frames[5, 3] = np.nan
    frames[6, 39] = np.inf
    frames[7] = 3e38
    case = Case(guards, frames, logits)
    ((verdicts, scores),) = run_host(fibers, [case])
    assert_accurate(case, verdicts, scores)
    invalid, unguarded = 0, 3
    assert verdicts["decision"][1] == unguarded
    assert (verdicts["decision"][2:8] == invalid).all()
    assert verdicts["predicted"][[1, 2, 3, 4, 5]].tolist() == [7, -1, -1, -1, 299]
    np.testing.assert_array_equal(scores[7, : len(guards[0].classes)], -np.inf)
    assert {int(d) for d in verdicts["decision"]} >= {1, 2}


@kinds
@pytest.mark.parametrize("n_components", [2, 300])
def test_equal_maxima_are_a_tie_and_not_accepted(
    rng: np.random.Generator, fibers: Path, kind: Kind, n_components: int
) -> None:
    """Bit for bit: equal rows are summed in the same order wherever they lie and whichever warp has them."""
    n_features = 4 if kind == "full" else 31
    guard = random_guard(rng, kind, 4, n_components, n_features)
    row = guard.target_row
    twins = [r for r in range(4) if r != row]
    shape = (4, n_components, -1)
    means, log_weights = guard.means.reshape(shape).copy(), guard.log_weights.reshape(4, n_components).copy()
    means[twins], log_weights[twins] = means[row], log_weights[row]
    whitener = guard.whitener.copy()
    if kind != "shared":
        whitener.reshape(shape)[twins] = whitener.reshape(shape)[row]
    guard = replace(guard, means=means.reshape(-1, n_features), log_weights=log_weights.reshape(-1), whitener=whitener)
    features = random_features(rng, guard, 1)
    for groups in (0, 3):
        ((verdicts, scores),) = run_host(fibers, [Case([guard], features, groups=groups)])
        got = as_verdict(verdicts[0], scores[0], [guard])
        assert (got.decision, got.margin, got.source) == (Decision.TRIGGER, 0.0, guard.classes[twins[0]])


@kinds
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nonfinite_feature_anywhere_is_never_accepted(
    rng: np.random.Generator, fibers: Path, kind: Kind, value: float
) -> None:
    guard = random_guard(rng, kind, 3, [1, 2, 1], 37)
    frames = np.tile(random_features(rng, guard, 1), (38, 1))
    frames[np.arange(37), np.arange(37)] = value
    ((verdicts, scores),) = run_host(fibers, [Case([guard], frames)])
    assert np.isnan(scores[:37]).all()
    assert {as_verdict(verdicts[i], scores[i], [guard]).decision for i in range(37)} == {Decision.INVALID}
    assert np.isfinite(scores[37]).all()


@kinds
def test_far_component_changes_nothing_and_overflow_is_minus_infinity(
    rng: np.random.Generator, fibers: Path, kind: Kind
) -> None:
    guard = random_guard(rng, kind, 2, 2, 8)
    means = guard.means.copy()
    means[[1, 2]] = [[1e4], [-1e4 if kind == "shared" else 1e25]]
    guard = replace(guard, means=means, log_weights=np.log(np.full(4, 0.5)).astype(np.float32))
    frame = np.ascontiguousarray(means[0] * guard.scale + guard.mean)
    far = (rng.choice([-1.0, 1.0], 8) * 3e38).astype(np.float32)
    ((verdicts, scores),) = run_host(fibers, [Case([guard], np.stack([frame, far]))])
    assert np.isfinite(scores[0]).all()
    np.testing.assert_array_equal(scores[1], -np.inf)
    assert as_verdict(verdicts[1], scores[1], [guard]).decision is Decision.INVALID


def thread_cases(rng: np.random.Generator) -> list[Case]:
    """Small, and every barrier of the kernel matters to one of them: 64 components make a chunk here."""
    cases = []
    for kind in KINDS:
        guard = random_guard(rng, kind, 3, [2, 70, 1], 7 if kind == "full" else 37)
        logits = rng.normal(size=(2, 70)).astype(np.float32)
        logits[:, guard.target] = 9.0
        cases.append(Case([guard], random_features(rng, guard, 2), logits, groups=2))
    return cases


def test_no_data_race_between_the_threads_of_a_block(rng: np.random.Generator, threads: Path) -> None:
    check(threads, thread_cases(rng))


def test_every_barrier_is_needed_and_its_absence_is_reported(rng: np.random.Generator, threads: Path) -> None:
    places = barriers("score_cuda.cu", "reduce_cuda.h", "verdict_cuda.h")
    assert len(places) == 7
    unnoticed = []
    for place in places:
        done = run_raw(threads, thread_cases(rng), CUDA_HOST_SKIP=place, TSAN_OPTIONS="halt_on_error=1")
        if done.returncode == 0 or b"ThreadSanitizer: data race" not in done.stderr:
            unnoticed.append(place)
    assert unnoticed == []


def test_structs_are_the_same_in_c_and_python(tmp_path: Path) -> None:
    """Sizes and offsets: Python writes these structs and C reads them."""
    structs = {"ife_cuda_verdict": VERDICT, "ife_cuda_guard": GUARD, "ife_cuda_params": PARAMS, "ife_cuda_out": OUT}
    of_the_guard = re.compile(
        "kind|n_features|n_rows|n_components|offsets|mean|scale|origin|centres|whitener|constants"
    )
    checks = ""
    for name, dtype in structs.items():
        checks += f"static_assert(sizeof({name}) == {dtype.itemsize});\n"
        for field, (kind, offset, *_) in (dtype.fields or {}).items():
            member = f"guard.{field}" if name == "ife_cuda_guard" and of_the_guard.fullmatch(field) else field
            checks += f"static_assert(offsetof({name}, {member}) == {offset});\n"
            checks += f"static_assert(sizeof({name}::{member}) == {kind.itemsize});\n"
    source = tmp_path / "layout.cpp"
    source.write_text(f'#include "inflight_cuda.h"\n#include <cstddef>\n{checks}')
    compile_checked("g++", "-std=c++20", "-Wno-invalid-offsetof", f"-I{CSRC}", "-fsyntax-only", source)


def test_header_compiles_as_c(tmp_path: Path) -> None:
    source = tmp_path / "user.c"
    source.write_text('#include "inflight_cuda.h"\nint main(void) { return (int)IFE_CUDA_ACCEPT; }\n')
    compile_checked("gcc", "-std=c11", *WARNINGS, "-pedantic", f"-I{CSRC}", "-fsyntax-only", source)


def test_graph_capture_always_ends_and_frees(tmp_path: Path) -> None:
    """Against a double of the runtime that fails each call in turn and counts what is left."""
    sources = [CSRC / "graph_cuda.c", HOST / "graph_main.c"]
    flags = ["-std=c11", *WARNINGS, "-Wconversion", f"-I{HOST}", f"-I{CSRC}"]
    compile_checked("gcc", *flags, *sources, "-o", tmp_path / "graph")
    done = subprocess.run([tmp_path / "graph"], capture_output=True, text=True, timeout=20, check=False)
    assert (done.returncode, done.stdout) == (0, "")
