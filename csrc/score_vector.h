/*
 * The scorer's loops over a vector type: included once by each instruction set's file, which defines before
 *
 * vec, WIDTH     float vector and its lanes;  vec_load, vec_store (unaligned), vec_set, vec_add, vec_sub, vec_mul
 * vec_fma        a * b + c;  vec_fnma: c - a * b;  vec_max
 * vec_sum        horizontal;  vec_sum4: of four vectors, to four floats, each bit for bit what vec_sum gives
 * vec_round      to the nearest integer;  vec_power: 2^n, n integral in -126..127
 * vec_split      x > 0 as mantissa in [2/3, 4/3) and exponent
 * vec_bytes, vec_code  float vectors from bytes: their values, and base + (byte << shift) as the bits of a float
 * vec_standardise  ife_standardise_pair of each lane

 * FRAMES, COMPONENTS  the same for a batch: FRAMES (4) x COMPONENTS partial sums stay in registers
 * PANEL_FRAMES, PHASES  frames per pass over a panel, and interleaved partial sums of each
 *
 * The order of the additions of one frame's score depends on none of them but WIDTH and PHASES: a batch scores each
 * frame as it would be alone, bit for bit.
 */
#include "score.h"
#include "score_math.h"

#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define SEPARATE static __attribute__((noinline)) /* its own registers: inlined side by side, gcc 12 spills the sums */
#define UNROLLED _Pragma("GCC unroll 16")
#define UNROLL (IFE_LANES / WIDTH)
/* Features summed in float before the sum goes to a double: 64 additions a lane, relative error below 4e-6. */
#define BLOCK 1024
/* Columns of a panel summed in one register, before the sum goes to another: 32 + D / (32 PHASES) additions in all. */
#define COLUMNS (32 * PHASES)
/* Components whose distances wait for their log-sum-exp. */
#define CHUNK 64
/* Frames that share a pass over the parameters. */
#define MAX_FRAMES 24
/* Floats of each of two buffers on the stack. */
#define SCRATCH IFE_MAX_FEATURES

INLINE vec unrolled_sum(const vec *lanes) {
    vec sum = lanes[0];
    UNROLLED for (int u = 1; u < UNROLL; ++u) sum = vec_add(sum, lanes[u]);
    return sum;
}

INLINE float lane_sum(const vec *lanes) {
    return vec_sum(unrolled_sum(lanes));
}

/*
 * z of the features start .. end - 1 (end - start a multiple of IFE_LANES, padded with 0): high and low, or, with a
 * centre, high = z - centre alone.  False when a feature is not finite: 0 x is then NaN.
 */
INLINE bool standardise(const ife_scorer *scorer, const float *features, size_t start, size_t end, const float *centre,
                        float *high, float *low) {
    const size_t n = (size_t)scorer->n_features;
    const vec zero = vec_set(0.0f);
    vec poison = zero;
    ife_count_bytes((centre ? 4 : 3) * (end - start) * sizeof *scorer->mean);
    for (size_t d = start; d < end; d += IFE_LANES) {
        float tail[IFE_LANES] = {0.0f};
        const float *block = features + d;
        if (d + IFE_LANES > n) {
            for (size_t l = 0; d + l < n; ++l) tail[l] = features[d + l];
            block = tail;
        }
        UNROLLED for (int u = 0; u < UNROLL; ++u) {
            const size_t at = d + (size_t)u * WIDTH;
            const vec x = vec_load(block + u * WIDTH);
            vec z_low;
            const vec z = vec_standardise(x, vec_load(scorer->mean + at), vec_load(scorer->scale + at),
                                          vec_load(scorer->inverse_scale + at), &z_low);
            poison = vec_fma(x, zero, poison);
            if (centre) {
                vec_store(high + at - start, vec_add(vec_sub(z, vec_load(centre + at)), z_low));
            } else {
                vec_store(high + at - start, z);
                vec_store(low + at - start, z_low);
            }
        }
    }
    return vec_sum(poison) == 0.0f;
}

INLINE double squared_norm(const float *vector, size_t n) {
    vec sums[UNROLL];
    UNROLLED for (int u = 0; u < UNROLL; ++u) sums[u] = vec_set(0.0f);
    for (size_t d = 0; d < n; d += IFE_LANES)
        UNROLLED for (int u = 0; u < UNROLL; ++u) {
            const vec x = vec_load(vector + d + u * WIDTH);
            sums[u] = vec_fma(x, x, sums[u]);
        }
    return (double)lane_sum(sums);
}

/* exp: Cody-Waite reduction by log 2, polynomial of Cephes' expf. */
static void exponentials(float *x, size_t n) {
    for (size_t i = 0; i < n; i += WIDTH) {
        const vec original = vec_load(x + i);
        const vec t = vec_max(original, vec_set(-87.0f));
        const vec power = vec_round(vec_mul(t, vec_set(1.44269504f)));
        vec r = vec_fnma(power, vec_set(0.693359375f), t);
        r = vec_fnma(power, vec_set(-2.12194440e-4f), r);
        vec p = vec_fma(vec_set(1.9875691500e-4f), r, vec_set(1.3981999507e-3f));
        p = vec_fma(p, r, vec_set(8.3334519073e-3f));
        p = vec_fma(p, r, vec_set(4.1665795894e-2f));
        p = vec_fma(p, r, vec_set(1.6666665459e-1f));
        p = vec_fma(p, r, vec_set(5.0000001201e-1f));
        p = vec_add(vec_fma(vec_mul(p, r), r, r), vec_set(1.0f));
        vec_store(x + i, vec_zero_below(original, -87.0f, vec_mul(p, vec_power(power))));
    }
}

/* log: x = m 2^e; log(1 + f) = f - f^2 / 2 + f^3 q(f), q fitted on [-1/3, 1/3] with relative error 5e-9. */
static void logarithms(float *x, size_t n) {
    static const float q[] = {0.139913127f,  -0.121829443f, 0.140045926f,  -0.166805714f,
                              0.200104758f, -0.249997959f, 0.333332151f};
    for (size_t i = 0; i < n; i += WIDTH) {
        vec exponent;
        const vec f = vec_sub(vec_split(vec_load(x + i), &exponent), vec_set(1.0f));
        vec p = vec_set(-0.128980726f);
        UNROLLED for (int j = 0; j < 7; ++j) p = vec_fma(p, f, vec_set(q[j]));
        const vec square = vec_mul(f, f);
        p = vec_fma(vec_mul(square, f), p, vec_mul(exponent, vec_set(-2.12194440e-4f)));
        p = vec_add(f, vec_fnma(square, vec_set(0.5f), p));
        vec_store(x + i, vec_fma(exponent, vec_set(0.693359375f), p));
    }
}

/*
 * Row values from the log-likelihoods of the components first .. end - 1 (at most CHUNK; values is overwritten).
 * open: partial sum of the row that the last call left unfinished.  Writes out[0] for `row`, and so on; returns the
 * first row not finished.
 */
static int32_t close_rows(const ife_scorer *scorer, float *values, int32_t first, int32_t end, int32_t row,
                          ife_lse *open, float *out) {
    float largest[CHUNK];
    float sums[CHUNK];
    int32_t r = row;
    for (int32_t k = first; k < end; ++r) {
        const int32_t stop = scorer->offsets[r + 1] < end ? scorer->offsets[r + 1] : end;
        float most = -INFINITY;
        for (int32_t j = k; j < stop; ++j) most = values[j - first] > most ? values[j - first] : most;
        for (int32_t j = k; j < stop; ++j)
            values[j - first] = values[j - first] == -INFINITY ? -INFINITY : values[j - first] - most;
        largest[r - row] = most;
        k = stop;
    }
    exponentials(values, ife_padded((size_t)(end - first)));
    r = row;
    for (int32_t k = first; k < end;) {
        const int32_t stop = scorer->offsets[r + 1] < end ? scorer->offsets[r + 1] : end;
        ife_lse partial = {largest[r - row], 0.0f};
        for (int32_t j = k; j < stop; ++j) partial.sum += values[j - first];
        *open = ife_lse_merge(*open, partial);
        k = stop;
        if (stop < scorer->offsets[r + 1]) break;
        largest[r - row] = open->max;
        sums[r - row] = open->max == -INFINITY ? 1.0f : open->sum;
        *open = (ife_lse){-INFINITY, 0.0f};
        ++r;
    }
    for (size_t i = (size_t)(r - row); i < ife_padded((size_t)(r - row)); ++i) sums[i] = 1.0f;
    logarithms(sums, ife_padded((size_t)(r - row)));
    for (int32_t i = 0; i < r - row; ++i) out[i] = largest[i] + sums[i];
    return r;
}
