/* The arithmetic of the scorers, once, for C and CUDA: the twins own only loops, memory and reductions. */
#ifndef INFLIGHT_SCORE_MATH_H
#define INFLIGHT_SCORE_MATH_H

#include "host_device.h"

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* Bits of |x|: >= IFE_NONFINITE_BITS exactly for NaN and infinities, whatever the compiler assumes about NaN. */
#define IFE_NONFINITE_BITS 0x7f800000u

IFE_MATH uint32_t ife_magnitude_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits & 0x7fffffffu;
}

/* A number as the unevaluated sum of two floats: 46 bits or more instead of 24. */
typedef struct {
    float high;
    float low;
} ife_pair;

/*
 * (x - mean) / scale to about 2^-44 of itself: a deviation of a thousandth of z needs more digits than a float has.
 * Not folded into the whitener: x - mean is exact where x is near the mean, x * a - b is not.
 * inverse is 1 / scale rounded.  The FMA form: the difference with its rounding error (Knuth's TwoSum), a quotient,
 * and the exact remainder of that quotient.
 */
IFE_MATH ife_pair ife_standardise_pair(float x, float mean, float scale, float inverse) {
    ife_pair z;
#if defined(__CUDACC__) || defined(FP_FAST_FMAF)
    const float difference = x - mean;
    const float back = difference - x;
    const float error = (x - (difference - back)) - (mean + back);
#ifdef __CUDA_ARCH__
    /* Never part of a multiply-add: z.low is the remainder of the rounded product, whoever subtracts from it next. */
    z.high = __fmul_rn(difference, inverse);
#else
    z.high = difference * inverse;
#endif
    z.low = (fmaf(-z.high, scale, difference) + error) * inverse;
#else
    const double quotient = ((double)x - mean) / scale;
    (void)inverse;
    z.high = (float)quotient;
    z.low = (float)(quotient - z.high);
#endif
    return z;
}

/* Exact to a rounding or two of the difference itself, however small it is against z. */
IFE_MATH float ife_pair_difference(ife_pair z, float centre) {
    return (z.high - centre) + z.low;
}

/* Centred square: the expanded form loses all digits where |y| is large against the difference. */
IFE_MATH float ife_distance_term(float y, float centre) {
    const float difference = y - centre;
    return difference * difference;
}

/* Start of a row in a packed lower triangle; row r has r + 1 entries. */
IFE_MATH size_t ife_packed_row(size_t row) {
    return row * (row + 1) / 2;
}

/*
 * Log-likelihood of one component from its squared distance.  Finite features with a NaN distance mean that
 * infinities cancelled on the way: an overflow, hence -INFINITY like any other.
 */
IFE_MATH float ife_component(float constant, float squared_distance) {
    return squared_distance < INFINITY ? constant - 0.5f * squared_distance : -INFINITY;
}

/* Partial log-sum-exp: max + log(sum).  Empty is {-INFINITY, 0}; one term t is {t, 1}. */
typedef struct {
    float max;
    float sum;
} ife_lse;

/*
 * Empty partials and terms of -INFINITY drop out before any subtraction: -INF - -INF would be NaN.
 * A NaN in either partial makes the result NaN.  One term alone stays exact: log(1) = 0.
 */
IFE_MATH ife_lse ife_lse_merge(ife_lse a, ife_lse b) {
    if (b.max == -INFINITY) return a;
    if (a.max == -INFINITY) return b;
    if (a.max >= b.max) {
        a.sum += b.sum * expf(b.max - a.max);
        return a;
    }
    b.sum += a.sum * expf(a.max - b.max);
    return b;
}

IFE_MATH float ife_lse_value(ife_lse lse) {
    return lse.max == -INFINITY ? -INFINITY : lse.max + logf(lse.sum);
}

#endif
