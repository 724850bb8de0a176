"""A promise on false alarms: split-conformal p-values of the margin against those of clean frames of the target."""

from __future__ import annotations

import math
from numbers import Real

import numpy as np
from numpy.typing import ArrayLike, NDArray

from inflight_edge.errors import OptionError

__all__ = ["margin_limit", "p_values", "smallest_alpha"]


def p_values(margins: ArrayLike, clean_margins: ArrayLike) -> NDArray[np.float64]:
    """P = (1 + number of clean margins >= margin) / (n + 1) of each margin, in 1/(n+1)..1; NaN gives 0.

    margins        any shape, nats, see Verdict.
    clean_margins  (n,) of clean target frames that the guard was not fitted to.
    For a clean frame exchangeable with those, P(p <= alpha) <= alpha at every n and alpha.
    Source: Vovk, Gammerman, Shafer, Algorithmic Learning in a Random World, 2005, section 2.2.
    Raises OptionError for clean margins that are none or NaN.
    """
    ascending = _ascending(clean_margins)
    tested = np.asarray(margins, np.float64)
    at_least = len(ascending) - np.searchsorted(ascending, tested, side="left")
    return np.where(np.isnan(tested), 0.0, (1.0 + at_least) / (len(ascending) + 1.0))


def margin_limit(clean_margins: ArrayLike, alpha: float) -> float:
    """The clean margin above which p_values is <= alpha: flag a frame when its margin is larger, or NaN.

    clean_margins: as in p_values.  alpha: wanted false-alarm rate, 1/(n+1) <= alpha < 1.  Raises OptionError.
    """
    ascending = _ascending(clean_margins)
    n_clean = len(ascending)
    if not isinstance(alpha, Real) or not 0.0 < alpha < 1.0:
        raise OptionError(
            f"alpha: expected a rate of false alarms, 0 < alpha < 1, got {alpha!r}; 0.05 allows one in twenty"
        )
    if not smallest_alpha(n_clean) <= alpha < 1.0:
        raise OptionError(
            f"alpha: expected {smallest_alpha(n_clean):.4g} <= alpha < 1, got {alpha}; no p-value of {n_clean} clean "
            "margins is lower: measure more clean frames of the target or allow more false alarms"
        )
    above = math.floor(alpha * (n_clean + 1)) - 1
    above += (above + 2) / (n_clean + 1) <= alpha  # the product may have been rounded down,
    above -= (above + 1) / (n_clean + 1) > alpha  # or up
    return float(ascending[n_clean - 1 - above])


def smallest_alpha(n_clean: int) -> float:
    """The lowest false-alarm rate that n clean margins can promise: 1 / (n + 1)."""
    return 1.0 / (n_clean + 1.0)


def _ascending(clean_margins: ArrayLike) -> NDArray[np.float64]:
    margins = np.sort(np.asarray(clean_margins, np.float64).ravel())
    if not margins.size or np.isnan(margins).any():
        raise OptionError(
            f"clean margins: expected at least one and no NaN, got {int(np.isnan(margins).sum())} NaN of {margins.size}; "
            "calibrate again, or measure clean frames of the target"
        )
    return margins
