# mypy: ignore-errors
"""The scorer in the Triton language: one program per frame and density row.  Imports triton; see triton.py.

The twin of csrc/score_cuda.cu's log-likelihoods, without the verdict: programs do not speak to each other.
"""

import triton
import triton.language as tl

__all__ = ["score_kernel"]


@triton.jit
def _merge(largest, total, values):
    """Log-sum-exp {largest, total} with more terms; terms of -inf and empty partials never give NaN."""
    highest = tl.maximum(largest, tl.max(values, axis=0))
    # exp(-inf - 0) is 0; exp(-inf - -inf) would be NaN.
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    return highest, total * tl.exp(largest - shift) + tl.sum(tl.exp(values - shift), axis=0)


@triton.jit
def _standardise(features, mean, scale, d, mask):
    """Z at the features d as high + low, 0 where masked: score_math.h's ife_standardise_pair.

    Compiled without fusion of products and sums: low is the remainder of the rounded high.
    """
    x = tl.load(features + d, mask=mask, other=0.0)
    centre = tl.load(mean + d, mask=mask, other=0.0)
    deviation = tl.load(scale + d, mask=mask, other=1.0)
    inverse = tl.div_rn(tl.full(deviation.shape, 1.0, tl.float32), deviation)
    difference = x - centre
    back = difference - x
    error = (x - (difference - back)) - (centre + back)
    high = difference * inverse
    return high, (tl.fma(-high, deviation, difference) + error) * inverse


@triton.jit
def _whiten(packed, features, mean, scale, centre, rows, first, n_features, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """Y = W (z - centre) at the rows first .. first + ROWS - 1, 0 past the last one.  W is packed row by row."""
    y = tl.zeros([ROWS], dtype=tl.float32)
    starts = rows.to(tl.int64) * (rows + 1) // 2
    for start in range(0, tl.minimum(first + ROWS, n_features), COLUMNS):
        d = start + tl.arange(0, COLUMNS)
        inside = d < n_features
        high, low = _standardise(features, mean, scale, d, inside)
        z = (high - tl.load(centre + d, mask=inside, other=0.0)) + low
        lower = (d[None, :] <= rows[:, None]) & (rows[:, None] < n_features)
        weights = tl.load(packed + starts[:, None] + d[None, :], mask=lower, other=0.0)
        # Masked z may be infinite, and 0 times infinity is NaN.
        y += tl.sum(tl.where(lower, weights * z[None, :], 0.0), axis=1)
    return y


@triton.jit
def score_kernel(
    features,  # (N, D)
    mean,  # (D)
    scale,  # (D)
    origin,  # (D) for shared, else unused
    centres,  # (M, D)
    whitener,
    constants,  # (M)
    offsets,  # (R + 1) int32
    out,  # (N, R)
    n_features,
    n_rows,
    KIND: tl.constexpr,  # 0 diagonal, 1 shared, 2 full, as in inflight.h
    COLUMNS: tl.constexpr,  # features at a time
    ROWS: tl.constexpr,  # rows of W at a time
    COMPONENTS: tl.constexpr,  # components at a time (diagonal, shared)
):
    """Log-likelihoods as ife_score's: grid (N, R)."""
    frame = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1)
    features += frame * n_features
    begin = tl.load(offsets + row)
    end = tl.load(offsets + row + 1)

    nonfinite = 0
    for start in range(0, n_features, COLUMNS):
        d = start + tl.arange(0, COLUMNS)
        bits = tl.load(features + d, mask=d < n_features, other=0.0).to(tl.int32, bitcast=True) & 0x7FFFFFFF
        nonfinite = tl.maximum(nonfinite, tl.max((bits >= 0x7F800000).to(tl.int32), axis=0))

    largest = float("-inf")
    total = 0.0
    if KIND == 2:
        # Not .to(): triton's JIT makes a 1 a plain int.
        triangle = tl.cast(n_features, tl.int64) * (n_features + 1) // 2
        m = begin.to(tl.int64)
        for _ in range(begin, end):
            distance = 0.0
            for first in range(0, n_features, ROWS):
                rows = first + tl.arange(0, ROWS)
                packed = whitener + m * triangle
                centre = centres + m * n_features
                y = _whiten(packed, features, mean, scale, centre, rows, first, n_features, COLUMNS, ROWS)
                distance += tl.sum(y * y, axis=0)
            value = tl.where(distance < float("inf"), tl.load(constants + m) - 0.5 * distance, float("-inf"))
            largest, total = _merge(largest, total, tl.zeros([1], dtype=tl.float32) + value)
            m += 1
    else:
        for first_component in range(begin, end, COMPONENTS):
            k = first_component + tl.arange(0, COMPONENTS)
            there = k < end
            m = k.to(tl.int64)
            distances = tl.zeros([COMPONENTS], dtype=tl.float32)
            if KIND == 0:
                for start in range(0, n_features, COLUMNS):
                    d = start + tl.arange(0, COLUMNS)
                    inside = d < n_features
                    high, low = _standardise(features, mean, scale, d, inside)
                    where = m[:, None] * n_features + d[None, :]
                    mask = there[:, None] & inside[None, :]
                    centre = tl.load(centres + where, mask=mask, other=0.0)
                    z = (high[None, :] - centre) + low[None, :]
                    y = z * tl.load(whitener + where, mask=mask, other=0.0)
                    distances += tl.sum(tl.where(mask, y * y, 0.0), axis=1)
            else:
                for first in range(0, n_features, ROWS):
                    rows = first + tl.arange(0, ROWS)
                    y = _whiten(whitener, features, mean, scale, origin, rows, first, n_features, COLUMNS, ROWS)
                    mask = there[:, None] & (rows < n_features)[None, :]
                    centre = tl.load(centres + m[:, None] * n_features + rows[None, :], mask=mask, other=0.0)
                    difference = tl.where(mask, y[None, :] - centre, 0.0)
                    distances += tl.sum(difference * difference, axis=1)
            values = tl.load(constants + m, mask=there, other=0.0) - 0.5 * distances
            values = tl.where(there & (distances < float("inf")), values, float("-inf"))
            largest, total = _merge(largest, total, values)

    empty = largest == float("-inf")
    result = tl.where(empty, float("-inf"), largest + tl.log(tl.where(empty, 1.0, total)))
    result = tl.where(nonfinite != 0, float("nan"), result)
    tl.store(out + frame * n_rows + row, result)
