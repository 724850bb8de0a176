/* The scorer of one instruction set: included once by its file. */
#include "score_vector.h"

#include "score_distances.h"
#include "score_whiten.h"

/* What a block of frames is compared with, and how: set up once a block, used by every chunk of components. */
typedef struct {
    const float *centres;
    size_t stride; /* shared: floats from one component's centre to the next */
    size_t length; /* dimensions of the points, padded */
    size_t step;   /* floats from one frame's point to the next */
} comparison;

/* z of a block of features of each frame; a frame stays finite when it was and the block is. */
INLINE void standardise_frames(const ife_scorer *scorer, const float *features, size_t n_frames, size_t start, size_t end,
                               const float *centre, size_t step, float *high, float *low, bool *finite) {
    for (size_t f = 0; f < n_frames; ++f)
        finite[f] &= standardise(scorer, features + f * (size_t)scorer->n_features, start, end, centre,
                                 high + f * step, low + f * step);
}

/* Shared: the points are W (z - origin), or, for the verdict alone, their coordinates in the centres' subspace. */
INLINE comparison shared_points(const ife_scorer *scorer, const float *features, size_t n_frames, bool relative,
                                float *centred, float *points, bool *finite) {
    const size_t padded = scorer->padded;
    standardise_frames(scorer, features, n_frames, 0, padded, scorer->origin, padded, centred, centred, finite);
    /* Beyond the limit the distance in all dimensions could overflow: it is then computed, so that it does. */
    if (relative && scorer->rank && n_frames == 1 && squared_norm(centred, padded) < scorer->largest_norm) {
        const size_t rank = ife_padded((size_t)scorer->rank);
        project(scorer, centred, points);
        return (comparison){scorer->positions, rank, rank, rank};
    }
    whiten(scorer, scorer->panels, centred, padded, n_frames, points, NULL);
    return (comparison){scorer->centres, padded, padded, padded};
}

/* Squared distances of the frames from the components first .. end - 1: totals[f * CHUNK + c]. */
INLINE void chunk_distances(const ife_scorer *scorer, const float *features, size_t n_frames, const comparison *with,
                            int32_t first, int32_t end, float *a, float *b, bool *finite, double *totals) {
    const size_t padded = scorer->padded, count = (size_t)(end - first);
    if (scorer->kind == IFE_FULL) {
        for (size_t c = 0; c < count; ++c) {
            const size_t m = (size_t)first + c;
            double norms[MAX_FRAMES];
            standardise_frames(scorer, features, n_frames, 0, padded, scorer->centres + m * padded, padded, a, a, finite);
            whiten(scorer, scorer->panels + m * ife_panel_start(padded / IFE_LANES), a, padded, n_frames, NULL, norms);
            for (size_t f = 0; f < n_frames; ++f) totals[f * CHUNK + c] = norms[f];
        }
        return;
    }
    for (size_t f = 0; f < n_frames; ++f) memset(totals + f * CHUNK, 0, count * sizeof *totals);
    for (size_t start = 0; start < with->length; start += BLOCK) {
        const size_t end_block = with->length - start < BLOCK ? with->length : start + BLOCK;
        if (scorer->kind == IFE_SHARED) {
            euclidean_distances(b + start, with->step, n_frames, with->centres + (size_t)first * with->stride + start,
                                with->stride, count, end_block - start, totals);
            continue;
        }
        /* Either all of z is there, or there is room for a block of it. */
        const size_t at = with->step < padded ? 0 : start;
        if (with->step < padded)
            standardise_frames(scorer, features, n_frames, start, end_block, NULL, with->step, a, b, finite);
        diagonal_distances(scorer, a + at, b + at, with->step, n_frames, (size_t)first, count, start, end_block - start,
                           totals);
    }
}

/* What the frames are compared with; fills the points that every chunk of components shares. */
INLINE comparison prepare(const ife_scorer *scorer, const float *features, size_t n_frames, bool relative, float *a,
                          float *b, bool *finite) {
    const size_t padded = scorer->padded;
    for (size_t f = 0; f < n_frames; ++f) finite[f] = true;
    if (scorer->kind == IFE_SHARED) return shared_points(scorer, features, n_frames, relative, a, b, finite);
    const size_t step = n_frames > 1 && padded > BLOCK ? BLOCK : padded;
    if (scorer->kind == IFE_DIAGONAL && step == padded)
        standardise_frames(scorer, features, n_frames, 0, padded, NULL, step, a, b, finite);
    return (comparison){scorer->centres, padded, padded, step};
}

/* Rows first_row .. end_row - 1 of frames that have been prepared; not yet NAN where a frame is not finite. */
INLINE void score_rows(const ife_scorer *scorer, const float *features, size_t n_frames, const comparison *with,
                       int32_t first_row, int32_t end_row, float *a, float *b, bool *finite, float *out, size_t stride) {
    _Alignas(64) float values[CHUNK];
    double totals[MAX_FRAMES * CHUNK];
    ife_lse open[MAX_FRAMES];
    for (size_t f = 0; f < n_frames; ++f) open[f] = (ife_lse){-INFINITY, 0.0f};
    int32_t row = first_row;
    for (int32_t first = scorer->offsets[first_row], step; first < scorer->offsets[end_row]; first += step) {
        const int32_t left = scorer->offsets[end_row] - first;
        int32_t count = left < CHUNK ? left : CHUNK;
        int32_t next = row;
        /* Whole rows where one fits: a row adds in the same order whatever rows are scored with it. */
        if (count < left) {
            int32_t last = row;
            while (scorer->offsets[last + 1] <= first + count) ++last;
            if (last > row) count = scorer->offsets[last] - first;
        }
        step = count;
        chunk_distances(scorer, features, n_frames, with, first, first + count, a, b, finite, totals);
        for (size_t f = 0; f < n_frames; ++f) {
            const bool one_each = scorer->n_rows == scorer->n_components;
            float *into = one_each ? out + f * stride + first - first_row : values;
            for (int32_t c = 0; c < count; ++c)
                into[c] = ife_component(scorer->constants[first + c], (float)totals[f * CHUNK + (size_t)c]);
            if (one_each) {
                next = row + count;
                continue;
            }
            for (int32_t c = count; c < CHUNK && c % IFE_LANES; ++c) values[c] = 0.0f;
            next = close_rows(scorer, values, first, first + count, row, &open[f], out + f * stride + row - first_row);
        }
        row = next;
    }
}

/* n_frames at most MAX_FRAMES and such that their points fit in SCRATCH. */
static ife_status score_block(const ife_scorer *scorer, const float *features, size_t n_frames, int32_t first_row,
                              int32_t end_row, bool relative, float *out, size_t stride) {
    _Alignas(64) float a[SCRATCH];
    _Alignas(64) float b[SCRATCH];
    bool finite[MAX_FRAMES];
    const comparison with = prepare(scorer, features, n_frames, relative, a, b, finite);
    score_rows(scorer, features, n_frames, &with, first_row, end_row, a, b, finite, out, stride);
    ife_status status = IFE_OK;
    for (size_t f = 0; f < n_frames; ++f) {
        if (finite[f]) continue;
        for (int32_t r = 0; r < end_row - first_row; ++r) out[f * stride + (size_t)r] = NAN;
        status = IFE_NONFINITE;
    }
    return status;
}

#include "score_rows.h"

#include "score_bounds.h"

static ife_status score(const ife_scorer *scorer, const float *features, size_t n_frames, int32_t first_row,
                        int32_t end_row, bool relative, float *out, size_t stride) {
    const size_t step = scorer->kind == IFE_DIAGONAL && scorer->padded > BLOCK ? BLOCK : scorer->padded;
    size_t most = SCRATCH / step < MAX_FRAMES ? SCRATCH / step : MAX_FRAMES;
    if (most > PANEL_FRAMES && scorer->kind != IFE_DIAGONAL) most -= most % PANEL_FRAMES;
    ife_status status = IFE_OK;
    for (size_t f = 0; f < n_frames; f += most) {
        const size_t count = n_frames - f < most ? n_frames - f : most;
        if (score_block(scorer, features + f * (size_t)scorer->n_features, count, first_row, end_row, relative,
                        out + f * stride, stride) != IFE_OK)
            status = IFE_NONFINITE;
    }
    return status;
}
