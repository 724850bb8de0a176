/* Scores and judges argv[1] frames of a guard of each kind, and fails when memory grew. */
#include "inflight.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

enum { D = 64, R = 10, POOL = 64 };

/* Pages that the process keeps in memory. */
static long resident(void) {
    long size = 0, pages = -1;
    FILE *file = fopen("/proc/self/statm", "r");
    if (file && fscanf(file, "%ld %ld", &size, &pages) != 2) pages = -1;
    if (file) fclose(file);
    return pages;
}

static float random_number(void) {
    static unsigned long state = 1;
    state = state * 6364136223846793005ul + 1442695040888963407ul;
    return (float)(state >> 40) / 8388608.0f - 1.0f;
}

static float *random_array(size_t n) {
    float *array = malloc(n * sizeof *array);
    for (size_t i = 0; array && i < n; ++i) array[i] = random_number();
    return array;
}

int main(int argc, char **argv) {
    const long n_frames = argc > 1 ? atol(argv[1]) : 0;
    static float mean[D], scale[D], origin[D], constants[R];
    static int32_t offsets[R + 1], classes[R];
    float *features = random_array(POOL * D), *centres = random_array(R * D);
    float *whitener = random_array((size_t)R * D * (D + 1) / 2), out[R];
    if (n_frames < 1 || !features || !centres || !whitener || resident() < 0) return 2;
    for (int d = 0; d < D; ++d) scale[d] = 1.0f;
    for (int r = 0; r < R; ++r) offsets[r + 1] = r + 1, classes[r] = r;
    for (int kind = IFE_DIAGONAL; kind <= IFE_FULL; ++kind) {
        const ife_guard guard = {kind, D, R, R, offsets, mean, scale, kind == IFE_SHARED ? origin : NULL, centres,
                                 whitener, constants};
        ife_scorer *scorer;
        ife_verdict verdict;
        if (ife_scorer_create(&guard, classes, 0, NULL, &scorer) != IFE_OK) return 3;
        long before = 0, wrong = 0;
        for (long i = 0; i < n_frames; ++i) {
            /* Code and stack are in memory after the first frames. */
            if (i == (n_frames < 1000 ? n_frames / 2 : 1000)) before = resident();
            const float *frame = features + i % POOL * D;
            ife_judge(scorer, frame, &verdict);
            const int32_t decision = verdict.decision;
            ife_explain(scorer, frame, out, &verdict);
            wrong += decision != verdict.decision || !isfinite(out[i % R]);
        }
        const long grown = resident() - before;
        ife_scorer_destroy(scorer);
        printf("kind %d: %ld frames, grown %ld pages, %ld wrong\n", kind, n_frames, grown, wrong);
        if (grown || wrong) return 1;
    }
    free(features);
    free(centres);
    free(whitener);
    return 0;
}
