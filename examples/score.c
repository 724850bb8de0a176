/*
 * Scores frames with a guard's parameters, without Python: score PARAMETERS < features > log-likelihoods
 *
 * PARAMETERS  one file, little-endian: the 32-bit integers kind, D, R, M, target row, length of the whitener; then
 *             offsets (R + 1) and classes (R) as 32-bit integers; then mean, scale, origin (shared only), centres,
 *             whitener and constants as 32-bit floats, in the order and shapes of ife_guard in inflight.h
 *             (examples/parameters.py writes it from a bundle)
 * features    frames of D 32-bit floats, one after another, on standard input
 *
 * Prints a line per frame: the decision, the source class or -1, the margin, then R log-likelihoods, in nats.
 *
 * cc score.c $(pkg-config --cflags --libs inflight) -o score
 */
#include <inflight.h>
#include <stdio.h>
#include <stdlib.h>

static void *read_array(FILE *file, size_t count) {
    void *array = malloc(count * 4);
    if (!array || fread(array, 4, count, file) != count) {
        fprintf(stderr, "parameters: expected %zu more values, got a shorter file; write it again\n", count);
        exit(2);
    }
    return array;
}

static ife_scorer *load(const char *path, ife_guard *guard) {
    static const char *const decoded[] = {"ok", "not finite", "parameters break the contract", "no memory", "unsupported"};
    FILE *file = fopen(path, "rb");
    if (!file) {
        fprintf(stderr, "%s: cannot be opened\n", path);
        exit(2);
    }
    int32_t *header = read_array(file, 6);
    if (header[1] < 1 || header[1] > IFE_MAX_FEATURES || header[2] < 1 || header[2] > header[3] || header[3] < 1 ||
        header[3] > IFE_MAX_COMPONENTS) {
        fprintf(stderr, "%s: expected counts within the limits of inflight.h; write it again\n", path);
        exit(2);
    }
    const size_t n = (size_t)header[1], rows = (size_t)header[2], components = (size_t)header[3];
    const size_t triangle = n * (n + 1) / 2;
    const size_t whitener = header[0] == IFE_DIAGONAL ? components * n
                            : header[0] == IFE_FULL   ? components * triangle
                                                      : triangle;
    if (header[5] < 0 || (size_t)header[5] != whitener) {
        fprintf(stderr, "%s: expected a whitener of %zu entries, got %d; write it again\n", path, whitener, (int)header[5]);
        exit(2);
    }
    guard->kind = header[0];
    guard->n_features = header[1];
    guard->n_rows = header[2];
    guard->n_components = header[3];
    guard->offsets = read_array(file, rows + 1);
    int32_t *classes = read_array(file, rows);
    guard->mean = read_array(file, n);
    guard->scale = read_array(file, n);
    guard->origin = guard->kind == IFE_SHARED ? read_array(file, n) : NULL;
    guard->centres = read_array(file, components * n);
    guard->whitener = read_array(file, whitener);
    guard->constants = read_array(file, components);
    fclose(file);
    ife_scorer *scorer;
    const ife_status status = ife_scorer_create(guard, classes, header[4], NULL, &scorer);
    if (status != IFE_OK) {
        fprintf(stderr, "%s: %s\n", path, decoded[status]);
        exit(2);
    }
    /* The scorer has its own copy. */
    free((void *)guard->offsets), free((void *)guard->mean), free((void *)guard->scale), free((void *)guard->origin);
    free((void *)guard->centres), free((void *)guard->whitener), free((void *)guard->constants);
    free(classes), free(header);
    return scorer;
}

int main(int argc, char **argv) {
    static const char *const decisions[] = {"invalid", "accept", "trigger"};
    if (argc != 2) {
        fprintf(stderr, "usage: %s PARAMETERS < features\n", argv[0]);
        return 2;
    }
    ife_guard guard;
    ife_scorer *scorer = load(argv[1], &guard);
    float *features = malloc((size_t)guard.n_features * sizeof *features);
    float *log_likelihoods = malloc((size_t)guard.n_rows * sizeof *log_likelihoods);
    if (!features || !log_likelihoods) return 2;
    size_t n_read;
    while ((n_read = fread(features, sizeof *features, (size_t)guard.n_features, stdin)) == (size_t)guard.n_features) {
        ife_verdict verdict;
        ife_judge(scorer, features, &verdict);
        ife_score(scorer, features, log_likelihoods);
        printf("%s %d %.9g", decisions[verdict.decision], (int)verdict.source, verdict.margin);
        for (int32_t c = 0; c < guard.n_rows; ++c) printf(" %.9g", log_likelihoods[c]);
        printf("\n");
    }
    free(features), free(log_likelihoods);
    ife_scorer_destroy(scorer);
    if (n_read) fprintf(stderr, "features: expected %d in the last frame, got %zu\n", (int)guard.n_features, n_read);
    return n_read ? 2 : 0;
}
