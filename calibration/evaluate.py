"""The device's path over labelled frames, clean and triggered, and the figures of the field."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score, roc_curve
from tqdm import tqdm

from inflight_edge.calibration.datasets import ImageSet
from inflight_edge.detector import Detector
from inflight_edge.errors import DataError, OptionError
from inflight_edge.guarantee import margin_limit
from inflight_edge.verdict import Decision, Verdict

__all__ = ["MEANING", "Evaluation", "evaluate", "frame_latency", "judge", "ranking"]

# Of the figures of evaluate and demo, for people.
MEANING = {
    "target_class": "target class that the inspection found",
    "acc": "clean accuracy",
    "asr": "attack success rate: triggered frames predicted as the target",
    "asr_estimated": "the same with the estimated pattern",
    "tpr": "triggered frames flagged (true positive rate)",
    "fpr": "clean target frames flagged (false positive rate)",
    "fpr_all": "all clean frames flagged",
    "sia": "triggered frames whose source class is found",
    "sia_flagged": "the same among the flagged ones",
    "auroc": "area under the ROC curve of the margin",
    "tpr_at_fpr01": "best TPR of a threshold at an FPR of 1 % of these frames",
    "tpr_at_fpr05": "the same at 5 %",
    "tpr_alpha01": "triggered frames flagged with alpha .01, which needs 99 clean images of the target that are read right",
    "fpr_alpha01": "clean target frames flagged with alpha .01",
    "tpr_alpha05": "triggered frames flagged with alpha .05",
    "fpr_alpha05": "clean target frames flagged with alpha .05",
    "acc_source": "clean accuracy on the source classes",
    "n_clean": "clean target frames judged",
    "n_triggered": "triggered frames judged",
    "n_invalid": "frames that could not be judged",
    "engine_ms_p50": "classifier per frame, median, ms",
    "engine_ms_p99": "classifier per frame, 99th percentile, ms",
    "scorer_us_p50": "guard per frame, median, µs",
    "scorer_us_p99": "guard per frame, 99th percentile, µs",
    "seconds": "time taken, s",
}


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Figures over held-out frames; None where there was no frame to measure on.

    acc          share of clean frames predicted right.
    asr          share of triggered frames of other classes that are predicted as a guarded target; with several guards those
                 of the trigger's own target, which nothing tells from others, count as failed: leave them out.
    tpr          share of those that are flagged (the judged triggered frames, n_triggered of them).
    fpr          share of clean frames of a guarded target, predicted so (n_clean of them), that are flagged.
    fpr_all      share of all clean frames that are flagged: the easier protocol of the toolboxes.
    sia          share of judged triggered frames whose source class is found.  sia_flagged: of the flagged ones.
    auroc        of the margin, judged triggered against judged clean frames.
    tpr_at_fpr01, tpr_at_fpr05  the best TPR of a threshold on the margin at an FPR of at most 1 and 5 % of these frames.
    tpr_alpha01, fpr_alpha01, tpr_alpha05, fpr_alpha05  TPR and FPR where a frame is flagged as `alpha` of Detector, .01 and
                 .05, would; None where a guard has too few clean margins for that promise.
    n_invalid    frames without a judgement: wrong ones of acc, and among those of asr that the attack did not move.
    Definitions: Li, Xiang, Miller, Kesidis, ICASSP 2022, section 5.2.
    """

    acc: float | None
    asr: float | None
    tpr: float | None
    fpr: float | None
    fpr_all: float | None
    sia: float | None
    sia_flagged: float | None
    auroc: float | None
    tpr_at_fpr01: float | None
    tpr_at_fpr05: float | None
    tpr_alpha01: float | None
    fpr_alpha01: float | None
    tpr_alpha05: float | None
    fpr_alpha05: float | None
    n_clean: int
    n_triggered: int
    n_invalid: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def judge(detector: Detector, data: ImageSet, *, label: str, progress: bool = True, batch: int = 64) -> list[Verdict]:
    """Verdict on every image, in order; INVALID for a file that cannot be read."""
    verdicts: list[Verdict] = []
    starts = range(0, len(data), batch)
    for start in tqdm(starts, desc=label, unit="batch", disable=not progress, leave=False):
        read = [_read(data, i) for i in range(start, min(start + batch, len(data)))]
        frames = [frame for frame in read if not isinstance(frame, Verdict)]
        judged = iter(detector.run(frames) if frames else [])
        verdicts += [frame if isinstance(frame, Verdict) else next(judged) for frame in read]
    return verdicts


def _read(data: ImageSet, i: int) -> NDArray[np.uint8] | Verdict:
    """An image, or the verdict on one that cannot be read."""
    try:
        return data.images[i]
    except DataError as error:
        return Verdict(Decision.INVALID, reason=str(error))


def evaluate(
    detector: Detector, clean: ImageSet | None, triggered: ImageSet | None, *, progress: bool = True
) -> Evaluation:
    """Measure a detector; labels are the true classes, also of triggered frames.

    Why the first of the frames that could not be judged was not goes to standard error.
    Raises DataError when a label does not fit the classifier, or when no frame could be judged.
    """
    for data in (clean, triggered):
        if data is not None:
            data.check_labels(len(detector.class_names), every_class=False)
    clean_verdicts = [] if clean is None else judge(detector, clean, label="clean", progress=progress)
    trigger_verdicts = [] if triggered is None else judge(detector, triggered, label="triggered", progress=progress)
    clean_labels = [] if clean is None else clean.labels.tolist()
    trigger_labels = [] if triggered is None else triggered.labels.tolist()
    verdicts = [*clean_verdicts, *trigger_verdicts]
    reasons = [v.reason for v in verdicts if v.decision is Decision.INVALID]
    if reasons and len(reasons) == len(verdicts):
        raise DataError(f"none of the frames could be judged: {reasons[0]}")
    if reasons:
        print(f"{len(reasons)} of {len(verdicts)} frames could not be judged; the first: {reasons[0]}", file=sys.stderr)
    guarded = set(detector.guards)
    negatives = [v for v, y in zip(clean_verdicts, clean_labels, strict=True) if y in guarded and v.predicted == y]
    attacked = [(v, y) for v, y in zip(trigger_verdicts, trigger_labels, strict=True) if guarded != {y}]
    positives = [(v, y) for v, y in attacked if v.predicted in guarded and v.predicted != y]
    flagged = [(v, y) for v, y in positives if v.decision is Decision.TRIGGER]
    right = sum(v.source == y for v, y in flagged)
    auroc, at_one, at_five = _ranking([v.margin for v, _ in positives], [v.margin for v in negatives])
    tpr_alpha01, fpr_alpha01 = _promised(detector, [v for v, _ in positives], negatives, 0.01)
    tpr_alpha05, fpr_alpha05 = _promised(detector, [v for v, _ in positives], negatives, 0.05)
    return Evaluation(
        acc=_share(
            sum(v.predicted == y for v, y in zip(clean_verdicts, clean_labels, strict=True)), len(clean_verdicts)
        ),
        asr=_share(len(positives), len(attacked)),
        tpr=_share(len(flagged), len(positives)),
        fpr=_share(sum(v.decision is Decision.TRIGGER for v in negatives), len(negatives)),
        fpr_all=_share(sum(v.decision is Decision.TRIGGER for v in clean_verdicts), len(clean_verdicts)),
        sia=_share(right, len(positives)),
        sia_flagged=_share(right, len(flagged)),
        auroc=auroc,
        tpr_at_fpr01=at_one,
        tpr_at_fpr05=at_five,
        tpr_alpha01=tpr_alpha01,
        fpr_alpha01=fpr_alpha01,
        tpr_alpha05=tpr_alpha05,
        fpr_alpha05=fpr_alpha05,
        n_clean=len(negatives),
        n_triggered=len(positives),
        n_invalid=len(reasons),
    )


def frame_latency(
    detector: Detector, frames: NDArray[np.uint8], *, warm_up: int = 20
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Nanoseconds of the engine and of the scorer for each frame, one frame at a time, after a warm-up."""
    if len(frames) == 0:
        raise DataError("no frames to time")
    guard = next(iter(detector.guards.values()))
    out = np.empty(guard.n_rows, np.float32)
    engine_ns, scorer_ns = [], []
    for i, frame in enumerate([*frames[:warm_up], *frames]):
        inputs = detector.bundle.preprocess(frame)[None]
        start = time.perf_counter_ns()
        _, features = detector.engine.run(inputs)
        middle = time.perf_counter_ns()
        guard.score_into(features[0], out)
        end = time.perf_counter_ns()
        if i >= min(warm_up, len(frames)):
            engine_ns.append(middle - start)
            scorer_ns.append(end - middle)
    return np.asarray(engine_ns, np.float64), np.asarray(scorer_ns, np.float64)


def _share(count: int, total: int) -> float | None:
    return count / total if total else None


def _promised(
    detector: Detector, positives: list[Verdict], negatives: list[Verdict], alpha: float
) -> tuple[float | None, float | None]:
    """Shares of the two whose margin is above what alpha allows; None where a guard has too few clean margins."""
    try:
        limits = {guard.target: margin_limit(guard.clean_margins, alpha) for guard in detector.bundle.guards}
    except OptionError:
        return None, None
    above = [sum(v.margin > limits[v.predicted] for v in group) for group in (positives, negatives)]
    return _share(above[0], len(positives)), _share(above[1], len(negatives))


def _ranking(positives: list[float], negatives: list[float]) -> tuple[float | None, float | None, float | None]:
    """See ranking; an infinite margin counts as the largest finite number of its sign, NaN as 0."""
    if not positives or not negatives:
        return None, None, None
    return ranking(np.nan_to_num(np.array(positives)), np.nan_to_num(np.array(negatives)))


def ranking(positives: NDArray[np.float64], negatives: NDArray[np.float64]) -> tuple[float, float, float]:
    """Area under the ROC curve, and the best true positive rate at a false positive rate of at most 1 and 5 %."""
    truth = np.repeat([1, 0], [len(positives), len(negatives)])
    scores = np.concatenate([positives, negatives])
    fpr, tpr, _ = roc_curve(truth, scores, drop_intermediate=False)
    return float(roc_auc_score(truth, scores)), float(tpr[fpr <= 0.01].max()), float(tpr[fpr <= 0.05].max())
