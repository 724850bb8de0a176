/* Runs the C scorer on exact-size heap arrays, for the sanitisers and for counting allocations.  Prints what failed. */
#include "score.h"
#include "score_math.h"
#include "random_arrays.h"

#include <stdio.h>
#include <stdlib.h>

#ifdef COUNT_ALLOCATIONS
static int allocations = 0;
void *__real_malloc(size_t size);
void *__real_calloc(size_t count, size_t size);
void *__real_realloc(void *old, size_t size);
void *__real_aligned_alloc(size_t alignment, size_t size);
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
void *__wrap_aligned_alloc(size_t alignment, size_t size) {
    ++allocations;
    return __real_aligned_alloc(alignment, size);
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

enum { ROWS = 3, COMPONENTS = 6, FRAMES = 9, TARGET = 1 };

static double row_in_double(const ife_guard *guard, int32_t c, const float *features) {
    double total = 0.0;
    double largest = -INFINITY;
    for (int32_t m = guard->offsets[c]; m < guard->offsets[c + 1]; ++m)
        largest = fmax(largest, component_in_double(guard, m, features));
    for (int32_t m = guard->offsets[c]; m < guard->offsets[c + 1]; ++m)
        total += exp(component_in_double(guard, m, features) - largest);
    return largest + log(total);
}

/* One frame, the verdict on it, a batch, and a batch with one frame that is not finite. */
static void check_scorer(const ife_scorer *scorer, const ife_guard *guard, float *features) {
    const size_t n = (size_t)guard->n_features;
    float *out = random_array(ROWS, 0, 1), *batch = random_array(FRAMES * ROWS, 0, 1);
    float *explained = random_array(ROWS, 0, 1);
    ife_verdict verdict, explanation;
#ifdef COUNT_ALLOCATIONS
    EXPECT(allocations > 0); /* the arrays above: the counter works */
    allocations = 0;
#endif
    EXPECT(ife_score(scorer, features, out) == IFE_OK);
    EXPECT(ife_judge(scorer, features, &verdict) == IFE_OK);
    EXPECT(ife_score_batch(scorer, features, FRAMES, batch) == IFE_OK);
    EXPECT(ife_explain(scorer, features, explained, &explanation) == IFE_OK);
#ifdef COUNT_ALLOCATIONS
    EXPECT(allocations == 0);
#endif
    EXPECT(memcmp(out, batch, ROWS * sizeof *out) == 0 && memcmp(out, explained, ROWS * sizeof *out) == 0);
    EXPECT(explanation.margin == fmax((double)out[0], (double)out[2]) - (double)out[TARGET]);
    EXPECT(explanation.n_scored == ROWS && explanation.n_rows == ROWS);
    for (size_t f = 0; f < FRAMES; ++f)
        for (int32_t c = 0; c < ROWS; ++c) {
            const double expected = row_in_double(guard, c, features + f * n);
            EXPECT(fabs(batch[f * ROWS + (size_t)c] - expected) <= 1e-5 * (10.0 + fabs(expected)));
        }
    const double best = fmax(out[0], out[2]), allowed = 1e-5 * (20.0 + fabs(best) + fabs(out[TARGET]));
    EXPECT(fabs(verdict.margin - (best - out[TARGET])) <= allowed);
    EXPECT(verdict.decision == (verdict.margin < 0.0 ? IFE_VERDICT_ACCEPT : IFE_VERDICT_TRIGGER));
    EXPECT(verdict.source == (verdict.margin < 0.0 ? -1 : out[0] >= out[2] ? 10 : 30));

    const float last = features[n - 1];
    features[n - 1] = NAN;
    EXPECT(ife_score(scorer, features, out) == IFE_NONFINITE);
    for (int32_t c = 0; c < ROWS; ++c) EXPECT(isnan(out[c]));
    EXPECT(ife_judge(scorer, features, &verdict) == IFE_NONFINITE);
    EXPECT(verdict.decision == IFE_VERDICT_INVALID && verdict.source == -1 && isnan(verdict.margin));
    EXPECT(ife_explain(scorer, features, explained, &explanation) == IFE_NONFINITE);
    EXPECT(explanation.decision == IFE_VERDICT_INVALID && explanation.source == -1 && isnan(explanation.margin));
    for (int32_t c = 0; c < ROWS; ++c) EXPECT(isnan(explained[c]));
    float *again = random_array(FRAMES * ROWS, 0, 1);
    EXPECT(ife_score_batch(scorer, features, FRAMES, again) == IFE_NONFINITE);
    EXPECT(isnan(again[0]));
    EXPECT(memcmp(again + ROWS, batch + ROWS, (FRAMES - 1) * ROWS * sizeof *batch) == 0);
    features[n - 1] = last;
    free(out), free(batch), free(again), free(explained);
}

static void check_refusals(ife_guard guard, float *origin, int32_t *offsets) {
    const int32_t classes[ROWS] = {10, 20, 30};
    ife_scorer *scorer = (ife_scorer *)&guard;
    EXPECT(ife_scorer_create(&guard, classes, ROWS, NULL, &scorer) == IFE_INVALID && scorer == NULL);
    EXPECT(ife_scorer_create(&guard, NULL, 0, NULL, &scorer) == IFE_INVALID);
    EXPECT(ife_scorer_create(&guard, classes, 0, "mmx", &scorer) == IFE_UNSUPPORTED && scorer == NULL);
    EXPECT(ife_scorer_create(&guard, classes, 0, NULL, NULL) == IFE_INVALID);
    ife_scorer_destroy(NULL);
    ife_guard wrong = guard;
    wrong.n_features = IFE_MAX_FEATURES + 1;
    EXPECT(ife_guard_check(&wrong) == IFE_INVALID);
    wrong = guard;
    wrong.n_components = IFE_MAX_COMPONENTS + 1; /* before an array of that size is read */
    EXPECT(ife_guard_check(&wrong) == IFE_INVALID);
    wrong = guard;
    wrong.origin = guard.kind == IFE_SHARED ? NULL : origin;
    EXPECT(ife_guard_check(&wrong) == IFE_INVALID);
    wrong = guard;
    wrong.kind = 3;
    EXPECT(ife_guard_check(&wrong) == IFE_INVALID);
    wrong = guard;
    wrong.whitener = NULL;
    EXPECT(ife_guard_check(&wrong) == IFE_INVALID);
    const float bad[ROWS * 2] = {0.0f, NAN};
    wrong = guard;
    wrong.constants = bad;
    EXPECT(ife_guard_check(&wrong) == IFE_INVALID);
    const float zero[1] = {0.0f};
    wrong = guard;
    wrong.scale = zero;
    if (guard.n_features == 1) EXPECT(ife_guard_check(&wrong) == IFE_INVALID);
    offsets[1] = 3;
    EXPECT(ife_guard_check(&guard) == IFE_INVALID);
    EXPECT(ife_guard_check(NULL) == IFE_INVALID);
    offsets[1] = 1;
}

static void check_guard(ife_kind kind, int32_t n_features) {
    const size_t n = (size_t)n_features;
    const size_t size = kind == IFE_DIAGONAL ? COMPONENTS * n : ife_packed_row(n) * (kind == IFE_FULL ? COMPONENTS : 1);
    const int32_t classes[ROWS] = {10, 20, 30};
    int32_t *offsets = malloc((ROWS + 1) * sizeof *offsets);
    memcpy(offsets, (int32_t[]){0, 1, 3, 6}, (ROWS + 1) * sizeof *offsets);
    float *mean = random_array(n, -1, 1), *scale = random_array(n, 0.5f, 2), *origin = random_array(n, -1, 1);
    float *centres = random_array(COMPONENTS * n, -1, 1), *whitener = random_array(size, -0.1f, 0.2f);
    float *constants = random_array(COMPONENTS, -3, 3), *features = random_array(FRAMES * n, -2, 2);
    const ife_guard guard = {kind, n_features, ROWS, COMPONENTS, offsets, mean, scale,
                             kind == IFE_SHARED ? origin : NULL, centres, whitener, constants};
    EXPECT(ife_guard_check(&guard) == IFE_OK);
    for (int32_t i = 0; ife_instruction_set(i); ++i) {
        ife_scorer *scorer;
        EXPECT(ife_scorer_create(&guard, classes, TARGET, ife_instruction_set(i), &scorer) == IFE_OK);
        check_scorer(scorer, &guard, features);
        ife_scorer_destroy(scorer);
    }
    check_refusals(guard, origin, offsets);
    free(offsets), free(mean), free(scale), free(origin), free(centres), free(whitener), free(constants);
    free(features);
}

/* Enough rows for codes; a number of features beside the blocks.  The verdict equals the log-likelihoods' own. */
static void check_many_rows(ife_kind kind, int32_t n_features) {
    enum { MANY = 701 };
    const size_t n = (size_t)n_features, size = kind == IFE_DIAGONAL ? MANY * n : ife_packed_row(n);
    int32_t *offsets = malloc((MANY + 1) * sizeof *offsets), *classes = malloc(MANY * sizeof *classes);
    for (int32_t i = 0; i <= MANY; ++i) offsets[i] = i;
    for (int32_t i = 0; i < MANY; ++i) classes[i] = 2 * i;
    float *mean = random_array(n, -1, 1), *scale = random_array(n, 0.5f, 2), *origin = random_array(n, -1, 1);
    float *centres = random_array(MANY * n, -1, 1), *whitener = random_array(size, 0.01f, 0.3f);
    float *constants = random_array(MANY, -3, 3), *features = random_array(FRAMES * n, -2, 2);
    float *out = malloc(MANY * sizeof *out);
    const ife_guard guard = {kind, n_features, MANY, MANY, offsets, mean, scale,
                             kind == IFE_SHARED ? origin : NULL, centres, whitener, constants};
    for (int32_t i = 0; ife_instruction_set(i); ++i) {
        ife_scorer *scorer;
        EXPECT(ife_scorer_create(&guard, classes, 5, ife_instruction_set(i), &scorer) == IFE_OK);
        EXPECT((scorer->codes != NULL) == scorer->kernels->reads_codes);
        for (size_t f = 0; f < FRAMES; ++f) {
            ife_verdict verdict;
            EXPECT(ife_judge(scorer, features + f * n, &verdict) == IFE_OK);
            EXPECT(ife_score(scorer, features + f * n, out) == IFE_OK);
            float best = -INFINITY;
            for (int32_t r = 0; r < MANY; ++r) best = r != 5 && out[r] > best ? out[r] : best;
            EXPECT(verdict.margin == (double)best - (double)out[5]);
        }
        ife_scorer_destroy(scorer);
    }
    free(offsets), free(classes), free(mean), free(scale), free(origin), free(centres), free(whitener);
    free(constants), free(features), free(out);
}

/* The bounds stated in score.h, over the whole range. */
static void check_exp_and_log(const ife_kernels *kernels) {
    enum { N = 16 };
    double exp_error = 0.0, log_error = 0.0;
    for (int i = 0; i <= 87 * 512; ++i) {
        float x[N] = {-(float)i / 512.0f, -INFINITY, -1e30f, -87.5f}, y[N];
        for (int j = 0; j < N; ++j) y[j] = 1.0f + (float)(i * 3) * (j == 1 ? 1e-7f : 1.0f);
        const double truth = exp((double)x[0]), logarithms[2] = {log((double)y[0]), log((double)y[1])};
        kernels->exponentials(x, N);
        kernels->logarithms(y, N);
        exp_error = fmax(exp_error, fabs(x[0] / truth - 1.0));
        for (int j = 0; j < 2; ++j)
            log_error = fmax(log_error, fabs(y[j] - logarithms[j]) / fmax(logarithms[j], 1e-3));
        EXPECT(x[1] == 0.0f && x[2] == 0.0f && x[3] == 0.0f);
        if (i == 0) EXPECT(x[0] == 1.0f && y[0] == 0.0f);
        if (failures) break;
    }
    EXPECT(exp_error < 2e-7);
    EXPECT(log_error < 2e-7);
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

/* Every layout, up and down, on arrays of exact size. */
static void check_preprocess(void) {
    const int32_t sizes[][4] = {{2, 2, 1, 1}, {2, 4, 5, 7}, {6, 8, 6, 8}, {30, 26, 7, 5}, {2, 2, 9, 30}};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; ++i)
        for (int pixels = IFE_GREY; pixels <= IFE_NV12; ++pixels)
            for (int32_t channels = 1; channels <= 3; channels += 2) {
                const size_t height = (size_t)sizes[i][0], width = (size_t)sizes[i][1];
                const size_t bytes = pixels == IFE_RGB || pixels == IFE_BGR ? 3 : 1;
                const size_t size = bytes * width * (pixels == IFE_NV12 ? height * 3 / 2 : height);
                const size_t n = (size_t)(channels * sizes[i][2] * sizes[i][3]);
                uint8_t *samples = malloc(size);
                for (size_t j = 0; j < size; ++j) samples[j] = (uint8_t)uniform(0, 256);
                ife_image image = {pixels, sizes[i][0], sizes[i][1], 0, 0, bytes * width, samples, NULL};
                if (pixels == IFE_NV12) image.chroma = samples + height * width;
                const ife_input input = {channels, sizes[i][2], sizes[i][3], 1.0f, {0}, {1, 1, 1}};
                const size_t needed = ife_preprocess_scratch(&image, &input);
                EXPECT(needed > 0);
                float *scratch = malloc(needed * sizeof *scratch), *tensor = malloc(n * sizeof *tensor);
                EXPECT(ife_preprocess(&image, &input, scratch, tensor) == IFE_OK);
                for (size_t j = 0; j < n; ++j) EXPECT(tensor[j] >= -1e-3f && tensor[j] <= 255.001f);
                image.stride = 1;
                EXPECT(ife_preprocess_scratch(&image, &input) == 0);
                EXPECT(ife_preprocess(&image, &input, scratch, tensor) == IFE_INVALID);
                free(samples), free(scratch), free(tensor);
            }
}

/* Arrays of exact size: the prediction reads n logits and no more. */
static void check_predict(void) {
    for (int32_t n = 1; n <= 70; ++n) {
        float *logits = random_array((size_t)n, -5, 5);
        logits[n / 2] = 9.0f;
        EXPECT(ife_predict(logits, n) == n / 2);
        logits[n - 1] = 9.0f;
        EXPECT(ife_predict(logits, n) == n / 2); /* the lowest of equals */
        logits[n - 1] = n % 2 ? NAN : -INFINITY;
        EXPECT(ife_predict(logits, n) == -1);
        free(logits);
    }
    EXPECT(ife_predict(NULL, 3) == -1 && ife_predict((float[]){1.0f}, 0) == -1);
    EXPECT(ife_predict((float[]){1.0f}, -5) == -1);
}

int main(void) {
    const int32_t sizes[] = {1, 15, 16, 17, 33, 129, 1040};
    for (int kind = IFE_DIAGONAL; kind <= IFE_FULL; ++kind)
        for (size_t i = 0; i < sizeof sizes / sizeof *sizes; ++i) check_guard((ife_kind)kind, sizes[i]);
    check_guard(IFE_DIAGONAL, IFE_MAX_FEATURES);
    check_log_sum_exp();
    check_preprocess();
    check_predict();
    check_many_rows(IFE_DIAGONAL, 200);
    check_many_rows(IFE_SHARED, 203);
    check_exp_and_log(&ife_kernels_portable);
#ifdef IFE_X86
    if (__builtin_cpu_supports("avx2")) check_exp_and_log(&ife_kernels_avx2);
    if (__builtin_cpu_supports("avx512f")) check_exp_and_log(&ife_kernels_avx512);
#endif
#ifdef __aarch64__
    check_exp_and_log(&ife_kernels_neon);
#endif
    return failures != 0;
}
