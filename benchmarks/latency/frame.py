"""The whole frame: the bare classifier, with the guard, and with other defences, on one engine in one loop."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.latency.cases import Case
from benchmarks.latency.report import Report
from inflight_edge.bench import STAGES, Stages
from inflight_edge.bundle import Bundle, SelfTest
from inflight_edge.calibration.demo import export_program
from inflight_edge.calibration.export import export_onnx
from inflight_edge.calibration.model import load_classifier
from inflight_edge.calibration.networks import make_network
from inflight_edge.detector import Detector
from inflight_edge.engines.onnxruntime import OnnxRuntimeEngine
from inflight_edge.guard import FloatArray, Guard
from inflight_edge.preprocess import Preprocess

__all__ = ["NETWORKS", "POOL", "QUICK", "Network", "make_detector", "run_frame"]

N_CLASSES = 10
POOL = 32
BLENDS = 100
_CLOCK = time.perf_counter_ns


@dataclass(frozen=True, slots=True)
class Network:
    """A classifier, and how many frames of it at most and for how long: of every defence, of STRIP, of the detector alone."""

    name: str
    image_shape: tuple[int, int, int]
    n_frames: int
    n_strip: int
    seconds: float
    strip_seconds: float
    n_alone: int = 10_000
    alone_seconds: float = 120.0


NETWORKS = (
    Network("lenet5", (1, 28, 28), 10_000, 500, 60.0, 10.0),
    Network("resnet18", (3, 32, 32), 1_000, 50, 90.0, 30.0),
)
QUICK = (Network("lenet5", (1, 28, 28), 20, 2, 5.0, 1.0, n_alone=20),)


def run_frame(report: Report, *, quick: bool) -> None:
    """Group ``frame``: kind ``network/defence/stage``; weights are random, which changes no time."""
    report.note(
        "frame: engine ONNX Runtime on the CPU, its own choice of threads, one frame a call (STRIP: one call of "
        f"{BLENDS}; B3D: one call of 2); every defence judges the same frame in turn, in one loop; every class is guarded"
    )
    for network in QUICK if quick else NETWORKS:
        _run_network(report, network)


def _run_network(report: Report, network: Network) -> None:
    rng = np.random.default_rng(0)
    channels, height, width = network.image_shape
    frames = rng.integers(0, 256, (POOL, height, width, channels), np.uint8)
    detector = make_detector(network, frames, rng)
    defences = _Defences(detector, frames, rng)
    stages = Stages.of(detector)
    runs: dict[str, Callable[[NDArray[np.uint8]], object]] = {
        "bare": defences.bare,
        "guard": lambda frame: stages(frame, defences.buffer),
        "nc_filter": defences.nc_filter,
        "b3d": defences.b3d,
    }
    _check_answers(detector, defences, stages, frames)
    for i in range(20):
        for run in runs.values():
            run(frames[i % POOL])
    alone = _alone(detector, network, frames, defences.buffer)
    stages = Stages.of(detector)
    parts: dict[str, list[int]] = {f"guard/{name}": [] for name in STAGES}
    parts |= {f"{name}/whole": [] for name in (*runs, "strip")}
    order = list(runs)
    deadline = time.monotonic() + network.seconds
    done = 0
    for done in range(1, network.n_frames + 1):
        frame = frames[done % POOL]
        order.append(order.pop(0))  # no defence always follows the same one
        for name in order:
            start = _CLOCK()
            runs[name](frame)
            parts[f"{name}/whole"].append(_CLOCK() - start)
        if time.monotonic() > deadline:
            break
    deadline = time.monotonic() + network.strip_seconds
    while len(parts["strip/whole"]) < network.n_strip and (time.monotonic() < deadline or not parts["strip/whole"]):
        start = _CLOCK()
        defences.strip(frames[len(parts["strip/whole"]) % POOL])
        parts["strip/whole"].append(_CLOCK() - start)
    case = Case("diagonal", classes=N_CLASSES, features=detector.bundle.n_features)
    for name, histogram in alone.histograms.items():
        report.add_frame_histogram(f"{network.name}/alone/{name}", case, histogram)
    for name, samples in parts.items():
        stage = name.removeprefix("guard/")
        if name.startswith("guard/") and stage != "whole":
            report.add_frame_histogram(f"{network.name}/{name}", case, stages.histograms[stage])
        else:
            report.add_frame(f"{network.name}/{name}", case, np.asarray(samples, np.int64))
    report.note(
        f"{network.name}: {alone.histograms['whole'].count} frames of the detector alone, {done} of each defence in turn, "
        f"STRIP {len(parts['strip/whole'])}; with n frames a percentile above "
        "100 - 100 / n is the largest one"
    )


def _alone(detector: Detector, network: Network, frames: NDArray[np.uint8], buffer: NDArray[np.uint8]) -> Stages:
    """The detector in a loop of its own, as a device runs it: nothing else uses the caches between two frames."""
    stages = Stages.of(detector)
    deadline = time.monotonic() + network.alone_seconds
    for i in range(network.n_alone):
        stages(frames[i % POOL], buffer)
        if time.monotonic() > deadline:
            break
    return stages


class _Defences:
    """The other ways to run a frame; each takes a uint8 frame and preprocesses it once."""

    def __init__(self, detector: Detector, frames: NDArray[np.uint8], rng: np.random.Generator) -> None:
        engine = detector.engine
        assert isinstance(engine, OnnxRuntimeEngine)
        self.buffer = np.empty_like(frames[0])
        self._preprocess, self._engine = detector.bundle.preprocess, engine
        self._session, self._input = engine._session, engine._signature.input_name
        shape = detector.bundle.preprocess.input_shape
        others = rng.integers(0, 256, (BLENDS, *shape[1:], shape[0]), np.uint8)
        self._clean = np.stack([self._preprocess(other) for other in others])
        self._mask = np.zeros(shape[1:], np.float32)
        self._mask[-3:, -3:] = 1.0
        self._pattern = np.ones(shape, np.float32)
        n_features = detector.bundle.n_features
        self._neurons = np.sort(rng.permutation(n_features)[: max(1, n_features // 100)])

    def _prepare(self, frame: NDArray[np.uint8]) -> FloatArray:
        np.copyto(self.buffer, frame)
        return self._preprocess(self.buffer)

    def bare(self, frame: NDArray[np.uint8]) -> int:
        """The classifier alone: logits only, their argmax."""
        (logits,) = self._session.run(["logits"], {self._input: self._prepare(frame)[None]})
        return int(np.argmax(logits[0]))

    def nc_filter(self, frame: NDArray[np.uint8]) -> tuple[int, float]:
        """Neural Cleanse's neuron filter: mean activation of 1 % of the features; high is suspicious."""
        logits, features = self._engine.run(self._prepare(frame)[None])
        return int(np.argmax(logits[0])), float(features[0, self._neurons].mean())

    def b3d(self, frame: NDArray[np.uint8]) -> tuple[int, float]:
        """Divergence between the posteriors of the frame and of the frame with the pattern; low is suspicious."""
        image = self._prepare(frame)
        stamped = (1.0 - self._mask) * image + self._mask * self._pattern
        posteriors = _log_softmax(self._engine.run(np.stack([image, stamped]))[0])
        divergence = float((np.exp(posteriors[0]) * (posteriors[0] - posteriors[1])).sum())
        return int(np.argmax(posteriors[0])), divergence

    def strip(self, frame: NDArray[np.uint8]) -> tuple[int, float]:
        """Mean entropy of the posteriors of 100 blends with clean images; low is suspicious.

        The classifier's answer is computed too.
        """
        image = self._prepare(frame)
        (logits,) = self._session.run(["logits"], {self._input: image[None]})
        (blended,) = self._session.run(["logits"], {self._input: 0.5 * image + 0.5 * self._clean})
        posteriors = _log_softmax(blended)
        return int(np.argmax(logits[0])), float(-(np.exp(posteriors) * posteriors).sum(axis=1).mean())


def _log_softmax(logits: FloatArray) -> FloatArray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: FloatArray = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def _check_answers(detector: Detector, defences: _Defences, stages: Stages, frames: NDArray[np.uint8]) -> None:
    """Every way gives the same prediction, the staged guard the detector's verdicts, and scores are finite."""
    for frame in frames[:8]:
        verdict = detector(frame)
        others = [defences.nc_filter(frame), defences.b3d(frame), defences.strip(frame)]
        predictions = {verdict.predicted, defences.bare(frame), *(predicted for predicted, _ in others)}
        if len(predictions) != 1 or not all(np.isfinite(score) for _, score in others):
            raise AssertionError(f"expected one prediction and finite scores, got {predictions}, {others}; not timed")
        if stages(frame, defences.buffer) != verdict or verdict.log_likelihoods.size != N_CLASSES:
            raise AssertionError(f"expected the detector's verdict {verdict} from a guard, got another; not timed")


def make_detector(
    network: Network, frames: NDArray[np.uint8], rng: np.random.Generator, *, threads: int | None = None
) -> Detector:
    """The network with random weights, and a guard of every class around the features of the frames."""
    torch.manual_seed(0)
    preprocess = Preprocess(network.image_shape)
    with tempfile.TemporaryDirectory() as folder:
        module = make_network(network.name, network.image_shape, N_CLASSES)
        path = export_program(module, network.image_shape, Path(folder) / "classifier.pt2")
        classifier = load_classifier(path, image_shape=network.image_shape)
    model = export_onnx(classifier)
    logits, features = OnnxRuntimeEngine(model).run(np.stack([preprocess(frame) for frame in frames]))
    mean, scale = features.mean(axis=0), features.std(axis=0) + np.float32(1e-3)
    means = rng.standard_normal((N_CLASSES, features.shape[1]), dtype=np.float32)
    guards = tuple(_guard(target, mean, scale, means) for target in range(N_CLASSES))
    bundle = _bundle(preprocess, classifier.feature_layer, guards, model, frames, logits, features)
    return Detector(bundle, threads=threads)


def _guard(target: int, mean: FloatArray, scale: FloatArray, means: FloatArray) -> Guard:
    return Guard(
        target=target,
        kind="diagonal",
        classes=np.arange(N_CLASSES, dtype=np.int32),
        offsets=np.arange(N_CLASSES + 1, dtype=np.int32),
        mean=mean.copy(),
        scale=scale.copy(),
        means=means.copy(),
        log_weights=np.zeros(N_CLASSES, np.float32),
        whitener=np.ones_like(means),
        clean_margins=np.empty(0, np.float32),
    )


def _bundle(preprocess: Preprocess, layer: str, guards: tuple[Guard, ...], model: bytes, *outputs: Any) -> Bundle:
    """A bundle without the verdicts of a self-test: it is not written or verified."""
    frames, logits, features = outputs
    test = SelfTest(
        frames=frames,
        logits=logits,
        features=features,
        log_likelihoods=tuple(np.zeros((len(frames), N_CLASSES), np.float32) for _ in guards),
        decisions=("unguarded",) * len(frames),
        sources=np.full(len(frames), -1, np.int32),
    )
    names = tuple(f"class {i}" for i in range(N_CLASSES))
    return Bundle(names, preprocess, layer, guards, model, test, {}, {})
