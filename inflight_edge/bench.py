"""Latency of a bundle on this machine, per stage and whole, with the frames of its self-test."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inflight_edge.detector import Detector
from inflight_edge.environment import describe_environment
from inflight_edge.errors import BundleError, OptionError
from inflight_edge.latency import Histogram
from inflight_edge.verdict import Decision, Verdict

__all__ = ["STAGES", "WARM_UP", "Stages", "bench", "check_verdicts", "run_frames"]

# What lies inside each interval; they follow each other without gaps.
STAGES = {
    "capture": "the next stored frame is copied into a frame buffer; stands for a camera's hand-over",
    "preprocess": "uint8 frame to float32 input, resized and normalised",
    "engine": "input to logits and features, batch 1; to the verdict where the engine judges on the GPU",
    "scorer": "features to the Verdict object with log-likelihoods; only frames predicted as a guarded class",
    "verdict": "check of the logits, prediction, choice of the guard; of an unguarded frame the Verdict object too",
    "guard": "scorer and verdict of one frame together: what the defence adds; the scorer's frames",
    "whole": "capture to verdict",
}
WARM_UP = 50


@dataclass(frozen=True, slots=True)
class Stages:
    """Runs a detector's frames stage by stage, and keeps a histogram of each."""

    detector: Detector
    histograms: dict[str, Histogram]

    @classmethod
    def of(cls, detector: Detector) -> Stages:
        """Empty histograms for a detector."""
        return cls(detector, {name: Histogram() for name in STAGES})

    def __call__(self, frame: NDArray[np.uint8], buffer: NDArray[np.uint8]) -> Verdict:
        """Verdict on one frame, as Detector gives it; buffer: its shape, is overwritten.  Raises InflightError."""
        clock, detector, record = time.perf_counter_ns, self.detector, self.histograms
        start = clock()
        np.copyto(buffer, frame)
        captured = clock()
        batch = detector.bundle.preprocess(buffer)[None]
        prepared = clock()
        if detector.judge_inputs is not None:
            verdict = detector.as_asked(detector.judge_inputs(batch)[0])
            end = clock()
            record["capture"].record(captured - start)
            record["preprocess"].record(prepared - captured)
            record["engine"].record(end - prepared)
            record["whole"].record(end - start)
            return verdict
        logits, features = (outputs[0] for outputs in detector.engine.run(batch))
        inferred = clock()
        predicted = detector.predict(logits, len(detector.class_names))
        scorer = detector.guards.get(predicted)
        checked = clock()
        verdict = (
            detector.score(features, logits) if scorer is None else detector.judge_features(predicted, scorer, features)
        )
        end = clock()
        if scorer is not None:
            record["scorer"].record(end - checked)
            record["guard"].record(end - inferred)
        record["capture"].record(captured - start)
        record["preprocess"].record(prepared - captured)
        record["engine"].record(inferred - prepared)
        record["verdict"].record(checked - inferred if scorer is not None else end - inferred)
        record["whole"].record(end - start)
        return verdict


def bench(detector: Detector, n_frames: int) -> dict[str, Any]:
    """Latency of each stage over ``n_frames`` frames, after WARM_UP others, and what it was measured on.

    The self-test's frames in turn, one thread of this program, no batch.  The answers are checked first: raises
    BundleError when this machine gives other verdicts than the bundle expects.  Raises OptionError for n_frames < 1.

    Keys: environment, frames, guarded, warm_up, engine, scorer, inside (what each interval holds), stages (for each
    count and p50_ns, p99_ns, p999_ns, max_ns; a stage that never ran is left out).
    """
    if n_frames < 1:
        raise OptionError(f"frames: expected at least 1, got {n_frames}")
    frames = detector.bundle.self_test.frames
    buffer = np.empty_like(frames[0])
    check_verdicts(detector, [Stages.of(detector)(frame, buffer) for frame in frames])
    run_frames(Stages.of(detector), frames, buffer, WARM_UP)
    stages = Stages.of(detector)
    run_frames(stages, frames, buffer, n_frames)
    decisions = detector.bundle.self_test.decisions
    return {
        "environment": describe_environment(),
        "frames": n_frames,
        "guarded": sum(decisions[i % len(frames)] != Decision.UNGUARDED.value for i in range(n_frames)),
        "warm_up": WARM_UP,
        "engine": detector.engine.name,
        "scorer": _scorer(detector),
        "inside": STAGES,
        "stages": {name: asdict(h.summary()) for name, h in stages.histograms.items() if h.count},
    }


def _scorer(detector: Detector) -> str:
    """Backend and instruction set of what judges: behind TensorRT that may be the engine itself."""
    if detector.judge_inputs is not None:
        return "cuda, in the engine"
    return " ".join(sorted({f"{s.backend} {s.instruction_set}".strip() for s in detector.guards.values()}))


def run_frames(stages: Stages, frames: NDArray[np.uint8], buffer: NDArray[np.uint8], n_frames: int) -> None:
    """Run ``n_frames`` frames, going round in ``frames``."""
    for i in range(n_frames):
        stages(frames[i % len(frames)], buffer)


def check_verdicts(detector: Detector, verdicts: Sequence[Verdict]) -> None:
    """Compare verdicts with those that the bundle's self-test expects.  Raises BundleError."""
    test = detector.bundle.self_test
    for i, (verdict, decision, source) in enumerate(zip(verdicts, test.decisions, test.sources, strict=True)):
        got = (verdict.decision.value, -1 if verdict.source is None else verdict.source)
        if got != (decision, source):
            expected = f"{decision}, source {source}"
            raise BundleError(
                f"self-test frame {i}: expected {expected}, got {got[0]}, source {got[1]}; "
                "a wrong answer is not timed: run `inflight-edge verify`"
            )
