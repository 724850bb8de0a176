"""Test-time defences of others, to compare with: each gives a frame predicted as the target a suspicion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from inflight_edge.calibration.evaluate import ranking
from inflight_edge.calibration.features import extract
from inflight_edge.calibration.model import Classifier
from inflight_edge.calibration.reversal.estimates import Estimate
from inflight_edge.errors import DataError, OptionError
from inflight_edge.preprocess import Preprocess

__all__ = ["B3D", "Baseline", "NeuronFilter", "Strip", "compare", "entropy", "most_changed"]

Pixels = NDArray[np.float32]
Scores = NDArray[np.float64]


class Baseline(Protocol):
    """A defence that gives each frame a number."""

    def suspicion(self, pixels: Pixels) -> Scores:
        """(N,) of frames (N, channels, H, W) in 0..255; the higher, the more likely a trigger."""


@dataclass(frozen=True, slots=True, eq=False)
class Strip:
    """STRIP: blends of a frame with clean images keep the target when a trigger is in it, so their entropy is low.

    overlays  (n, channels, H, W) clean images in 0..255; n is 100 in the paper.  The benchmark takes none of the target.
    Source: Gao et al., ACSAC 2019.
    """

    classifier: Classifier
    preprocess: Preprocess
    overlays: Pixels
    progress: bool = False

    def suspicion(self, pixels: Pixels) -> Scores:
        """Minus the mean entropy of the posteriors over the blends, nats."""
        result = np.empty(len(pixels))
        for i in tqdm(range(len(pixels)), desc="STRIP", unit="frame", disable=not self.progress, leave=False):
            blends = np.float32(0.5) * pixels[i] + np.float32(0.5) * self.overlays
            result[i] = -entropy(extract(self.classifier, blends, self.preprocess)[0]).mean()
        return result


@dataclass(frozen=True, slots=True, eq=False)
class B3D:
    """B3D at test time: the estimated pattern changes the posterior of a clean frame, not of a triggered one.

    Source: Dong et al., ICCV 2021, section 3.3.
    """

    classifier: Classifier
    preprocess: Preprocess
    estimate: Estimate

    def suspicion(self, pixels: Pixels) -> Scores:
        """Minus the Kullback-Leibler divergence from the posterior without the pattern to that with it, nats."""
        before = _log_softmax(extract(self.classifier, pixels, self.preprocess)[0])
        after = _log_softmax(extract(self.classifier, self.estimate.embed(pixels), self.preprocess)[0])
        return -(np.exp(before) * (before - after)).sum(axis=1)


@dataclass(frozen=True, slots=True, eq=False)
class NeuronFilter:
    """Neural Cleanse's filter: mean activation of the neurons that the estimated pattern excites most.

    neurons  indices of features, see most_changed.      Source: Wang et al., IEEE S&P 2019, section VI.A.

    It ranks neurons by what the pattern changes in an image. Those are often the target's own, which its clean frames
    excite as much: the rise above the clean images of the target finds the neurons that only the trigger excites.
    """

    classifier: Classifier
    preprocess: Preprocess
    neurons: NDArray[np.int64]

    @classmethod
    def fit(
        cls,
        classifier: Classifier,
        preprocess: Preprocess,
        estimate: Estimate,
        clean: Pixels,
        *,
        share: float = 0.01,
        above: Pixels | None = None,
    ) -> NeuronFilter:
        """The filter of an estimate.

        clean  images (N, channels, H, W) in 0..255 of all other classes, which get the pattern.
        above  images that the rise is counted from; None: the same without the pattern, as published.
        """
        before = extract(classifier, clean if above is None else above, preprocess)[1]
        after = extract(classifier, estimate.embed(clean), preprocess)[1]
        return cls(classifier, preprocess, most_changed(before, after, share))

    def suspicion(self, pixels: Pixels) -> Scores:
        """Mean activation of the chosen neurons."""
        features = extract(self.classifier, pixels, self.preprocess)[1]
        return features[:, self.neurons].astype(np.float64).mean(axis=1)


def most_changed(before: Pixels, after: Pixels, share: float) -> NDArray[np.int64]:
    """Features whose mean over the frames rises most, ascending indices; at least one.  (N, D) and (M, D)."""
    if not 0.0 < share <= 1.0:
        raise OptionError(f"share: expected 0 < share <= 1, got {share}")
    rise = after.mean(axis=0, dtype=np.float64) - before.mean(axis=0, dtype=np.float64)
    n_chosen = max(1, round(share * len(rise)))
    return np.sort(np.argsort(-rise, kind="stable")[:n_chosen]).astype(np.int64)


def entropy(logits: NDArray[np.floating]) -> Scores:
    """Entropy (N,) of the posteriors of logits (N, classes), nats."""
    posterior = _log_softmax(logits)
    return -(np.exp(posterior) * posterior).sum(axis=1)


def compare(triggered: Scores, clean: Scores, defence: Scores) -> dict[str, float]:
    """Figures of a defence with a threshold, from suspicions of frames that were predicted as the target.

    triggered, clean  of held-out frames.     defence  of the defender's own clean frames of the target.
    tpr, fpr          threshold at the 95th percentile of the defender's frames: what can be had in flight.
    tpr_at_fpr01, tpr_at_fpr05  the best TPR at an FPR of at most 1 and 5 % of the held-out frames: the paper's reading.
    auroc             of triggered against clean.
    Raises DataError when one of them is empty or not finite.
    """
    for name, scores in (("triggered", triggered), ("clean", clean), ("defence", defence)):
        if not len(scores) or not np.isfinite(scores).all():
            raise DataError(f"{name}: expected finite suspicions of at least one frame, got {len(scores)}")
    threshold = np.quantile(defence, 0.95)
    auroc, at_one, at_five = ranking(triggered, clean)
    return {
        "tpr": float((triggered > threshold).mean()),
        "fpr": float((clean > threshold).mean()),
        "tpr_at_fpr01": at_one,
        "tpr_at_fpr05": at_five,
        "auroc": auroc,
    }


def _log_softmax(logits: NDArray[np.floating]) -> Scores:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    result: Scores = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result
