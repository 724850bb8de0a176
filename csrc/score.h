/* Inside the scorers: the layout of a loaded guard, and what each instruction set implements. */
#ifndef INFLIGHT_SCORE_H
#define INFLIGHT_SCORE_H

#include "inflight.h"

#include <stdbool.h>

/* Floats of a block of the layout: one AVX-512, two AVX or four SSE or NEON registers. */
#define IFE_LANES 16

typedef struct {
    const char *name;
    bool reads_codes; /* unpacking bytes costs it less than reading floats */
    /*
     * Log-likelihoods of n_frames under the rows first_row .. end_row - 1: out[frame * stride + row - first_row].
     * relative: a term common to all rows of a frame may be left out.
     */
    ife_status (*score)(const ife_scorer *scorer, const float *features, size_t n_frames, int32_t first_row,
                        int32_t end_row, bool relative, float *out, size_t stride);
    /*
     * Log-likelihoods of one frame under the target and under every row that may be the best of the others; -INFINITY
     * for the rest.  out (R), R <= IFE_BOUNDED_COMPONENTS.  For a bounded scorer; returns the number of rows scored in
     * n_scored.
     */
    ife_status (*score_best)(const ife_scorer *scorer, const float *features, float *out, int32_t *n_scored);
    /* In place, n a multiple of IFE_LANES.  exp: x <= 0, relative error below 2e-7, 0 below -87.  log: x >= 1. */
    void (*exponentials)(float *x, size_t n);
    void (*logarithms)(float *x, size_t n);
} ife_kernels;

extern const ife_kernels ife_kernels_portable, ife_kernels_avx2, ife_kernels_avx512, ife_kernels_neon;

/* Implementation i that this processor runs, fastest first; NULL past the end. */
const ife_kernels *ife_kernels_at(int32_t i);

/* Components that the first pass with codes holds bounds for, on the stack. */
#define IFE_BOUNDED_COMPONENTS 4096

/*
 * A component's parameters in 8 bits each, and how far its whitened point may then be from the truth.  With x^ the
 * decoded values and y^ = (z - centre^) weight^:  least |y^| - error <= |(z - centre) weight| <= most |y^| + error.
 * centre^ = start + step code; bits of weight^ = base + (code << shift), the upper bits of a float.
 */
typedef struct {
    float start;
    float step;
    float least;
    float most;
    float error; /* |(centre - centre^) weight|, and what float arithmetic on z and centre can lose */
    int32_t base;
    int32_t shift;
} ife_code;

/*
 * P = D rounded up to IFE_LANES.  Padding adds nothing: mean 0, scale 1, means 0, whitener 0.
 *
 * centres    diagonal: for each group of G = 4 components (at the end of 2 and of 1), (P / 16, G, 2, 16): 16 means, then
 *            their 16 inverse deviations, of each in turn, so that what is summed together is one stream;
 *            shared, full: (M, P)
 * panels     shared: one, full: M lower triangles, each in panels of 16 rows: panel p holds its columns
 *            0 .. 16 p + 15 one after another, 16 rows of each: 16 rows are summed without a horizontal addition
 * basis      (rank, P)  shared: orthonormal basis of the span of the centres' differences, times W
 * codes      diagonal: (M, P / 16, 2, 16), shared: (M, P) bytes, where there are many rows; else NULL
 * positions  (M, rank rounded up to IFE_LANES)  the centres in that basis
 */
struct ife_scorer {
    const ife_kernels *kernels;
    int32_t kind;
    int32_t n_features;
    int32_t n_rows;
    int32_t n_components;
    int32_t target_row;
    int32_t rank; /* 0: no subspace, or it would read more than the whitener */
    bool bounded; /* the verdict leaves out rows that cannot be the best: score_best */
    size_t padded;
    double largest_norm; /* |z - origin|^2 below it: no distance overflows, hence the subspace may stand for all */
    int32_t *offsets;
    int32_t *classes;
    float *constants;
    float *mean;
    float *scale;
    float *inverse_scale;
    float *origin;
    float *centres;
    float *panels;
    float *basis;
    float *positions;
    uint8_t *codes;
    ife_code *coding; /* (M) */
};

static inline size_t ife_padded(size_t n) {
    return (n + IFE_LANES - 1) / IFE_LANES * IFE_LANES;
}

/* Parameters read, for the benchmark alone: one thread, and a library built for it. */
#ifdef IFE_COUNT_BYTES
extern uint64_t ife_bytes_read;
#define ife_count_bytes(n) ((void)(ife_bytes_read += (n)))
#else
#define ife_count_bytes(n) ((void)0)
#endif

/* Floats of a diagonal component beside each other: IFE_LANES means and their inverse deviations. */
#define IFE_DIAGONAL_BLOCK (2 * IFE_LANES)

/* Components whose blocks alternate in the diagonal layout. */
typedef struct {
    size_t first;
    size_t size; /* 4, 2 or 1 */
} ife_group;

static inline ife_group ife_group_of(size_t n_components, size_t k) {
    const size_t first = k / 4 * 4, left = n_components - first;
    if (left >= 4) return (ife_group){first, 4};
    if (left >= 2 && k < first + 2) return (ife_group){first, 2};
    return (ife_group){k, 1};
}

/* Where a component's first block is, in floats. */
static inline size_t ife_diagonal_start(ife_group group, size_t padded, size_t k) {
    return group.first * 2 * padded + (k - group.first) * IFE_DIAGONAL_BLOCK;
}

/* Start of panel p of a triangle, in floats. */
static inline size_t ife_panel_start(size_t p) {
    return (size_t)IFE_LANES * IFE_LANES * (p * (p + 1) / 2);
}

#endif
