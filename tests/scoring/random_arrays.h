/* The same numbers in every run, on the heap in exact size. */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

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
