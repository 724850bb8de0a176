"""The verdict on one frame, and the pure rule that makes it; fails closed."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Decision", "Verdict", "decide"]


class Decision(str, enum.Enum):
    """What is to be done with the classifier's answer.

    ACCEPT     the predicted class is guarded and its own density explains the frame best.
    TRIGGER    the predicted class is guarded and another class explains the frame at least as well.
    UNGUARDED  the predicted class has no guard: the prediction passes, as in the paper.
    INVALID    no judgement was possible (non-finite values, wrong shape, engine failure): never accepted.
    """

    ACCEPT = "accept"
    TRIGGER = "trigger"
    UNGUARDED = "unguarded"
    INVALID = "invalid"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Verdict on one frame.

    decision         see Decision.
    predicted        the classifier's class index, None when INVALID before there was a prediction.
    source           inferred true class of a TRIGGER, else None.
    margin           nats: best non-target log-likelihood minus the target's; NaN without a guard.
    log_likelihoods  (R,) float32 nats, one per density row of the guard, empty without a guard.
    classes          (R,) int32, class index of each density row.
    reason           why an INVALID frame could not be judged, else "".
    """

    decision: Decision
    predicted: int | None = None
    source: int | None = None
    margin: float = math.nan
    log_likelihoods: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32), compare=False)
    classes: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32), compare=False)
    reason: str = ""

    @property
    def passes(self) -> bool:
        """True when the classifier's answer may be used: ACCEPT or UNGUARDED."""
        return self.decision in (Decision.ACCEPT, Decision.UNGUARDED)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON: a missing or non-finite number becomes None."""
        return {
            "decision": self.decision.value,
            "predicted": self.predicted,
            "source": self.source,
            "margin": self.margin if math.isfinite(self.margin) else None,
            "log_likelihoods": {
                str(int(c)): (float(v) if math.isfinite(v) else None)
                for c, v in zip(self.classes, self.log_likelihoods, strict=True)
            },
            "reason": self.reason,
        }


def decide(
    predicted: int,
    log_likelihoods: NDArray[np.float32],
    classes: NDArray[np.int32],
    target_row: int,
) -> Verdict:
    """Judge a frame predicted as a guard's target from its per-class log-likelihoods.

    log_likelihoods: (R,) float32 nats.  classes: (R,) class index of each row.
    margin = best non-target - target: < 0 is ACCEPT, >= 0 (a tie too) is TRIGGER whose source is the best
    non-target class (the lowest index among equals), NaN is INVALID (some NaN, +inf, or all rows -inf).
    Source: Li et al., ICASSP 2022, section 4.2.
    """
    others = log_likelihoods.copy()
    others[target_row] = -np.inf
    best = int(np.argmax(others))
    target_value = float(log_likelihoods[target_row])
    best_value = float(others[best])
    usable = not np.isnan(log_likelihoods).any() and max(target_value, best_value) < math.inf
    margin = best_value - target_value if usable else math.nan
    if margin < 0.0:
        return Verdict(Decision.ACCEPT, predicted, None, margin, log_likelihoods, classes)
    if margin >= 0.0:
        return Verdict(Decision.TRIGGER, predicted, int(classes[best]), margin, log_likelihoods, classes)
    reason = "no class explains the features: a log-likelihood is NaN or all are -inf"
    return Verdict(Decision.INVALID, predicted, None, math.nan, log_likelihoods, classes, reason)
