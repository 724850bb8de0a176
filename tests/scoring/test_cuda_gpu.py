"""The CUDA scorer and preprocessing on a GPU: parity, graphs, timing.  It has not been run on a device yet."""

from __future__ import annotations

import importlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from guards import random_features, random_guard

from inflight_edge import Preprocess
from inflight_edge.colour import COLOURS, Colour
from inflight_edge.errors import DependencyError
from inflight_edge.guard import KINDS, Kind
from inflight_edge.preprocess_cuda import CudaPreprocess
from inflight_edge.scoring.cuda import CudaScorer, cuda_backend
from inflight_edge.scoring.device import Device, Memory
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
    driver = importlib.import_module("pycuda.driver")
    most = driver.Device(0).get_attribute(driver.device_attribute.MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)
    needed = 4 * n_features * (3 if kind == "full" else 2) + 2048
    if needed > most:
        pytest.skip(f"this GPU gives a block {most} bytes of shared memory; {n_features} features need {needed}")
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
    with CudaScorer([guard], 200, memory=memory) as scorer:
        features = scorer.device.buffer((1, 512), np.float32)

        def enqueue() -> None:
            features.to_device()
            scorer.enqueue(features.address, None, 1)

        enqueue()
        scorer.results()
        graph = scorer.capture(enqueue)
        allowed = TOLERANCE * term_magnitudes(guard, frames)
        for frame, bound, expected in zip(frames, allowed, log_likelihoods(guard, frames), strict=True):
            features.host[0] = frame
            graph.launch()
            assert (np.abs(scorer.results()[1][0] - expected) <= bound).all()
        graph.close()


@pytest.mark.parametrize("memory", ["mapped", "copied"])
@pytest.mark.parametrize("colour", COLOURS)
def test_frame_to_verdict_in_one_graph(rng: np.random.Generator, colour: Colour, memory: Memory) -> None:
    """Preprocessing, then the score kernel on its tensor: the tensor's parity, and the scores'."""
    preprocess = Preprocess((3, 17, 23), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    guard = random_guard(rng, "diagonal", 4, 2, 3 * 17 * 23)
    shape = (90, 80) if colour.startswith("nv12") else (60, 80, 3)
    with CudaScorer([guard], 200, memory=memory) as scorer:
        frame, tensor = scorer.device.buffer(shape, np.uint8), scorer.device.buffer((3, 17, 23), np.float32)
        prepare = CudaPreprocess(preprocess, shape, colour, device=scorer.device)

        def enqueue() -> None:
            frame.to_device()
            prepare.enqueue(frame.address, tensor.address)
            scorer.enqueue(tensor.address, None, 1)
            tensor.to_host()

        enqueue()
        scorer.results()
        graph = scorer.capture(enqueue)
        for _ in range(5):
            frame.host[...] = rng.integers(0, 256, shape, dtype=np.uint8)
            graph.launch()
            scores = scorer.results()[1][0]
            expected = preprocess.normalise(preprocess.pixels(frame.host, colour))
            np.testing.assert_allclose(tensor.host, expected, rtol=0, atol=1e-5)
            features = tensor.host.reshape(1, -1)
            allowed = TOLERANCE * term_magnitudes(guard, features)[0]
            assert (np.abs(scores - log_likelihoods(guard, features)[0]) <= allowed).all()
        graph.close()


def test_two_scorers_of_different_size_in_two_threads(rng: np.random.Generator) -> None:
    """Both need more than 48 KiB of shared memory, whose limit belongs to the kernel and not to a launch."""
    guards = [random_guard(rng, "diagonal", 2, 1, n_features) for n_features in (6500, 9000)]
    backends = [cuda_backend(guard, max_frames=1) for guard in guards]
    frames = [random_features(rng, guard, 1) for guard in guards]

    def score(index: int) -> np.ndarray:
        out = np.empty((1, 2), np.float32)
        for _ in range(500):
            assert backends[index].score_batch_into(frames[index], out)
        return out

    with ThreadPoolExecutor(2) as pool:
        for guard, frame, out in zip(guards, frames, pool.map(score, range(2)), strict=True):
            allowed = TOLERANCE * term_magnitudes(guard, frame)
            assert (np.abs(out - log_likelihoods(guard, frame)) <= allowed).all()
    for backend in backends:
        backend.close()


def test_preprocessing_timing_with_events(rng: np.random.Generator, record_property: pytest.RecordProperty) -> None:
    """Microseconds a frame on the device, 1080p NV12 to 224 x 224: reported, bounded only against gross faults."""
    driver = importlib.import_module("pycuda.driver")
    device = Device(memory="copied")
    frame, tensor = device.buffer((1620, 1920), np.uint8), device.buffer((3, 224, 224), np.float32)
    frame.host[...] = rng.integers(0, 256, (1620, 1920), dtype=np.uint8)
    frame.to_device()
    prepare = CudaPreprocess(Preprocess((3, 224, 224)), (1620, 1920), "nv12-bt709", device=device)
    with device.current():
        start, stop = driver.Event(), driver.Event()
        for _ in range(2):  # the first one warms up
            start.record(device.pycuda_stream)
            for _ in range(1000):
                prepare.enqueue(frame.address, tensor.address)
            stop.record(device.pycuda_stream)
            stop.synchronize()
            microseconds = start.time_till(stop)
    record_property("microseconds_per_frame", microseconds)
    print(f"preprocessing: {microseconds:.2f} us a frame")
    assert microseconds < 1000.0
    device.close()


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
