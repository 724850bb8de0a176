/* The scorer in portable C: loops that gcc -O3 vectorises without -ffast-math. */
#include "inflight.h"
#include "score_math.h"

#include <stdbool.h>

/* Independent accumulators: one AVX-512, two AVX or four SSE/NEON registers. */
#define LANES 16
/* Features summed in float before the sum goes to a double: 64 additions a lane, relative error below 4e-6. */
#define BLOCK 1024

static float lane_sum(const float lanes[LANES]) {
    float half[LANES / 2];
    for (int l = 0; l < LANES / 2; ++l) half[l] = lanes[l] + lanes[l + LANES / 2];
    return ((half[0] + half[4]) + (half[2] + half[6])) + ((half[1] + half[5]) + (half[3] + half[7]));
}

/* Body of a function that returns the sum of TERM over the features d = 0 .. n - 1. */
#define SUM_OVER_FEATURES(n, TERM)                                         \
    double total = 0.0;                                                    \
    for (size_t start = 0; start < (n); start += BLOCK) {                  \
        const size_t end = (n) - start < BLOCK ? (n) : start + BLOCK;      \
        const size_t whole = end - (end - start) % LANES;                  \
        float lanes[LANES] = {0.0f};                                       \
        for (size_t first = start; first < whole; first += LANES)          \
            for (size_t l = 0; l < LANES; ++l) {                           \
                const size_t d = first + l;                                \
                lanes[l] += TERM;                                          \
            }                                                              \
        float rest = 0.0f;                                                 \
        for (size_t d = whole; d < end; ++d) rest += TERM;                 \
        total += lane_sum(lanes) + rest;                                   \
    }                                                                      \
    return (float)total

static float dot(const float *a, const float *b, size_t n) {
    SUM_OVER_FEATURES(n, a[d] * b[d]);
}

static float diagonal_distance(const float *z, const float *mean, const float *inverse_deviation, size_t n) {
    SUM_OVER_FEATURES(n, ife_diagonal_term(z[d], mean[d], inverse_deviation[d]));
}

static float squared_distance(const float *y, const float *centre, size_t n) {
    SUM_OVER_FEATURES(n, ife_distance_term(y[d], centre[d]));
}

/* z = standardised features; false when a feature is not finite. */
static bool standardise(const ife_guard *guard, const float *features, float *z) {
    const size_t n = (size_t)guard->n_features;
    uint32_t largest = 0;
    for (size_t d = 0; d < n; ++d) {
        const uint32_t bits = ife_magnitude_bits(features[d]);
        largest = bits > largest ? bits : largest;
        z[d] = ife_standardise(features[d], guard->mean[d], guard->scale[d]);
    }
    return largest < IFE_NONFINITE_BITS;
}

static void subtract(const float *a, const float *b, size_t n, float *difference) {
    for (size_t d = 0; d < n; ++d) difference[d] = a[d] - b[d];
}

static void whiten(const float *packed, const float *centred, size_t n, float *y) {
    for (size_t row = 0; row < n; ++row) y[row] = dot(packed + ife_packed_row(row), centred, row + 1);
}

static float whitened_norm(const float *packed, const float *centred, size_t n) {
    double total = 0.0;
    for (size_t row = 0; row < n; ++row) {
        const double y = dot(packed + ife_packed_row(row), centred, row + 1);
        total += y * y;
    }
    return (float)total;
}

ife_status ife_guard_check(const ife_guard *guard) {
    if (!guard || guard->kind < IFE_DIAGONAL || guard->kind > IFE_FULL) return IFE_INVALID;
    if (guard->n_features < 1 || guard->n_features > IFE_MAX_FEATURES) return IFE_INVALID;
    if (guard->n_rows < 1 || guard->n_components < guard->n_rows) return IFE_INVALID;
    if (!guard->offsets || !guard->mean || !guard->scale || !guard->centres || !guard->whitener || !guard->constants)
        return IFE_INVALID;
    if ((guard->kind == IFE_SHARED) != (guard->origin != NULL)) return IFE_INVALID;
    if (guard->offsets[0] != 0 || guard->offsets[guard->n_rows] != guard->n_components) return IFE_INVALID;
    for (int32_t c = 0; c < guard->n_rows; ++c)
        if (guard->offsets[c] >= guard->offsets[c + 1]) return IFE_INVALID;
    return IFE_OK;
}

ife_status ife_score(const ife_guard *guard, const float *features, float *log_likelihoods) {
    float z[IFE_MAX_FEATURES];
    float y[IFE_MAX_FEATURES];
    const size_t n = (size_t)guard->n_features;
    /* The one check that stays in the hot path: past this bound the stack would be overwritten. */
    if (guard->n_features < 1 || guard->n_features > IFE_MAX_FEATURES) return IFE_INVALID;
    if (!standardise(guard, features, z)) {
        for (int32_t c = 0; c < guard->n_rows; ++c) log_likelihoods[c] = NAN;
        return IFE_NONFINITE;
    }
    if (guard->kind == IFE_SHARED) {
        subtract(z, guard->origin, n, z);
        whiten(guard->whitener, z, n, y);
    }
    for (int32_t c = 0; c < guard->n_rows; ++c) {
        ife_lse row = {-INFINITY, 0.0f};
        for (int32_t k = guard->offsets[c]; k < guard->offsets[c + 1]; ++k) {
            const float *centre = guard->centres + (size_t)k * n;
            float distance;
            if (guard->kind == IFE_DIAGONAL) {
                distance = diagonal_distance(z, centre, guard->whitener + (size_t)k * n, n);
            } else if (guard->kind == IFE_SHARED) {
                distance = squared_distance(y, centre, n);
            } else {
                subtract(z, centre, n, y);
                distance = whitened_norm(guard->whitener + (size_t)k * ife_packed_row(n), y, n);
            }
            const ife_lse component = {ife_component(guard->constants[k], distance), 1.0f};
            row = ife_lse_merge(row, component);
        }
        log_likelihoods[c] = ife_lse_value(row);
    }
    return IFE_OK;
}
