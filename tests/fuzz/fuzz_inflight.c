/*
 * libFuzzer over the C interface (csrc/inflight.h): any guard, features, logits and frame that a caller may hand over.
 *
 * The bytes choose a form and sizes; a generator seeded from them fills the arrays, then single places are poked with
 * values that break things: NaN, infinities, denormals, the largest floats, counts that do not fit.  Every array has
 * exactly the size that its contract says, on the heap, so that AddressSanitizer sees one element too many.
 */
#include "inflight.h"

#include <float.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPECT(condition)                                                          \
    do {                                                                           \
        if (!(condition)) {                                                        \
            fprintf(stderr, "line %d: expected %s\n", __LINE__, #condition);       \
            abort();                                                               \
        }                                                                          \
    } while (0)

typedef struct {
    const uint8_t *bytes;
    size_t left;
    uint64_t state;
} source;

static uint32_t take(source *from, size_t n) {
    uint32_t value = 0;
    for (size_t i = 0; i < n && from->left; ++i, --from->left) value = value << 8 | *from->bytes++;
    return value;
}

static uint32_t draw(source *from) {
    from->state = from->state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(from->state >> 33);
}

static float uniform(source *from, float low, float high) {
    return low + (high - low) * (float)(draw(from) & 0xffffff) / 16777216.0f;
}

/* One of the values that break arithmetic, or any 32 bits. */
static float awkward(source *from) {
    static const float values[] = {0.0f,     -0.0f,    1.0f,      -1.0f,    NAN,     INFINITY, -INFINITY, FLT_MAX,
                                   -FLT_MAX, FLT_MIN,  FLT_MIN / 2, 1e-45f, -1e-45f, 1e19f,    -1e19f,    1e-19f,
                                   1e38f,    -1e38f,   16777216.0f, 88.0f,  -104.0f, 255.0f,   0.5f,      1e6f};
    const uint32_t which = take(from, 1);
    if (which < sizeof values / sizeof *values) return values[which];
    const uint32_t bits = take(from, 4);
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static int32_t awkward_count(source *from) {
    static const int32_t values[] = {0, 1, -1, 2, INT32_MAX, INT32_MIN, IFE_MAX_FEATURES + 1, IFE_MAX_COMPONENTS + 1};
    return values[take(from, 1) % (sizeof values / sizeof *values)];
}

static float *filled(source *from, size_t n, float low, float high) {
    float *array = malloc(n * sizeof *array + (n == 0));
    EXPECT(array);
    for (size_t i = 0; i < n; ++i) array[i] = uniform(from, low, high);
    return array;
}

static void poke(source *from, float *array, size_t n) {
    for (uint32_t i = take(from, 1) % 4; n && i; --i) array[take(from, 3) % n] = awkward(from);
}

static bool finite_all(const float *array, size_t n) {
    for (size_t i = 0; i < n; ++i)
        if (!isfinite(array[i])) return false;
    return true;
}

static bool same_bits(const float *a, const float *b, size_t n) {
    return memcmp(a, b, n * sizeof *a) == 0;
}

static void check_verdict(ife_status status, const ife_verdict *verdict) {
    if (status != IFE_OK || isnan(verdict->margin)) EXPECT(verdict->decision == IFE_VERDICT_INVALID);
    if (verdict->decision == IFE_VERDICT_ACCEPT) EXPECT(verdict->margin < 0.0 && verdict->source == -1);
    if (verdict->decision == IFE_VERDICT_TRIGGER) EXPECT(verdict->margin >= 0.0);
    EXPECT(verdict->decision >= IFE_VERDICT_INVALID && verdict->decision <= IFE_VERDICT_TRIGGER);
}

static void use_scorer(source *from, const ife_guard *guard, int32_t target, const int32_t *classes, const char *set,
                       const float *features, size_t frames) {
    ife_scorer *scorer = (ife_scorer *)&target;
    const ife_status made = ife_scorer_create(guard, classes, target, set, &scorer);
    const bool valid = ife_guard_check(guard) == IFE_OK && target >= 0 && target < guard->n_rows && classes;
    EXPECT((made == IFE_OK) == valid && (made == IFE_OK) == (scorer != NULL));
    if (!scorer) return;
    const size_t n = (size_t)guard->n_features, rows = (size_t)guard->n_rows;
    float *alone = filled(from, rows, 0, 1), *batch = filled(from, frames * rows, 0, 1);
    bool all = true;
    const ife_status status = ife_score_batch(scorer, features, frames, batch);
    for (size_t f = 0; f < frames; ++f) {
        const bool finite = finite_all(features + f * n, n);
        all = all && finite;
        EXPECT(ife_score(scorer, features + f * n, alone) == (finite ? IFE_OK : IFE_NONFINITE));
        EXPECT(same_bits(alone, batch + f * rows, rows) || !finite);
        float best = -INFINITY;
        for (size_t r = 0; r < rows; ++r) {
            EXPECT(finite ? alone[r] < INFINITY : isnan(alone[r]));
            if ((int32_t)r != target && alone[r] > best) best = alone[r];
        }
        ife_verdict verdict;
        memset(&verdict, 0xff, sizeof verdict);
        const ife_status judged = ife_judge(scorer, features + f * n, &verdict);
        EXPECT(judged == (finite ? IFE_OK : IFE_NONFINITE));
        check_verdict(judged, &verdict);
        const double margin = (double)best - (double)alone[target];
        if (finite && guard->kind != IFE_SHARED) /* shared: judged in a subspace, to within its stated error */
            EXPECT(verdict.margin == margin || (isnan(verdict.margin) && isnan(margin)));
    }
    EXPECT(status == (all ? IFE_OK : IFE_NONFINITE));
    ife_scorer_destroy(scorer);
    free(alone), free(batch);
}

static void fuzz_scorer(source *from) {
    const uint32_t fault = take(from, 1) % 32;
    const int32_t kind = (int32_t)(take(from, 1) % 3);
    static const size_t sizes[] = {1, 2, 15, 16, 17, 31, 33, 64, 100, 208};
    const size_t chosen = sizes[take(from, 1) % (sizeof sizes / sizeof *sizes)];
    const size_t n = kind == IFE_FULL && chosen > 64 ? 64 : chosen;
    /* Now and then enough components for the 8-bit codes: half a megabyte of parameters. */
    const bool many = kind != IFE_FULL && take(from, 1) % 16 == 1;
    const size_t rows = many ? 330 + take(from, 1) : 1 + take(from, 1) % 9;
    const size_t m = rows + (many ? 0 : take(from, 1) % 7), triangle = n * (n + 1) / 2;
    const size_t whitener = kind == IFE_DIAGONAL ? m * n : kind == IFE_FULL ? m * triangle : triangle;
    const size_t frames = take(from, 1) % 6;
    int32_t *offsets = malloc((rows + 1) * sizeof *offsets), *classes = malloc(rows * sizeof *classes);
    for (size_t r = 0; r <= rows; ++r) offsets[r] = (int32_t)(r * m / rows);
    for (size_t r = 0; r < rows; ++r) classes[r] = (int32_t)(3 * r);
    float *mean = filled(from, n, -1, 1), *scale = filled(from, n, 0.5f, 2), *origin = filled(from, n, -1, 1);
    float *centres = filled(from, m * n, -1, 1), *constants = filled(from, m, -9, 1);
    float *matrix = filled(from, whitener, take(from, 1) % 2 ? -1.0f : 0.01f, 1);
    float *features = filled(from, frames * n, -3, 3);
    poke(from, mean, n), poke(from, scale, n), poke(from, origin, n), poke(from, centres, m * n);
    poke(from, constants, m), poke(from, matrix, whitener), poke(from, features, frames * n);
    if (frames && take(from, 1) % 4 == 0) memcpy(features, mean, n * sizeof *mean);
    ife_guard guard = {kind, (int32_t)n, (int32_t)rows, (int32_t)m, offsets, mean, scale,
                       kind == IFE_SHARED ? origin : NULL, centres, matrix, constants};
    int32_t target = (int32_t)(take(from, 1) % rows);
    const int32_t *given = classes;
    /* What breaks the contract, and must be refused before an array is read beyond its end. */
    switch (fault) {
        case 1: guard.kind = awkward_count(from); break;
        case 2: guard.n_features = awkward_count(from); break;
        case 3: guard.n_rows = awkward_count(from); break;
        case 4: guard.n_components = awkward_count(from); break;
        case 5: target = awkward_count(from); break;
        case 6: offsets[take(from, 2) % (rows + 1)] = take(from, 1) % 2 ? awkward_count(from) : (int32_t)take(from, 4); break;
        case 7: guard.origin = guard.origin ? NULL : origin; break;
        case 8: given = NULL; break;
        case 9: guard.offsets = NULL; break;
        case 10: guard.mean = NULL; break;
        case 11: guard.scale = NULL; break;
        case 12: guard.centres = NULL; break;
        case 13: guard.whitener = NULL; break;
        case 14: guard.constants = NULL; break;
        default: break;
    }
    /* Smaller counts than the arrays have are a guard like any other; larger ones would be the caller's lie. */
    const bool honest = guard.n_features <= (int32_t)n || guard.n_features > IFE_MAX_FEATURES;
    const bool counted = guard.n_components <= (int32_t)m || guard.n_components > IFE_MAX_COMPONENTS;
    const bool rowed = guard.n_rows <= (int32_t)rows || guard.n_rows > guard.n_components;
    const bool formed = guard.kind == kind || guard.kind < 0 || guard.kind > IFE_FULL;
    if (honest && counted && rowed && formed) {
        const char *set = NULL;
        for (int32_t i = 0; (set = ife_instruction_set(i)); ++i)
            use_scorer(from, &guard, target, given, set, features, frames);
        use_scorer(from, &guard, target, given, NULL, features, frames);
        EXPECT(ife_instruction_set(-1) == NULL);
    }
    free(offsets), free(classes), free(mean), free(scale), free(origin), free(centres), free(constants);
    free(matrix), free(features);
}

static void fuzz_preprocess(source *from) {
    const uint32_t fault = take(from, 1) % 16;
    const int32_t pixels = (int32_t)(take(from, 1) % 4);
    const size_t height = 1 + take(from, 1) % 40, width = 1 + take(from, 1) % 40, padding = take(from, 1) % 5;
    const size_t bytes = pixels == IFE_RGB || pixels == IFE_BGR ? 3 : 1, stride = bytes * width + padding;
    const size_t lines = pixels == IFE_NV12 ? height + height / 2 : height;
    /* The padding behind the last row is not the frame's. */
    uint8_t *samples = malloc(lines * stride - padding);
    for (size_t i = 0; i < lines * stride - padding; ++i) samples[i] = (uint8_t)draw(from);
    ife_image image = {pixels, (int32_t)height, (int32_t)width, (int32_t)(take(from, 1) % 2), (int32_t)(take(from, 1) % 2),
                       stride, samples, NULL};
    if (pixels == IFE_NV12 && take(from, 1) % 8) image.chroma = samples + height * stride;
    ife_input input = {take(from, 1) % 2 ? 3 : 1, (int32_t)(1 + take(from, 1) % 50), (int32_t)(1 + take(from, 1) % 50),
                       1.0f, {0.5f, 0.25f, 0.125f}, {1, 2, 3}};
    const bool plain = take(from, 1) % 2;
    if (!plain) {
        input.scale = awkward(from);
        for (size_t c = 0; c < 3; ++c) input.mean[c] = awkward(from), input.deviation[c] = awkward(from);
    }
    const size_t n = (size_t)input.channels * (size_t)input.height * (size_t)input.width;
    switch (fault) {
        case 1: image.pixels = awkward_count(from); break;
        case 2: input.channels = 2; break;
        case 3: image.samples = NULL; break;
        case 4: image.stride = take(from, 1) % (bytes * width); break;
        case 5: image.height = -image.height; break;
        case 6: image.width = INT32_MIN; break;
        case 7: input.height = 0; break;
        case 8: input.width = INT32_MIN; break;
        default: break;
    }
    if (image.pixels != pixels && image.pixels >= IFE_GREY && image.pixels <= IFE_NV12) image.pixels = pixels;
    const size_t needed = ife_preprocess_scratch(&image, &input);
    float *scratch = malloc(needed * sizeof *scratch + 1), *tensor = malloc(n * sizeof *tensor + 1);
    const ife_status status = ife_preprocess(&image, &input, scratch, tensor);
    EXPECT((status == IFE_OK) == (needed > 0) && (status == IFE_OK || status == IFE_INVALID));
    for (size_t i = 0; plain && status == IFE_OK && i < n; ++i) EXPECT(tensor[i] >= -1.0f && tensor[i] <= 256.0f);
    EXPECT(ife_preprocess(&image, &input, NULL, tensor) == IFE_INVALID);
    EXPECT(ife_preprocess(NULL, &input, scratch, tensor) == IFE_INVALID);
    EXPECT(ife_preprocess_scratch(&image, NULL) == 0);
    free(samples), free(scratch), free(tensor);
}

static void fuzz_predict(source *from) {
    const size_t n = take(from, 1) % 70;
    float *logits = filled(from, n, -5, 5);
    poke(from, logits, n);
    const int32_t got = ife_predict(logits, (int32_t)n);
    EXPECT(got >= -1 && got < (int32_t)n);
    EXPECT((got >= 0) == (n > 0 && finite_all(logits, n)));
    for (size_t c = 0; got >= 0 && c < n; ++c) EXPECT(logits[c] <= logits[got] && (logits[c] < logits[got] || (int32_t)c >= got));
    EXPECT(ife_predict(logits, -1) == -1 && ife_predict(NULL, 3) == -1);
    free(logits);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    source from = {data, size, 0};
    const uint32_t which = take(&from, 1) % 8;
    from.state = take(&from, 2);
    if (which == 0)
        fuzz_predict(&from);
    else if (which < 3)
        fuzz_preprocess(&from);
    else
        fuzz_scorer(&from);
    ife_scorer_destroy(NULL);
    return 0;
}
