/* Several threads score, judge and preprocess through one guard and one frame, for ThreadSanitizer.  Prints what failed. */
#include "inflight.h"
#include "random_arrays.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { THREADS = 4, ROUNDS = 40, FEATURES = 37, FRAMES = 3, MANY = 2000, SIDE = 12 };

typedef struct {
    const ife_scorer *scorer;
    size_t rows;
    const float *features;
    const float *expected;
    ife_verdict verdict;
    const ife_image *image;
    int failures;
} job;

static void *work(void *argument) {
    job *mine = argument;
    float *out = malloc(FRAMES * mine->rows * sizeof *out);
    const ife_input input = {3, 7, 5, 1.0f / 255.0f, {0}, {1, 1, 1}};
    float scratch[6 * SIDE + 2 * 5], tensor[3 * 7 * 5];
    for (int i = 0; i < ROUNDS; ++i) {
        ife_verdict verdict;
        mine->failures += ife_score_batch(mine->scorer, mine->features, FRAMES, out) != IFE_OK;
        mine->failures += memcmp(out, mine->expected, FRAMES * mine->rows * sizeof *out) != 0;
        mine->failures += ife_score(mine->scorer, mine->features, out) != IFE_OK;
        mine->failures += ife_judge(mine->scorer, mine->features, &verdict) != IFE_OK;
        mine->failures += verdict.decision != mine->verdict.decision || verdict.margin != mine->verdict.margin;
        mine->failures += ife_preprocess(mine->image, &input, scratch, tensor) != IFE_OK;
        mine->failures += ife_predict(tensor, 3 * 7 * 5) < 0;
        mine->failures += ife_instruction_set(0) == NULL;
    }
    free(out);
    return NULL;
}

static int check(ife_kind kind, size_t rows, const char *set, const ife_image *image) {
    const size_t n = FEATURES, triangle = n * (n + 1) / 2;
    const size_t size = kind == IFE_DIAGONAL ? rows * n : kind == IFE_FULL ? rows * triangle : triangle;
    int32_t *offsets = malloc((rows + 1) * sizeof *offsets), *classes = malloc(rows * sizeof *classes);
    for (size_t i = 0; i <= rows; ++i) offsets[i] = (int32_t)i;
    for (size_t i = 0; i < rows; ++i) classes[i] = (int32_t)i;
    float *mean = random_array(n, -1, 1), *scale = random_array(n, 0.5f, 2), *origin = random_array(n, -1, 1);
    float *centres = random_array(rows * n, -1, 1), *whitener = random_array(size, 0.1f, 1);
    float *constants = random_array(rows, -3, 3), *features = random_array(FRAMES * n, -2, 2);
    float *expected = malloc(FRAMES * rows * sizeof *expected);
    const ife_guard guard = {kind, FEATURES, (int32_t)rows, (int32_t)rows, offsets, mean, scale,
                             kind == IFE_SHARED ? origin : NULL, centres, whitener, constants};
    ife_scorer *scorer;
    int failures = ife_scorer_create(&guard, classes, 1, set, &scorer) != IFE_OK;
    if (!failures) {
        job jobs[THREADS];
        pthread_t threads[THREADS];
        job first = {scorer, rows, features, expected, {0}, image, 0};
        failures += ife_score_batch(scorer, features, FRAMES, expected) != IFE_OK;
        failures += ife_judge(scorer, features, &first.verdict) != IFE_OK;
        for (int i = 0; i < THREADS; ++i) {
            jobs[i] = first;
            failures += pthread_create(&threads[i], NULL, work, &jobs[i]) != 0;
        }
        for (int i = 0; i < THREADS; ++i) {
            pthread_join(threads[i], NULL);
            failures += jobs[i].failures;
        }
        ife_scorer_destroy(scorer);
    }
    if (failures) printf("%s, kind %d, %zu rows: %d failures\n", set, (int)kind, rows, failures);
    free(offsets), free(classes), free(mean), free(scale), free(origin), free(centres), free(whitener);
    free(constants), free(features), free(expected);
    return failures;
}

int main(void) {
    uint8_t samples[SIDE * SIDE * 3];
    for (size_t i = 0; i < sizeof samples; ++i) samples[i] = (uint8_t)uniform(0, 256);
    const ife_image image = {IFE_RGB, SIDE, SIDE, 0, 0, SIDE * 3, samples, NULL};
    int failures = 0;
    for (int32_t i = 0; ife_instruction_set(i); ++i) {
        for (int kind = IFE_DIAGONAL; kind <= IFE_FULL; ++kind)
            failures += check((ife_kind)kind, 5, ife_instruction_set(i), &image);
        failures += check(IFE_DIAGONAL, MANY, ife_instruction_set(i), &image); /* with codes */
    }
    return failures != 0;
}
