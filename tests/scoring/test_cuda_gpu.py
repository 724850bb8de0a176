"""The CUDA scorer on a GPU: parity, graphs, timing.  It has not been run on a device yet."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
from guards import random_features, random_guard

from inflight_edge.errors import DependencyError
from inflight_edge.guard import KINDS, Kind
from inflight_edge.scoring import Scorer
from inflight_edge.scoring.cuda import CudaScorer, cuda_backend
from inflight_edge.scoring.device import Memory
from inflight_edge.scoring.reference import log_likelihoods, term_magnitudes

pytestmark = pytest.mark.gpu
TOLERANCE = 1e-5
SIZES = [1, 31, 32, 33, 129, 1280]
memories = pytest.mark.parametrize("memory", ["mapped", "copied"])


@pytest.fixture(scope="module", autouse=True)
def gpu() -> None:
    """Skips with the reason where pycuda, the binding or the GPU is missing."""
    guard = random_guard(np.random.default_rng(0), "diagonal", 2, 1, 2)
    try:
        cuda_backend(guard).close()
    except DependencyError as error:
        pytest.skip(str(error))


def check_parity(
    rng: np.random.Generator, kind: Kind, n_features: int, counts: list[int], memory: Memory, n_frames: int = 5
) -> None:
    guard = random_guard(rng, kind, len(counts), counts, n_features)
    frames = random_features(rng, guard, n_frames)
    frames[1:] *= np.float32(30.0)
    out = np.empty((n_frames, len(counts)), np.float32)
    backend = cuda_backend(guard, memory=memory)
    assert backend.score_batch_into(frames, out)
    backend.close()
    allowed = TOLERANCE * term_magnitudes(guard, frames)
    assert (np.abs(out - log_likelihoods(guard, frames)) <= allowed).all()


@memories
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_features", SIZES)
def test_feature_sizes(rng: np.random.Generator, kind: Kind, n_features: int, memory: Memory) -> None:
    check_parity(rng, kind, n_features, [1, 2, 1], memory)


@memories
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_components", SIZES)
def test_component_counts(rng: np.random.Generator, kind: Kind, n_components: int, memory: Memory) -> None:
    check_parity(rng, kind, 33, [n_components, 1, 3], memory)


@pytest.mark.parametrize(("kind", "n_features"), [("diagonal", 16384), ("shared", 4096), ("full", 2048)])
def test_large_guards(rng: np.random.Generator, kind: Kind, n_features: int) -> None:
    check_parity(rng, kind, n_features, [2] * 10, "copied", n_frames=2)


def test_races_between_blocks_over_many_launches(rng: np.random.Generator) -> None:
    """The block that finishes last makes the verdict: the same bits every time, with many groups and frames."""
    guard = random_guard(rng, "full", 64, 1, 40)
    frames = random_features(rng, guard, 64)
    with CudaScorer([guard], 200, max_frames=64) as scorer:
        features = scorer.device.buffer(frames.shape, np.float32)
        features.host[...] = frames
        features.to_device()
        seen = set()
        for _ in range(2000):
            scorer.enqueue(features.address, None, 64)
            verdicts, scores = scorer.results()
            seen.add((verdicts.tobytes(), scores.tobytes()))
        assert len(seen) == 1
        assert {scorer.verdict(i).decision.value for i in range(64)} <= {"accept", "trigger"}


@memories
def test_graph_gives_the_same_verdicts(rng: np.random.Generator, memory: Memory) -> None:
    guard = random_guard(rng, "diagonal", 10, 2, 512)
    frames = random_features(rng, guard, 20)
    reference = Scorer(guard, backend="cpu")
    with CudaScorer([guard], 200, memory=memory) as scorer:
        features = scorer.device.buffer((1, 512), np.float32)

        def enqueue() -> None:
            features.to_device()
            scorer.enqueue(features.address, None, 1)

        enqueue()
        scorer.results()
        graph = scorer.capture(enqueue)
        for frame in frames:
            features.host[0] = frame
            graph.launch()
            scores = scorer.results()[1][0]
            np.testing.assert_allclose(scores, reference.score(frame), rtol=1e-5)
        graph.close()


@pytest.mark.parametrize("kind", KINDS)
def test_timing_with_events(rng: np.random.Generator, kind: Kind, record_property: pytest.RecordProperty) -> None:
    """Microseconds per launch on the device, D = 512, C = 10: reported, bounded only against gross faults."""
    driver = importlib.import_module("pycuda.driver")
    guard = random_guard(rng, kind, 10, 1, 512)
    with CudaScorer([guard], 10, memory="copied") as scorer:
        features = scorer.device.buffer((1, 512), np.float32)
        features.host[...] = random_features(rng, guard, 1)
        features.to_device()
        with scorer.device.current():
            start, stop = driver.Event(), driver.Event()
            for _ in range(2):  # the first one warms up
                start.record(scorer.device.pycuda_stream)
                for _ in range(1000):
                    scorer.enqueue(features.address, None, 1)
                stop.record(scorer.device.pycuda_stream)
                stop.synchronize()
                microseconds = start.time_till(stop)
        record_property("microseconds_per_launch", microseconds)
        print(f"{kind}: {microseconds:.2f} us a launch with its copies")
        assert microseconds < 1000.0
