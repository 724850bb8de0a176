"""The CUDA scorer's Python side, through doubles of the driver and the binding: types, lifetimes, order, results."""

from __future__ import annotations

import ctypes
import gc
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from driver_double import Allocation, Binding, Driver, DriverError, compile_library
from guards import random_features, random_guard

from inflight_edge.errors import DependencyError, OptionError, ScoreError
from inflight_edge.guard import KINDS, Guard, Kind
from inflight_edge.scoring import DECISIONS, VERDICT_DTYPE, Scorer, available_backends
from inflight_edge.scoring.cuda import CudaScorer, cuda_backend
from inflight_edge.scoring.device import Memory
from inflight_edge.scoring.reference import log_likelihoods
from inflight_edge.verdict import Decision, decide

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to run the CUDA scorer on the CPU")


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return compile_library()


@pytest.fixture
def install(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Callable[[Driver], Binding]:
    """Puts a double driver, and a binding on it, in the place of the real ones."""

    def put(driver: Driver) -> Binding:
        binding = Binding(driver, library)
        monkeypatch.setitem(sys.modules, "pycuda", SimpleNamespace(driver=driver))
        monkeypatch.setitem(sys.modules, "pycuda.driver", driver)
        monkeypatch.setitem(sys.modules, "inflight_edge.scoring._cuda", binding)
        return binding

    return put


def two_guards(rng: np.random.Generator) -> list[Guard]:
    guards = [random_guard(rng, kind, n, 2, 12) for kind, n in (("shared", 3), ("diagonal", 20))]
    return [replace(guards[0], target=int(guards[0].classes[0])), replace(guards[1], target=int(guards[1].classes[-1]))]


@pytest.mark.parametrize("memory", ["mapped", "copied"])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_like_the_definition(
    rng: np.random.Generator, install: Callable[[Driver], Binding], kind: Kind, memory: Memory
) -> None:
    driver = Driver()
    binding = install(driver)
    guard = random_guard(rng, kind, 9, [1, 2, 3, 1, 2, 1, 1, 1, 2], 17)
    frames = random_features(rng, guard, 7)
    backend = cuda_backend(guard, max_frames=3, memory=memory)
    out = np.zeros((7, 9), np.float32)
    assert backend.score_batch_into(frames, out)
    np.testing.assert_allclose(out, log_likelihoods(guard, frames), rtol=1e-5)
    assert len(binding.launches) == 3
    one = np.zeros(9, np.float32)
    assert backend.score_into(frames[4], one)
    np.testing.assert_array_equal(one, out[4])
    assert backend.score_batch_into(frames[:0], out[:0])
    frames[2, 1] = np.nan
    assert backend.score_batch_into(frames, out)
    assert np.isnan(out[2]).all()
    assert np.isfinite(out[[0, 1, 3, 4, 5, 6]]).all()
    backend.close()


def test_scorer_backend_is_selectable(rng: np.random.Generator, install: Callable[[Driver], Binding]) -> None:
    install(Driver())
    assert available_backends() == ("cpu", "cuda", "triton", "reference")
    guard = random_guard(rng, "diagonal", 3, 1, 5)
    scorer = Scorer(guard, backend="cuda")
    frames = random_features(rng, guard, 2)
    np.testing.assert_allclose(scorer.score_batch(frames), log_likelihoods(guard, frames), rtol=1e-5)
    np.testing.assert_allclose(scorer.score(frames[0]), log_likelihoods(guard, frames)[0], rtol=1e-5)
    with pytest.raises(ScoreError, match=r"features: expected shape \(5,\), got \(4,\)"):
        scorer.score(np.zeros(4, np.float32))


def test_verdict_record_is_that_of_the_rule(rng: np.random.Generator, install: Callable[[Driver], Binding]) -> None:
    install(Driver())
    guard = random_guard(rng, "shared", 4, 2, 7)
    scorer = Scorer(guard, backend="cuda")
    frames = random_features(rng, guard, 20)
    frames[-1, 3] = np.nan
    seen = set()
    for frame in frames:
        out = np.zeros(1, VERDICT_DTYPE)
        scorer.judge_into(frame, out)
        expected = decide(guard.target, scorer.score(frame), guard.classes, guard.target_row)
        seen.add(expected.decision)
        assert DECISIONS[out["decision"][0]] is expected.decision
        assert out["source"][0] == (-1 if expected.source is None else expected.source)
        np.testing.assert_array_equal(out["margin"][0], expected.margin)
        assert (out["n_scored"][0], out["n_rows"][0]) == (4, 4)
    assert seen == set(DECISIONS)
    untouched = np.zeros(1, VERDICT_DTYPE)
    with pytest.raises(ScoreError, match=r"features: expected shape \(7,\), got \(6,\)"):
        scorer.judge_into(frames[0, :6].copy(), untouched)
    assert untouched == np.zeros(1, VERDICT_DTYPE)
    with pytest.raises(ScoreError, match="dtype VERDICT_DTYPE; pass numpy"):
        scorer.judge_into(frames[0], np.zeros(2, VERDICT_DTYPE))


@pytest.mark.parametrize("integrated", [True, False])
def test_memory_follows_the_device(
    rng: np.random.Generator, install: Callable[[Driver], Binding], integrated: bool
) -> None:
    install(Driver(integrated=integrated))
    with CudaScorer(two_guards(rng), 50) as scorer:
        assert scorer.device.memory == ("mapped" if integrated else "copied")


def test_graphs_of_different_sizes_give_verdicts_on_their_own_frames_alone(
    rng: np.random.Generator, install: Callable[[Driver], Binding]
) -> None:
    install(Driver())
    guards = two_guards(rng)
    with CudaScorer(guards, 50, max_frames=4) as scorer:
        features, logits = scorer.device.buffer((4, 12), np.float32), scorer.device.buffer((4, 50), np.float32)
        scorer.enqueue(features.address, logits.address, 1)
        large, small = (
            scorer.capture(lambda n=n: scorer.enqueue(features.address, logits.address, n))  # type: ignore[misc]
            for n in (4, 2)
        )
        for graph, n_frames in ((None, 1), (large, 4), (small, 2), (large, 4)):
            if graph is not None:
                graph.launch()
            scorer.results()
            scorer.verdict(n_frames - 1)
            with pytest.raises(ScoreError, match=f"expected 0 to {n_frames - 1}"):
                scorer.verdict(n_frames)
        large.close()
        small.close()


def test_capture_that_fails_leaves_the_last_batch_the_last(
    rng: np.random.Generator, install: Callable[[Driver], Binding]
) -> None:
    install(Driver())
    with CudaScorer(two_guards(rng), 50, max_frames=4) as scorer:
        features, logits = scorer.device.buffer((4, 12), np.float32), scorer.device.buffer((4, 50), np.float32)
        scorer.enqueue(features.address, logits.address, 1)

        def fails() -> None:
            scorer.enqueue(features.address, logits.address, 4)
            raise ScoreError("out of order")

        with pytest.raises(ScoreError, match="out of order"):
            scorer.capture(fails)
        scorer.results()
        scorer.verdict(0)
        with pytest.raises(ScoreError, match="expected 0 to 0"):
            scorer.verdict(1)


@pytest.mark.parametrize("memory", ["mapped", "copied"])
def test_verdicts_of_two_guards_and_their_graph(
    rng: np.random.Generator, install: Callable[[Driver], Binding], memory: Memory
) -> None:
    driver = Driver()
    binding = install(driver)
    guards = two_guards(rng)
    with CudaScorer(guards, 50, max_frames=4, memory=memory) as scorer:
        features, logits = scorer.device.buffer((4, 12), np.float32), scorer.device.buffer((4, 50), np.float32)
        unguarded = next(c for c in range(50) if c not in {guard.target for guard in guards})

        def fill(order: list[int]) -> None:
            features.host[...] = np.concatenate([random_features(rng, guards[g % 2], 1) for g in order])
            logits.host[...] = 0.0
            for row, g in enumerate(order):
                logits.host[row, unguarded if g == 2 else guards[g].target] = 1.0

        def enqueue() -> None:
            features.to_device()
            logits.to_device()
            scorer.enqueue(features.address, logits.address, 4)

        def check(order: list[int]) -> None:
            verdicts, scores = scorer.results()
            for row, g in enumerate(order):
                verdict = scorer.verdict(row)
                if g == 2:
                    assert (verdict.decision, verdict.predicted) == (Decision.UNGUARDED, unguarded)
                    assert np.isnan(scores[row]).all()
                    continue
                expected = log_likelihoods(guards[g], features.host[row : row + 1])[0]
                np.testing.assert_allclose(verdict.log_likelihoods, expected, rtol=1e-5)
                target = guards[g].target_row
                np.testing.assert_allclose(
                    verdict.margin, np.delete(expected, target).max() - expected[target], rtol=1e-4
                )
                assert verdict.predicted == guards[g].target
                assert verdict.passes == (verdict.margin < 0)
            assert len(verdicts) == 4

        fill([0, 1, 2, 0])
        enqueue()
        check([0, 1, 2, 0])
        before = len(binding.launches)
        graph = scorer.capture(enqueue)
        for order in ([1, 0, 0, 2], [2, 2, 1, 1]):
            fill(order)
            graph.launch()
            check(order)
        assert len(binding.launches) == before + 1
        assert binding.launches[0]["n_groups"] == 5
        graph.close()
        graph.close()
        assert binding.graphs == {}
        with pytest.raises(ZeroDivisionError):
            scorer.capture(lambda: 1 // 0)  # type: ignore[arg-type, return-value]
        enqueue()
        scorer.results()


def test_verdict_of_an_earlier_batch_is_not_one_of_this(
    rng: np.random.Generator, install: Callable[[Driver], Binding]
) -> None:
    install(Driver())
    guard = random_guard(rng, "diagonal", 3, 1, 5)
    with CudaScorer([guard], 3, max_frames=4, memory="copied") as scorer:
        features = scorer.device.buffer((4, 5), np.float32)
        features.host[...] = random_features(rng, guard, 4)
        features.to_device()
        for n_frames in (4, 2, 0):
            scorer.enqueue(features.address, None, n_frames)
            scorer.results()
            assert [scorer.verdict(index).decision for index in range(n_frames)].count(Decision.INVALID) == 0
            for index in (n_frames, -1):
                with pytest.raises(ScoreError, match=f"index: expected 0 to {n_frames - 1}, a frame of the last batch"):
                    scorer.verdict(index)


def test_device_closes_after_a_fault(rng: np.random.Generator, install: Callable[[Driver], Binding]) -> None:
    """A kernel's fault comes out of the next wait, also that of close(): the memory is given back all the same."""
    driver = Driver()
    install(driver)
    scorer = CudaScorer(two_guards(rng), 50, memory="copied")

    def fault() -> None:
        raise DriverError("cuStreamSynchronize failed: an illegal memory access was encountered")

    with scorer.device.current():
        scorer.device.pycuda_stream.put(fault)
    with pytest.raises(ScoreError, match="illegal memory access"):
        scorer.close()
    scorer.close()
    assert not any(isinstance(memory, Allocation) for memory in driver.live.values())
    assert driver.stack() == []


def test_nothing_of_the_device_stays_after_close(
    rng: np.random.Generator, install: Callable[[Driver], Binding]
) -> None:
    driver = Driver()
    install(driver)
    scorer = CudaScorer(two_guards(rng), 50, memory="copied")
    assert driver.retained == 1
    assert sum(isinstance(memory, Allocation) for memory in driver.live.values()) == 5
    scorer.close()
    scorer.close()
    assert list(driver.live.values()) == []
    assert driver.leaked == []
    assert driver.stack() == []
    with CudaScorer(two_guards(rng), 50, memory="copied"):
        assert driver.retained == 1  # one context for all scorers of a process
    with pytest.raises(ScoreError, match="device: expected an open one, got one that was closed; make another"):
        scorer.results()


@pytest.mark.parametrize("memory", ["mapped", "copied"])
def test_backend_that_another_thread_lets_go_of_leaves_nothing_behind(
    rng: np.random.Generator, install: Callable[[Driver], Binding], memory: Memory
) -> None:
    """As a reload does: made in one thread, replaced in another, where the context is not current."""
    driver = Driver()
    install(driver)
    guard = random_guard(rng, "full", 3, 1, 5)
    held = [cuda_backend(guard, memory=memory)]
    assert driver.live
    worker = threading.Thread(target=held.clear)
    worker.start()
    worker.join()
    gc.collect()
    assert list(driver.live.values()) == []
    assert driver.leaked == []


def test_results_that_somebody_holds_stay_after_close(
    rng: np.random.Generator, install: Callable[[Driver], Binding]
) -> None:
    install(Driver())
    guard = random_guard(rng, "shared", 3, 1, 5)
    scorer = CudaScorer([guard], 9)
    features = scorer.device.buffer((1, 5), np.float32)
    features.host[...] = random_features(rng, guard, 1)
    features.to_device()
    scorer.enqueue(features.address, None, 1)
    scores = scorer.results()[1]
    before = scores.copy()
    scorer.close()
    np.testing.assert_array_equal(scores, before)


def test_contexts_are_released_after_what_is_left_in_them(tmp_path: Path) -> None:
    """Also where something else, as torch does, has made the first finalizer of the process before."""
    script = (
        "import weakref\n"
        "class Other: pass\n"
        "first = Other()\n"
        "weakref.finalize(first, print, 'of another library')\n"
        "from inflight_edge.scoring import device\n"
        "class Context:\n"
        "    push = lambda self: None\n"
        "    detach = lambda self: print('context released')\n"
        "device._contexts[0, 0] = (None, Context())\n"
        "engine = Other()\n"
        "weakref.finalize(engine, print, 'engine closed')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["engine closed", "context released", "of another library"]
    assert done.stderr == ""


def test_any_thread_may_use_it(rng: np.random.Generator, install: Callable[[Driver], Binding]) -> None:
    """A context is current in one thread only; the double refuses calls from threads that did not push it."""
    install(Driver())
    guard = random_guard(rng, "diagonal", 3, 1, 5)
    frames = random_features(rng, guard, 8)
    scorer = Scorer(guard, backend="cuda")
    results: dict[int, np.ndarray] = {}

    def score(index: int) -> None:
        results[index] = scorer.score(frames[index])

    workers = [threading.Thread(target=score, args=(index,)) for index in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    np.testing.assert_allclose([results[i] for i in range(8)], log_likelihoods(guard, frames), rtol=1e-5)


def test_failures_of_the_driver_are_errors(rng: np.random.Generator, install: Callable[[Driver], Binding]) -> None:
    driver = Driver()
    binding = install(driver)
    guards = two_guards(rng)
    with CudaScorer(guards, 50) as scorer:
        binding.status = 1
        features = scorer.device.buffer((1, 12), np.float32)
        with pytest.raises(ScoreError, match="launch: expected success, got CUDA error 1: text of 1"):
            scorer.enqueue(features.address, None, 1)
        with pytest.raises(ScoreError, match="n_frames: expected 0 to 1, got 2; raise max_frames"):
            scorer.enqueue(features.address, None, 2)
        assert driver.stack() == []
    driver.memory_limit = 300
    with pytest.raises(ScoreError, match="driver: expected success, got: cuMemAlloc failed: out of memory"):
        CudaScorer(guards, 50)
    assert (list(driver.live.values()), driver.leaked) == ([], [])
    assert driver.stack() == []


def test_machine_without_a_gpu_says_what_is_missing(
    rng: np.random.Generator, install: Callable[[Driver], Binding], monkeypatch: pytest.MonkeyPatch
) -> None:
    guards = two_guards(rng)
    install(Driver(devices=0))
    with pytest.raises(DependencyError, match="device: expected an NVIDIA GPU with index 0, got: cuInit failed"):
        CudaScorer(guards, 50)
    install(Driver(devices=1))
    with pytest.raises(DependencyError, match="device: expected an NVIDIA GPU with index 1"):
        CudaScorer(guards, 50, index=1)
    monkeypatch.setitem(sys.modules, "pycuda.driver", None)
    with pytest.raises(DependencyError, match=r"pycuda.driver: needed here .* pip install pycuda \(needs nvcc\)"):
        CudaScorer(guards, 50)
    monkeypatch.setitem(sys.modules, "inflight_edge.scoring._cuda", None)
    with pytest.raises(DependencyError, match=r"_cuda: needed here .* install inflight-edge again where nvcc is"):
        CudaScorer(guards, 50)


def test_options_are_checked_first(rng: np.random.Generator) -> None:
    guard = random_guard(rng, "diagonal", 3, 1, 5)
    other = replace(random_guard(rng, "diagonal", 3, 1, 6))
    with pytest.raises(OptionError, match="guards: expected at least one, got none"):
        CudaScorer([], 3)
    with pytest.raises(OptionError, match=r"guards: expected one number of features, got \[5, 6\]"):
        CudaScorer([guard, other], 3)
    with pytest.raises(OptionError, match="guards: expected one guard per target, got targets"):
        CudaScorer([guard, guard], 3)
    with pytest.raises(OptionError, match="n_classes, max_frames: expected at least 1, got 3 and 0"):
        CudaScorer([guard], 3, max_frames=0)
    with pytest.raises(OptionError, match="memory: expected one of auto, mapped, copied, got 'managed'"):
        CudaScorer([guard], 3, memory="managed")  # type: ignore[arg-type]


def test_real_binding_reports_a_missing_gpu_as_a_status() -> None:
    binding = pytest.importorskip("inflight_edge.scoring._cuda", reason="the CUDA binding was not built (no nvcc)")
    assert binding.preprocess(0, 0, 0, 0) == 1
    assert binding.groups(0, 10, 10) == 2
    assert binding.groups(1, 10, 10) == 1
    assert binding.groups(2, 10, 30) == 10
    assert binding.error_text(1) == "invalid argument"
    assert binding.launch(0, 0, 0, 0, 1, 0) == 1
    assert binding.launch(0, 0, 0, 0, 0, 0) == 0
    assert binding.graph_launch(0, 0) == 1
    assert binding.graph_destroy(0) == 0
    graph, status, error = binding.graph_capture(lambda: None, 0)
    assert (graph, status, error) == (0, 1, None)
