"""The figures by hand, on verdicts made by hand."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from bundles import CLEAN_EAST, CLEAN_WEST, TRIGGERED_NORTH, TRIGGERED_SOUTH, tiny_bundle
from PIL import Image

from inflight_edge.calibration.datasets import ImageSet, load_images
from inflight_edge.calibration.evaluate import Evaluation, evaluate, frame_latency, judge, ranking
from inflight_edge.detector import Detector
from inflight_edge.errors import DataError
from inflight_edge.verdict import Decision, Verdict

NO_MARGINS = np.empty(0, np.float32)
CLASS_NAMES = ("a", "b", "c", "d")


class Scripted:
    """A detector that gives frame i, whose first pixel is i, the i-th verdict of a script."""

    def __init__(self, script: list[Verdict], guarded: tuple[int, ...], margins: np.ndarray) -> None:
        self.script = script
        self.class_names = CLASS_NAMES
        self.guards = dict.fromkeys(guarded)
        self.bundle = SimpleNamespace(
            guards=[SimpleNamespace(target=target, clean_margins=margins) for target in guarded]
        )
        self.batches: list[int] = []

    def run(self, frames: list[Any]) -> list[Verdict]:
        self.batches.append(len(frames))
        return [self.script[int(frame.flat[0])] for frame in frames]


def accept(predicted: int, margin: float = -5.0) -> Verdict:
    return Verdict(Decision.ACCEPT, predicted, None, margin)


def trigger(predicted: int, source: int, margin: float = 5.0) -> Verdict:
    return Verdict(Decision.TRIGGER, predicted, source, margin)


def unguarded(predicted: int) -> Verdict:
    return Verdict(Decision.UNGUARDED, predicted)


def invalid(predicted: int | None = None) -> Verdict:
    return Verdict(Decision.INVALID, predicted)


def measured(
    clean: list[tuple[int, Verdict]] | None,
    triggered: list[tuple[int, Verdict]] | None,
    guarded: tuple[int, ...] = (3,),
    margins: np.ndarray = NO_MARGINS,
) -> Evaluation:
    """Evaluation of (true class, verdict) pairs; margins: the guards' clean ones."""
    pairs = [*(clean or []), *(triggered or [])]
    frames = np.zeros((len(pairs), 2, 2, 1), np.uint8)
    frames[:, 0, 0, 0] = np.arange(len(pairs))
    labels = np.array([label for label, _ in pairs], np.int64)
    cut = len(clean or [])
    sets = [
        None if part is None else ImageSet(frames[where], labels[where], None, "here")
        for part, where in ((clean, slice(0, cut)), (triggered, slice(cut, None)))
    ]
    detector: Any = Scripted([verdict for _, verdict in pairs], guarded, margins)
    return evaluate(detector, sets[0], sets[1], progress=False)


CLEAN = [
    (3, accept(3, -9.0)),  # negative
    (3, accept(3, -8.0)),  # negative
    (3, trigger(3, 1, 1.0)),  # negative, false alarm
    (3, invalid(3)),  # negative, not judged
    (3, unguarded(0)),  # wrong prediction: not a negative
    (1, unguarded(1)),
    (0, unguarded(0)),
    (1, trigger(3, 1, 4.0)),  # misclassified as the target and flagged: counts in fpr_all alone
    (2, accept(3, -3.0)),
    (0, invalid()),
]
TRIGGERED = [
    (0, trigger(3, 0, 9.0)),  # right source
    (1, trigger(3, 1, 2.0)),  # right source
    (1, trigger(3, 0, 3.0)),  # wrong source
    (2, accept(3, -1.0)),  # missed
    (2, invalid(3)),  # attack works, no judgement: missed, and not flagged
    (2, unguarded(2)),  # attack fails
    (0, unguarded(1)),
    (1, invalid()),
    (3, accept(3)),  # a frame of the target itself cannot be attacked
    (3, trigger(3, 0)),
]


def test_figures_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    got = measured(CLEAN, TRIGGERED)
    assert got.acc == 6 / 10
    assert got.asr == 5 / 8
    assert got.tpr == 3 / 5
    assert got.fpr == 1 / 4
    assert got.fpr_all == 2 / 10
    assert got.sia == 2 / 5
    assert got.sia_flagged == 2 / 3
    assert (got.n_clean, got.n_triggered, got.n_invalid) == (4, 5, 4)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("4 of 20 frames could not be judged; the first: ")
    # Margins 9 2 3 -1 and one unknown (0) against -9 -8 1 and one unknown (0): 16.5 of 20 pairs in order.
    assert got.auroc == pytest.approx((4 + 4 + 4 + 2 + 2.5) / 20)
    assert got.as_dict() == {name: getattr(got, name) for name in Evaluation.__slots__}


def test_alpha_flags_what_lies_above_its_share_of_the_clean_margins() -> None:
    margins = np.arange(-38, 1).astype(np.float32) / 4  # -9.5 to 0: 39 of them, so that .05 leaves the highest out
    got = measured(CLEAN, TRIGGERED, margins=margins)
    assert (got.tpr_alpha01, got.fpr_alpha01) == (None, None)  # 1 / 40 is the least
    # Above -.25: 9, 2 and 3, not -1 and the unknown one; of -9, -8, 1 and one unknown the 1.
    assert (got.tpr_alpha05, got.fpr_alpha05) == (3 / 5, 1 / 4)
    low = np.full(199, -8.5, np.float32)
    low[-2:] = -1.0, 50.0
    got = measured(CLEAN, TRIGGERED, margins=low)
    assert (got.tpr_alpha01, got.fpr_alpha01) == (3 / 5, 1 / 4)  # two of 200 above: the limit is -1
    assert (got.tpr_alpha05, got.fpr_alpha05) == (4 / 5, 2 / 4)  # ten above: -8.5
    assert measured(CLEAN, TRIGGERED, margins=NO_MARGINS).tpr_alpha05 is None


def test_nothing_to_measure_is_none() -> None:
    nothing = measured(None, None)
    assert nothing == Evaluation(*[None] * 14, 0, 0, 0)
    clean = measured([(3, accept(3)), (0, unguarded(0))], None)
    assert (clean.acc, clean.fpr, clean.fpr_all, clean.n_clean) == (1.0, 0.0, 0.0, 1)
    assert (clean.asr, clean.tpr, clean.sia, clean.sia_flagged, clean.auroc) == (None,) * 5
    triggered = measured(None, [(0, trigger(3, 0))])
    assert (triggered.asr, triggered.tpr, triggered.sia, triggered.sia_flagged) == (1.0, 1.0, 1.0, 1.0)
    assert (triggered.acc, triggered.fpr, triggered.fpr_all, triggered.auroc) == (None,) * 4
    failed = measured([(0, unguarded(0))], [(0, unguarded(0))])
    assert (failed.asr, failed.tpr, failed.sia, failed.fpr, failed.auroc) == (0.0, None, None, None, None)
    missed = measured(None, [(0, accept(3))])
    assert (missed.tpr, missed.sia, missed.sia_flagged) == (0.0, 0.0, None)
    only_target = measured(None, [(3, accept(3))])
    assert (only_target.asr, only_target.n_triggered) == (None, 0)


def test_several_guards() -> None:
    clean = [(3, accept(3)), (3, trigger(3, 0)), (1, accept(1)), (1, accept(3)), (0, unguarded(0)), (2, accept(1))]
    triggered = [
        (0, trigger(3, 0)),
        (0, trigger(1, 0)),
        (1, trigger(3, 1)),  # a frame of one target, sent to the other
        (3, accept(1)),
        (3, accept(3)),  # a guarded class, but its own: the attack failed
        (2, unguarded(2)),
    ]
    got = measured(clean, triggered, guarded=(1, 3))
    assert (got.n_clean, got.fpr) == (3, 1 / 3)
    assert got.fpr_all == 1 / 6
    assert got.asr == 4 / 6
    assert (got.n_triggered, got.tpr, got.sia, got.sia_flagged) == (4, 3 / 4, 3 / 4, 1.0)


def test_infinite_margins_are_ranked() -> None:
    clean = [(3, accept(3, -math.inf)), (3, accept(3, -1.0))]
    triggered = [(0, trigger(3, 0, math.inf)), (0, trigger(3, 0, -0.5))]
    assert measured(clean, triggered).auroc == 1.0


def test_tied_margins_are_ranked() -> None:
    """Where both rise together the points between are results too."""
    ties = np.arange(40.0)
    assert ranking(ties, ties) == pytest.approx((0.5, 0.0, 0.05))


def test_labels_must_fit(capsys: pytest.CaptureFixture[str]) -> None:
    for pair in (([(4, accept(3))], None), (None, [(4, accept(3))])):
        with pytest.raises(DataError, match=r"^here: label 4 found, but the model has 4 classes \(0 to 3\)"):
            measured(*pair)
    assert capsys.readouterr() == ("", "")


def test_judging_keeps_the_order_whatever_the_batch(capsys: pytest.CaptureFixture[str]) -> None:
    script = [unguarded(i % 4) for i in range(10)]
    frames = np.zeros((10, 2, 2), np.uint8)
    frames[:, 0, 0] = np.arange(10)
    detector: Any = Scripted(script, (3,), NO_MARGINS)
    for images in (frames, list(frames)):
        data = ImageSet(images, np.zeros(10, np.int64), None, "here")
        assert judge(detector, data, label="clean", progress=False, batch=4) == script
    assert detector.batches == [4, 4, 2] * 2
    assert capsys.readouterr() == ("", "")
    judge(detector, data, label="a label", batch=4)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "a label" in captured.err


def test_a_file_that_cannot_be_read_is_invalid_alone(tmp_path: Path) -> None:
    for i in range(6):
        (tmp_path / "a").mkdir(exist_ok=True)
        Image.fromarray(np.full((2, 2), i, np.uint8)).save(tmp_path / "a" / f"{i}.png")  # the script's line
    data = load_images(tmp_path, channels=1)
    for i in (2, 4, 5):
        (tmp_path / "a" / f"{i}.png").write_bytes(b"no picture")
    detector: Any = Scripted([unguarded(i) for i in range(4)], (3,), NO_MARGINS)
    verdicts = judge(detector, data, label="clean", progress=False, batch=2)
    assert [v.decision for v in verdicts] == [
        Decision.UNGUARDED, Decision.UNGUARDED, Decision.INVALID, Decision.UNGUARDED, Decision.INVALID, Decision.INVALID
    ]  # fmt: skip
    assert f"{tmp_path}/a/2.png: expected an image" in verdicts[2].reason
    assert [v.predicted for v in verdicts] == [0, 1, None, 3, None, None]
    assert detector.batches == [2, 1]


def test_a_real_detector() -> None:
    detector = Detector(tiny_bundle(), threads=1)
    clean = ImageSet(np.stack([CLEAN_WEST, CLEAN_EAST]), np.array([3, 1]), None, "clean")
    triggered = ImageSet(np.stack([TRIGGERED_NORTH, TRIGGERED_SOUTH]), np.array([0, 2]), None, "triggered")
    got = evaluate(detector, clean, triggered, progress=False)
    assert (got.acc, got.asr, got.tpr, got.fpr, got.sia, got.auroc) == (1.0, 1.0, 1.0, 0.0, 1.0, 1.0)


@pytest.mark.parametrize("n_frames", [1, 5, 30])
def test_latency_of_every_frame(n_frames: int) -> None:
    detector = Detector(tiny_bundle(), threads=1)
    frames = np.zeros((n_frames, 2, 2, 1), np.uint8)
    engine_ns, scorer_ns = frame_latency(detector, frames, warm_up=20)
    for times in (engine_ns, scorer_ns):
        assert times.shape == (n_frames,)
        assert times.dtype == np.float64
        assert (times > 0).all()
        assert times.max() < 1e9


def test_latency_of_no_frame() -> None:
    with pytest.raises(DataError, match=r"^no frames to time"):
        frame_latency(Detector(tiny_bundle(), threads=1), np.zeros((0, 2, 2, 1), np.uint8))
