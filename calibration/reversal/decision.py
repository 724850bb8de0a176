"""From the sizes of estimated patterns to suspected classes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "additions_fit",
    "anomaly_indices",
    "near_targets",
    "one_way_ratios",
    "one_way_targets",
    "perturbation_p_values",
    "relative_norms",
    "small_pairs",
    "suspicious",
]

Floats = NDArray[np.float64]
THRESHOLD, LOG_THRESHOLD, SMALL_MASK, SMALL_OF_TWO = 2.0, 3.5, 0.6, 0.4
SMALL_PAIR, NEAR = 0.32, 0.43
P_VALUE = 0.05
ONE_WAY, ONE_WAY_MEDIAN, ENOUGH_CLASSES = 0.3, 0.46, 5
MASK_OF_ADDITION = 0.4
MAX_INDEX = 1000.0  # where more than half of the norms are equal, an index says no more than that the others differ


def anomaly_indices(norms: Floats) -> Floats:
    """How far each class's norm lies below the median, in units of 1.4826 x the median absolute deviation.

    norms: (classes,).  Positive below the median, negative above, at most 1000; the published rule calls > 2 a backdoor's
    target.
    Source: Wang et al., IEEE S&P 2019, section IV.C.
    """
    median = np.median(norms)
    deviation = 1.4826 * np.median(np.abs(norms - median))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        indices = np.where(norms == median, 0.0, (median - norms) / deviation)
    return np.clip(indices, -MAX_INDEX, MAX_INDEX)


def suspicious(norms: Floats) -> NDArray[np.bool_]:
    """Which classes (classes,) have a mask so small that they are taken for a backdoor's target.

    A class is one when its mask is below .6 of the median and one of these holds:
    - the published rule: an anomaly index above 2;
    - the same index of the logarithms above 3.5, the usual limit of a modified z-score, which still sees a tiny mask
      where few classes or a wide spread inflate the deviation;
    - it is the smallest mask and below .6 of the next one (of two classes: below .4), which is left where too few
      classes make any index small.
    Measured: smallest masks of clean models were at .70 of the median and above (LeNet-5 and fully connected networks
    on digits, MNIST and Fashion-MNIST, ten classes; two of them had an index above 2), targets of working attacks at
    .45 and below on digits, up to .59 elsewhere.
    Source: Wang et al., IEEE S&P 2019, section IV.C; Iglewicz and Hoaglin, "How to Detect and Handle Outliers", 1993.
    """
    order = np.argsort(norms)
    gap = np.zeros(len(norms), dtype=bool)
    gap[order[0]] = norms[order[0]] < (SMALL_MASK if len(norms) > 2 else SMALL_OF_TWO) * norms[order[1]]
    outlier = (anomaly_indices(norms) > THRESHOLD) | (anomaly_indices(np.log(norms)) > LOG_THRESHOLD)
    return (norms < SMALL_MASK * np.median(norms)) & (outlier | gap)


def relative_norms(norms: Floats, gaps: Floats) -> Floats:
    """(sources, targets): each norm for its gap, over the source's median; NaN on the diagonal, infinite without a gap.

    norms  (classes, classes) of the smallest pattern from source (row) to target (column), the diagonal not read.
    gaps   (classes, classes): mean over clean images of the source of its own logit minus the target's.  Where a class is
           almost the target already, a small pattern is no wonder.  At least a tenth of the median gap is taken.  Images
           that are mostly taken for the target without any pattern say nothing of one.
    """
    off = ~np.eye(len(norms), dtype=bool)
    least = max(0.1 * float(np.median(gaps[off])), np.finfo(np.float64).tiny)
    logs = np.log(norms) - np.log(np.maximum(gaps, least))
    np.fill_diagonal(logs, np.nan)
    result: Floats = np.exp(logs - np.nanmedian(logs, axis=1, keepdims=True))
    result[off & (gaps <= 0.0)] = np.inf
    return result


def small_pairs(relative: Floats) -> NDArray[np.bool_]:
    """Which pairs (sources, targets) need so small a patch that a single-class attack is suspected.

    relative  of relative_norms.  Below .32, and below .6 of every one that leads to another target.
    Measured, LeNet-5 on MNIST and Fashion-MNIST, searches of 150 updates: smallest of five clean ones .40 and above, of four
    single-class attacks .23 and below.
    """
    by_target = np.nanmin(relative, axis=0)
    elsewhere = np.array([np.delete(by_target, t).min() for t in range(len(relative))])
    small: NDArray[np.bool_] = (relative < SMALL_PAIR) & (relative < SMALL_MASK * elsewhere[None, :])
    return small


def perturbation_p_values(norms: Floats) -> Floats:
    """(classes,): how unlikely the largest inverse norm to each class is under those to the other classes.

    norms  (classes, classes) Euclidean norms from source (row) to target (column), the diagonal not read.
    The inverses to all other classes fit a Gamma distribution with location (maximum likelihood); the largest of the
    class's classes - 1 inverses has the p-value 1 - G^(classes - 1).  The published rule calls the model attacked when
    1 - (1 - smallest)^classes is at most .05.
    Source: Xiang, Miller, Kesidis, IEEE TNNLS 2022, section IV.
    """
    from scipy.stats import gamma

    n_classes = len(norms)
    inverse = 1.0 / norms
    np.fill_diagonal(inverse, np.nan)
    result = np.empty(n_classes)
    for c in range(n_classes):
        null = np.delete(inverse, c, axis=1)
        null = null[np.isfinite(null)]
        largest, spread = np.nanmax(inverse[:, c]), null.std()
        if not spread > 1e-9 * null.max():  # all alike: no distribution to fit
            result[c] = 1.0 if largest <= null.max() else 0.0
            continue
        # The likelihood has no maximum where the location is free and the shape below 1: it is kept a tenth of the
        # spread below the smallest value.
        location = null.min() - 0.1 * spread - 1e-12
        shape, _, scale = gamma.fit(null, floc=location)
        # 1 - (1 - q)^n without the cancellation for small q; of q = 1, a class out of reach, it is 1.
        with np.errstate(divide="ignore"):
            result[c] = -np.expm1((n_classes - 1) * np.log1p(-gamma.sf(largest, shape, location, scale)))
    return result


def one_way_ratios(norms: Floats) -> Floats:
    """(sources, targets): each norm over that of the way back; NaN on the diagonal.

    Classes that are alike are close both ways; a trigger leads one way.
    """
    ratios: Floats = norms / norms.T
    np.fill_diagonal(ratios, np.nan)
    return ratios


def one_way_targets(norms: Floats) -> dict[int, float]:
    """Classes that additions reach far more easily than they leave them, with the ratio that says so.

    A class is one when the median of its column of one_way_ratios is below .46 (an attack on many source classes), of five
    classes and more.  Measured, LeNet-5 on MNIST and Fashion-MNIST, five clean and nine attacked ones: medians of clean
    ones .67 and above, of other classes than the target of attacked ones .52 and above, of multi-class attacks by
    additions .34 and below.
    """
    if len(norms) < ENOUGH_CLASSES:
        return {}
    medians = np.nanmedian(one_way_ratios(norms), axis=0)
    return {int(t): float(medians[t]) for t in np.argsort(medians) if medians[t] < ONE_WAY_MEDIAN}


def near_targets(relative: Floats) -> dict[int, float]:
    """Classes that some source reaches by a far smaller addition than it would take, with its relative norm.

    relative  of relative_norms.  Below .43.  Measured as above: smallest of five clean ones .54 and above, of three
    single-class attacks by additions .35 and below.
    """
    smallest = np.nanmin(relative, axis=0)
    return {int(t): float(smallest[t]) for t in np.argsort(smallest) if smallest[t] < NEAR}


def additions_fit(masks: Floats, norms: Floats) -> NDArray[np.bool_]:
    """Which classes (classes,), should they be targets, are rather those of an addition than of a patch.

    masks  (classes,) sizes of the smallest patch to each class.      norms  as in perturbation_p_values.
    Either is taken over its median: the mask of the class, and the median addition to it.  A patch for a trigger makes the
    mask far smaller than the addition.  It is an addition where the mask is above .4 of that.
    Measured, LeNet-5 on MNIST and Fashion-MNIST: targets of multi-class attacks by patches .22 and below, by additions .65
    and above.
    """
    additions = np.nanmedian(np.where(np.eye(len(norms), dtype=bool), np.nan, norms), axis=0)
    fits: NDArray[np.bool_] = masks / np.median(masks) > MASK_OF_ADDITION * additions / np.median(additions)
    return fits
