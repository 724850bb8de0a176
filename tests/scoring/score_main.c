/* Runs the C scorer on exact-size heap arrays, for the sanitisers and for counting allocations.  Prints what failed. */
#include "inflight.h"
#include "score_math.h"

#include <stdio.h>
#include <stdlib.h>

#ifdef COUNT_ALLOCATIONS
static int allocations = 0;
void *__real_malloc(size_t size);
void *__real_calloc(size_t count, size_t size);
void *__real_realloc(void *old, size_t size);
void *__wrap_malloc(size_t size) {
    ++allocations;
    return __real_malloc(size);
}
void *__wrap_calloc(size_t count, size_t size) {
    ++allocations;
    return __real_calloc(count, size);
}
void *__wrap_realloc(void *old, size_t size) {
    ++allocations;
    return __real_realloc(old, size);
}
#endif

static int failures = 0;

#define EXPECT(condition)                                                        \
    do {                                                                         \
        if (!(condition)) {                                                      \
            printf("line %d: expected %s\n", __LINE__, #condition);              \
            ++failures;                                                          \
        }                                                                        \
    } while (0)

static uint32_t state = 1;

static float uniform(float low, float high) {
    state = state * 1664525u + 1013904223u;
    return low + (high - low) * (float)(state >> 8) / 16777216.0f;
}

static float *random_array(size_t n, float low, float high) {
    float *array = malloc(n * sizeof *array);
    for (size_t i = 0; i < n; ++i) array[i] = uniform(low, high);
    return array;
}

static double component_in_double(const ife_guard *guard, int32_t m, const float *features) {
    const size_t n = (size_t)guard->n_features;
    const float *centre = guard->centres + (size_t)m * n;
    const float *packed = guard->whitener + (guard->kind == IFE_FULL ? (size_t)m * ife_packed_row(n) : 0);
    double distance = 0.0;
    for (size_t row = 0; row < n; ++row) {
        double y = guard->kind == IFE_SHARED ? -centre[row] : 0.0;
        for (size_t d = guard->kind == IFE_DIAGONAL ? row : 0; d <= row; ++d) {
            const double z = ((double)features[d] - guard->mean[d]) / guard->scale[d];
            if (guard->kind == IFE_DIAGONAL) y = (z - centre[d]) * guard->whitener[(size_t)m * n + d];
            if (guard->kind == IFE_SHARED) y += packed[ife_packed_row(row) + d] * (z - guard->origin[d]);
            if (guard->kind == IFE_FULL) y += packed[ife_packed_row(row) + d] * (z - centre[d]);
        }
        distance += y * y;
    }
    return guard->constants[m] - 0.5 * distance;
}

static void check_guard(ife_kind kind, int32_t n_features) {
    enum { ROWS = 3, COMPONENTS = 6 };
    const size_t n = (size_t)n_features;
    const size_t size = kind == IFE_DIAGONAL ? COMPONENTS * n : ife_packed_row(n) * (kind == IFE_FULL ? COMPONENTS : 1);
    int32_t *offsets = malloc((ROWS + 1) * sizeof *offsets);
    memcpy(offsets, (int32_t[]){0, 1, 3, 6}, (ROWS + 1) * sizeof *offsets);
    float *mean = random_array(n, -1, 1), *scale = random_array(n, 0.5f, 2), *origin = random_array(n, -1, 1);
    float *centres = random_array(COMPONENTS * n, -1, 1), *whitener = random_array(size, -0.1f, 0.2f);
    float *constants = random_array(COMPONENTS, -3, 3), *features = random_array(n, -2, 2);
    float *out = random_array(ROWS, 0, 1);
    const ife_guard guard = {kind, n_features, ROWS, COMPONENTS, offsets, mean, scale,
                             kind == IFE_SHARED ? origin : NULL, centres, whitener, constants};
    EXPECT(ife_guard_check(&guard) == IFE_OK);
#ifdef COUNT_ALLOCATIONS
    EXPECT(allocations > 0); /* the arrays above: the counter works */
    allocations = 0;
#endif
    EXPECT(ife_score(&guard, features, out) == IFE_OK);
#ifdef COUNT_ALLOCATIONS
    EXPECT(allocations == 0);
#endif
    for (int32_t c = 0; c < ROWS; ++c) {
        double total = 0.0;
        double largest = -INFINITY;
        for (int32_t m = offsets[c]; m < offsets[c + 1]; ++m)
            largest = fmax(largest, component_in_double(&guard, m, features));
        for (int32_t m = offsets[c]; m < offsets[c + 1]; ++m)
            total += exp(component_in_double(&guard, m, features) - largest);
        const double expected = largest + log(total);
        EXPECT(fabs(out[c] - expected) <= 1e-5 * (10.0 + fabs(expected)));
    }
    features[n - 1] = NAN;
    EXPECT(ife_score(&guard, features, out) == IFE_NONFINITE);
    for (int32_t c = 0; c < ROWS; ++c) EXPECT(isnan(out[c]));

    ife_guard wrong = guard;
    wrong.n_features = IFE_MAX_FEATURES + 1;
    EXPECT(ife_guard_check(&wrong) == IFE_INVALID);
    EXPECT(ife_score(&wrong, features, out) == IFE_INVALID);
    wrong = guard;
    wrong.origin = kind == IFE_SHARED ? NULL : origin;
    EXPECT(ife_guard_check(&wrong) == IFE_INVALID);
    wrong = guard;
    wrong.kind = 3;
    EXPECT(ife_guard_check(&wrong) == IFE_INVALID);
    wrong = guard;
    wrong.whitener = NULL;
    EXPECT(ife_guard_check(&wrong) == IFE_INVALID);
    offsets[1] = 3;
    EXPECT(ife_guard_check(&guard) == IFE_INVALID);
    EXPECT(ife_guard_check(NULL) == IFE_INVALID);

    free(offsets), free(mean), free(scale), free(origin), free(centres), free(whitener), free(constants);
    free(features), free(out);
}

static void check_log_sum_exp(void) {
    const ife_lse empty = {-INFINITY, 0.0f}, one = {-1234.567f, 1.0f}, nan = {NAN, 1.0f}, far = {-5000.0f, 1.0f};
    EXPECT(ife_lse_value(empty) == -INFINITY);
    EXPECT(ife_lse_value(ife_lse_merge(empty, empty)) == -INFINITY);
    EXPECT(ife_lse_value(ife_lse_merge(empty, one)) == one.max);
    EXPECT(ife_lse_value(ife_lse_merge(one, empty)) == one.max);
    EXPECT(ife_lse_value(ife_lse_merge(one, far)) == one.max);
    EXPECT(ife_lse_value(ife_lse_merge(far, one)) == one.max);
    EXPECT(ife_lse_merge(one, one).sum == 2.0f);
    EXPECT(isnan(ife_lse_value(ife_lse_merge(nan, one))));
    EXPECT(isnan(ife_lse_value(ife_lse_merge(one, nan))));
    EXPECT(isnan(ife_lse_value(ife_lse_merge(nan, empty))));
    EXPECT(isnan(ife_lse_value(ife_lse_merge(empty, nan))));
    EXPECT(ife_component(1.0f, INFINITY) == -INFINITY);
    EXPECT(ife_component(1.0f, NAN) == -INFINITY);
    EXPECT(ife_component(1.0f, 4.0f) == -1.0f);
}

int main(void) {
    const int32_t sizes[] = {1, 15, 16, 17, 33, 129, 1040};
    for (int kind = IFE_DIAGONAL; kind <= IFE_FULL; ++kind)
        for (size_t i = 0; i < sizeof sizes / sizeof *sizes; ++i) check_guard((ife_kind)kind, sizes[i]);
    check_guard(IFE_DIAGONAL, IFE_MAX_FEATURES);
    check_log_sum_exp();
    return failures != 0;
}
