/*
 * The scorer's loops over a vector type: included once by each instruction set's file, which defines before
 *
 * vec, WIDTH     float vector and its lanes;  vec_load, vec_store (unaligned), vec_set, vec_add, vec_sub, vec_mul
 * vec_fma        a * b + c;  vec_fnma: c - a * b;  vec_sum: horizontal;  vec_min, vec_max
 * vec_round      to the nearest integer;  vec_power: 2^n, n integral in -126..127
 * vec_split      x > 0 as mantissa in [2/3, 4/3) and exponent
 * vec_bytes, vec_code  float vectors from bytes: their values, and base + (byte << shift) as the bits of a float
 * vec_standardise  ife_standardise_pair of each lane

 * FRAMES, COMPONENTS  the same for a batch: FRAMES x COMPONENTS partial sums stay in registers
 * PANEL_FRAMES, PHASES  frames per pass over a panel, and interleaved partial sums of each
 *
 * The order of the additions of one frame's score depends on none of them but WIDTH and PHASES: a batch scores each
 * frame as it would be alone, bit for bit.
 */
#include "score.h"
#include "score_math.h"

#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define SEPARATE static __attribute__((noinline)) /* its own registers: inlined side by side, gcc 12 spills the sums */
#define UNROLLED _Pragma("GCC unroll 16")
#define UNROLL (IFE_LANES / WIDTH)
/* Features summed in float before the sum goes to a double: 64 additions a lane, relative error below 4e-6. */
#define BLOCK 1024
/* Columns of a panel summed in one register, before the sum goes to another: 32 + D / (32 PHASES) additions in all. */
#define COLUMNS (32 * PHASES)
/* Components whose distances wait for their log-sum-exp. */
#define CHUNK 64
/* Frames that share a pass over the parameters. */
#define MAX_FRAMES 24
/* Floats of each of two buffers on the stack. */
#define SCRATCH IFE_MAX_FEATURES

INLINE float lane_sum(const vec *lanes) {
    vec sum = lanes[0];
    UNROLLED for (int u = 1; u < UNROLL; ++u) sum = vec_add(sum, lanes[u]);
    return vec_sum(sum);
}

/*
 * z of the features start .. end - 1 (end - start a multiple of IFE_LANES, padded with 0): high and low, or, with a
 * centre, high = z - centre alone.  False when a feature is not finite: 0 x is then NaN.
 */
INLINE bool standardise(const ife_scorer *scorer, const float *features, size_t start, size_t end, const float *centre,
                        float *high, float *low) {
    const size_t n = (size_t)scorer->n_features;
    const vec zero = vec_set(0.0f);
    vec poison = zero;
    for (size_t d = start; d < end; d += IFE_LANES) {
        float tail[IFE_LANES] = {0.0f};
        const float *block = features + d;
        if (d + IFE_LANES > n) {
            for (size_t l = 0; d + l < n; ++l) tail[l] = features[d + l];
            block = tail;
        }
        UNROLLED for (int u = 0; u < UNROLL; ++u) {
            const size_t at = d + (size_t)u * WIDTH;
            const vec x = vec_load(block + u * WIDTH);
            vec z_low;
            const vec z = vec_standardise(x, vec_load(scorer->mean + at), vec_load(scorer->scale + at),
                                          vec_load(scorer->inverse_scale + at), &z_low);
            poison = vec_fma(x, zero, poison);
            if (centre) {
                vec_store(high + at - start, vec_add(vec_sub(z, vec_load(centre + at)), z_low));
            } else {
                vec_store(high + at - start, z);
                vec_store(low + at - start, z_low);
            }
        }
    }
    return vec_sum(poison) == 0.0f;
}

/*
 * Adds to totals[f * CHUNK + c] the squared distances over n features of `frames` points from `components` centres.
 * diagonal: ((high - centre) + low) * inverse deviation, the two interleaved; else: high - centre.
 * One frame: the parameters stream past once.  More: a pass for each register of a block of lanes, so that
 * frames x components sums and what they are made of stay in registers; the block is in the first cache by then.
 */
INLINE void distance_tile(const int frames, const int components, const bool diagonal, const float *high,
                          const float *low, size_t step, const float *parameters, size_t stride, size_t n,
                          double *totals) {
    vec sums[4][4][UNROLL];
    const int at_once = frames > 1 ? 1 : UNROLL;
    UNROLLED for (int f = 0; f < frames; ++f)
        UNROLLED for (int c = 0; c < components; ++c)
            UNROLLED for (int u = 0; u < UNROLL; ++u) sums[f][c][u] = vec_set(0.0f);
    UNROLLED for (int first = 0; first < UNROLL; first += at_once) {
        for (size_t d = 0; d < n; d += IFE_LANES) {
            UNROLLED for (int u = first; u < first + at_once; ++u) {
                const size_t at = d + (size_t)u * WIDTH;
                vec centre[4], weight[4];
                UNROLLED for (int c = 0; c < components; ++c) {
                    const float *parameter = parameters + (size_t)c * stride + (diagonal ? d : 0) + at;
                    centre[c] = vec_load(parameter);
                    weight[c] = diagonal ? vec_load(parameter + IFE_LANES) : centre[c];
                }
                UNROLLED for (int f = 0; f < frames; ++f) {
                    const vec z = vec_load(high + (size_t)f * step + at);
                    const vec rest = diagonal ? vec_load(low + (size_t)f * step + at) : z;
                    UNROLLED for (int c = 0; c < components; ++c) {
                        vec y = vec_sub(z, centre[c]);
                        if (diagonal) y = vec_mul(vec_add(y, rest), weight[c]);
                        sums[f][c][u] = vec_fma(y, y, sums[f][c][u]);
                    }
                }
            }
        }
    }
    UNROLLED for (int f = 0; f < frames; ++f)
        UNROLLED for (int c = 0; c < components; ++c) totals[f * CHUNK + c] += (double)lane_sum(sums[f][c]);
}

#define DISTANCES(name, frames, components, diagonal)                                                        \
    SEPARATE void name(const float *high, const float *low, size_t step, const float *parameters, size_t stride, \
                       size_t n, double *totals) {                                                           \
        distance_tile(frames, components, diagonal, high, low, step, parameters, stride, n, totals);         \
    }
DISTANCES(diagonal_1x1, 1, 1, true)
DISTANCES(diagonal_1x2, 1, 2, true)
DISTANCES(diagonal_1x4, 1, 4, true)
DISTANCES(diagonal_many_x1, FRAMES, 1, true)
DISTANCES(diagonal_many, FRAMES, COMPONENTS, true)
DISTANCES(euclidean_1x1, 1, 1, false)
DISTANCES(euclidean_1x2, 1, 2, false)
DISTANCES(euclidean_1x4, 1, 4, false)
DISTANCES(euclidean_many_x1, FRAMES, 1, false)
DISTANCES(euclidean_many, FRAMES, COMPONENTS, false)

/* The same for any number of frames and components. */
INLINE void distances(const bool diagonal, const float *high, const float *low, size_t step, size_t n_frames,
                      const float *parameters, size_t stride, size_t n_components, size_t n, double *totals) {
    size_t f = 0;
    for (; f + FRAMES <= n_frames && FRAMES > 1; f += FRAMES) {
        size_t c = 0;
        for (; c + COMPONENTS <= n_components; c += COMPONENTS)
            (diagonal ? diagonal_many : euclidean_many)(high + f * step, low + f * step, step, parameters + c * stride,
                                                        stride, n, totals + f * CHUNK + c);
        for (; c < n_components; ++c)
            (diagonal ? diagonal_many_x1 : euclidean_many_x1)(high + f * step, low + f * step, step,
                                                              parameters + c * stride, stride, n, totals + f * CHUNK + c);
    }
    for (; f < n_frames; ++f) {
        size_t c = 0;
        for (; c + 4 <= n_components; c += 4)
            (diagonal ? diagonal_1x4 : euclidean_1x4)(high + f * step, low + f * step, step, parameters + c * stride,
                                                      stride, n, totals + f * CHUNK + c);
        for (; c + 2 <= n_components; c += 2)
            (diagonal ? diagonal_1x2 : euclidean_1x2)(high + f * step, low + f * step, step, parameters + c * stride,
                                                      stride, n, totals + f * CHUNK + c);
        for (; c < n_components; ++c)
            (diagonal ? diagonal_1x1 : euclidean_1x1)(high + f * step, low + f * step, step, parameters + c * stride,
                                                      stride, n, totals + f * CHUNK + c);
    }
}

/* y[f * y_step + 0 .. 15]: the 16 rows of one panel times n_columns of `frames` vectors. */
INLINE void panel_tile(const int frames, const float *panel, const float *vectors, size_t step, size_t n_columns,
                       float *y, size_t y_step) {
    vec rows[PANEL_FRAMES][UNROLL];
    UNROLLED for (int f = 0; f < frames; ++f)
        UNROLLED for (int u = 0; u < UNROLL; ++u) rows[f][u] = vec_set(0.0f);
    for (size_t start = 0; start < n_columns; start += COLUMNS) {
        const size_t end = n_columns - start < COLUMNS ? n_columns : start + COLUMNS;
        vec sums[PANEL_FRAMES][PHASES][UNROLL];
        UNROLLED for (int f = 0; f < frames; ++f)
            UNROLLED for (int p = 0; p < PHASES; ++p)
                UNROLLED for (int u = 0; u < UNROLL; ++u) sums[f][p][u] = vec_set(0.0f);
        for (size_t d = start; d < end; d += PHASES) {
            UNROLLED for (int p = 0; p < PHASES; ++p) {
                vec column[UNROLL];
                UNROLLED for (int u = 0; u < UNROLL; ++u)
                    column[u] = vec_load(panel + (d + (size_t)p) * IFE_LANES + u * WIDTH);
                UNROLLED for (int f = 0; f < frames; ++f) {
                    const vec factor = vec_set(vectors[(size_t)f * step + d + (size_t)p]);
                    UNROLLED for (int u = 0; u < UNROLL; ++u)
                        sums[f][p][u] = vec_fma(column[u], factor, sums[f][p][u]);
                }
            }
        }
        UNROLLED for (int f = 0; f < frames; ++f)
            UNROLLED for (int u = 0; u < UNROLL; ++u) {
                vec sum = sums[f][0][u];
                UNROLLED for (int p = 1; p < PHASES; ++p) sum = vec_add(sum, sums[f][p][u]);
                rows[f][u] = vec_add(rows[f][u], sum);
            }
    }
    UNROLLED for (int f = 0; f < frames; ++f)
        UNROLLED for (int u = 0; u < UNROLL; ++u) vec_store(y + (size_t)f * y_step + u * WIDTH, rows[f][u]);
}

SEPARATE void panel_one(const float *panel, const float *vectors, size_t n_columns, float *y) {
    panel_tile(1, panel, vectors, 0, n_columns, y, 0);
}

SEPARATE void panel_many(const float *panel, const float *vectors, size_t step, size_t n_columns, float *y,
                         size_t y_step) {
    panel_tile(PANEL_FRAMES, panel, vectors, step, n_columns, y, y_step);
}

INLINE double squared_norm(const float *vector, size_t n) {
    vec sums[UNROLL];
    UNROLLED for (int u = 0; u < UNROLL; ++u) sums[u] = vec_set(0.0f);
    for (size_t d = 0; d < n; d += IFE_LANES)
        UNROLLED for (int u = 0; u < UNROLL; ++u) {
            const vec x = vec_load(vector + d + u * WIDTH);
            sums[u] = vec_fma(x, x, sums[u]);
        }
    return (double)lane_sum(sums);
}

/* W times each vector, or, without y, the squared norms of the products; a panel is read once for all frames. */
INLINE void whiten(const ife_scorer *scorer, const float *triangle, const float *vectors, size_t step, size_t n_frames,
                   float *y, double *norms) {
    float rows[PANEL_FRAMES * IFE_LANES];
    for (size_t f = 0; norms && f < n_frames; ++f) norms[f] = 0.0;
    for (size_t p = 0; p < scorer->padded / IFE_LANES; ++p) {
        const float *panel = triangle + ife_panel_start(p);
        const size_t n_columns = (p + 1) * IFE_LANES;
        size_t count;
        for (size_t f = 0; f < n_frames; f += count) {
            float *target = y ? y + f * step + p * IFE_LANES : rows;
            const float *from = vectors + f * step;
            count = n_frames - f < PANEL_FRAMES ? 1 : PANEL_FRAMES;
            if (count == 1)
                panel_one(panel, from, n_columns, target);
            else
                panel_many(panel, from, step, n_columns, target, y ? step : IFE_LANES);
            for (size_t i = 0; norms && i < count; ++i) norms[f + i] += squared_norm(rows + i * IFE_LANES, IFE_LANES);
        }
    }
}

/* exp: Cody-Waite reduction by log 2, polynomial of Cephes' expf. */
static void exponentials(float *x, size_t n) {
    for (size_t i = 0; i < n; i += WIDTH) {
        const vec original = vec_load(x + i);
        const vec t = vec_max(original, vec_set(-87.0f));
        const vec power = vec_round(vec_mul(t, vec_set(1.44269504f)));
        vec r = vec_fnma(power, vec_set(0.693359375f), t);
        r = vec_fnma(power, vec_set(-2.12194440e-4f), r);
        vec p = vec_fma(vec_set(1.9875691500e-4f), r, vec_set(1.3981999507e-3f));
        p = vec_fma(p, r, vec_set(8.3334519073e-3f));
        p = vec_fma(p, r, vec_set(4.1665795894e-2f));
        p = vec_fma(p, r, vec_set(1.6666665459e-1f));
        p = vec_fma(p, r, vec_set(5.0000001201e-1f));
        p = vec_add(vec_fma(vec_mul(p, r), r, r), vec_set(1.0f));
        vec_store(x + i, vec_zero_below(original, -87.0f, vec_mul(p, vec_power(power))));
    }
}

/* log: x = m 2^e; log(1 + f) = f - f^2 / 2 + f^3 q(f), q fitted on [-1/3, 1/3] with relative error 5e-9. */
static void logarithms(float *x, size_t n) {
    static const float q[] = {0.139913127f,  -0.121829443f, 0.140045926f,  -0.166805714f,
                              0.200104758f, -0.249997959f, 0.333332151f};
    for (size_t i = 0; i < n; i += WIDTH) {
        vec exponent;
        const vec f = vec_sub(vec_split(vec_load(x + i), &exponent), vec_set(1.0f));
        vec p = vec_set(-0.128980726f);
        UNROLLED for (int j = 0; j < 7; ++j) p = vec_fma(p, f, vec_set(q[j]));
        const vec square = vec_mul(f, f);
        p = vec_fma(vec_mul(square, f), p, vec_mul(exponent, vec_set(-2.12194440e-4f)));
        p = vec_add(f, vec_fnma(square, vec_set(0.5f), p));
        vec_store(x + i, vec_fma(exponent, vec_set(0.693359375f), p));
    }
}

/*
 * Row values from the log-likelihoods of the components first .. end - 1 (at most CHUNK; values is overwritten).
 * open: partial sum of the row that the last call left unfinished.  Writes out[0] for `row`, and so on; returns the
 * first row not finished.
 */
static int32_t close_rows(const ife_scorer *scorer, float *values, int32_t first, int32_t end, int32_t row,
                          ife_lse *open, float *out) {
    if (scorer->n_rows == scorer->n_components) {
        memcpy(out, values, (size_t)(end - first) * sizeof *out);
        return row + end - first;
    }
    float largest[CHUNK];
    float sums[CHUNK];
    int32_t r = row;
    for (int32_t k = first; k < end; ++r) {
        const int32_t stop = scorer->offsets[r + 1] < end ? scorer->offsets[r + 1] : end;
        float most = -INFINITY;
        for (int32_t j = k; j < stop; ++j) most = values[j - first] > most ? values[j - first] : most;
        for (int32_t j = k; j < stop; ++j)
            values[j - first] = values[j - first] == -INFINITY ? -INFINITY : values[j - first] - most;
        largest[r - row] = most;
        k = stop;
    }
    exponentials(values, ife_padded((size_t)(end - first)));
    r = row;
    for (int32_t k = first; k < end;) {
        const int32_t stop = scorer->offsets[r + 1] < end ? scorer->offsets[r + 1] : end;
        ife_lse partial = {largest[r - row], 0.0f};
        for (int32_t j = k; j < stop; ++j) partial.sum += values[j - first];
        *open = ife_lse_merge(*open, partial);
        k = stop;
        if (stop < scorer->offsets[r + 1]) break;
        largest[r - row] = open->max;
        sums[r - row] = open->max == -INFINITY ? 1.0f : open->sum;
        *open = (ife_lse){-INFINITY, 0.0f};
        ++r;
    }
    for (size_t i = (size_t)(r - row); i < ife_padded((size_t)(r - row)); ++i) sums[i] = 1.0f;
    logarithms(sums, ife_padded((size_t)(r - row)));
    for (int32_t i = 0; i < r - row; ++i) out[i] = largest[i] + sums[i];
    return r;
}

/* Coordinates of a vector in the subspace of the component means, four at a time: basis has rows of 0 at its end. */
static void project(const ife_scorer *scorer, const float *vector, float *position) {
    const size_t rank = (size_t)scorer->rank, padded = scorer->padded;
    memset(position, 0, ife_padded(rank) * sizeof *position);
    for (size_t first = 0; first < rank; first += 4) {
        const float *basis = scorer->basis + first * padded;
        double totals[4] = {0.0};
        for (size_t start = 0; start < padded; start += BLOCK) {
            const size_t end = padded - start < BLOCK ? padded : start + BLOCK;
            vec sums[4][UNROLL];
            UNROLLED for (int r = 0; r < 4; ++r)
                UNROLLED for (int u = 0; u < UNROLL; ++u) sums[r][u] = vec_set(0.0f);
            for (size_t d = start; d < end; d += IFE_LANES)
                UNROLLED for (int u = 0; u < UNROLL; ++u) {
                    const vec x = vec_load(vector + d + u * WIDTH);
                    UNROLLED for (int r = 0; r < 4; ++r)
                        sums[r][u] = vec_fma(vec_load(basis + (size_t)r * padded + d + u * WIDTH), x, sums[r][u]);
                }
            UNROLLED for (int r = 0; r < 4; ++r) totals[r] += (double)lane_sum(sums[r]);
        }
        for (size_t r = 0; r < 4; ++r) position[first + r] = (float)totals[r];
    }
}

/* What a block of frames is compared with, and how: set up once a block, used by every chunk of components. */
typedef struct {
    const float *centres;
    size_t stride; /* floats from one component's centre to the next */
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
        const float *centres = with->centres + (size_t)first * with->stride;
        if (scorer->kind == IFE_SHARED) {
            distances(false, b + start, b + start, with->step, n_frames, centres + start, with->stride, count,
                      end_block - start, totals);
            continue;
        }
        /* Either all of z is there, or there is room for a block of it. */
        const size_t at = with->step < padded ? 0 : start;
        if (with->step < padded)
            standardise_frames(scorer, features, n_frames, start, end_block, NULL, with->step, a, b, finite);
        distances(true, a + at, b + at, with->step, n_frames, centres + 2 * start, with->stride, count, end_block - start, totals);
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
    return (comparison){scorer->centres, 2 * padded, padded, step};
}

/* Rows first_row .. end_row - 1 of frames that have been prepared; not yet NAN where a frame is not finite. */
INLINE void score_rows(const ife_scorer *scorer, const float *features, size_t n_frames, const comparison *with,
                       int32_t first_row, int32_t end_row, float *a, float *b, bool *finite, float *out, size_t stride) {
    _Alignas(64) float values[CHUNK];
    double totals[MAX_FRAMES * CHUNK];
    ife_lse open[MAX_FRAMES];
    for (size_t f = 0; f < n_frames; ++f) open[f] = (ife_lse){-INFINITY, 0.0f};
    int32_t row = first_row;
    for (int32_t first = scorer->offsets[first_row]; first < scorer->offsets[end_row]; first += CHUNK) {
        const int32_t left = scorer->offsets[end_row] - first;
        const int32_t count = left < CHUNK ? left : CHUNK;
        int32_t next = row;
        chunk_distances(scorer, features, n_frames, with, first, first + count, a, b, finite, totals);
        for (size_t f = 0; f < n_frames; ++f) {
            for (int32_t c = 0; c < count; ++c)
                values[c] = ife_component(scorer->constants[first + c], (float)totals[f * CHUNK + (size_t)c]);
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

/* sum + the squares of WIDTH features from d. */
INLINE vec add_coded(const bool diagonal, const ife_code *code, const uint8_t *bytes, const float *point, size_t d,
                     vec sum) {
    const uint8_t *at = bytes + (diagonal ? d + d / IFE_LANES * IFE_LANES : d);
    vec y = vec_sub(vec_load(point + d), vec_fma(vec_bytes(at), vec_set(code->step), vec_set(code->start)));
    if (diagonal) y = vec_mul(y, vec_code(at + IFE_LANES, code->base, code->shift));
    return vec_fma(y, y, sum);
}

/*
 * Squared norm of (point - centre^) weight^ over the features start .. end - 1 of one component, decoded from bytes;
 * start is a multiple of IFE_LANES.  The codes of the padding would not decode to 0: the features beside whole blocks
 * are taken one by one.
 */
INLINE double coded_norm(const bool diagonal, const ife_code *code, const uint8_t *bytes, const float *point,
                         size_t start, size_t end) {
    const size_t whole = end - end % IFE_LANES;
    /* Four independent sums: the additions of one would wait for each other. */
    vec sums[4] = {vec_set(0.0f), vec_set(0.0f), vec_set(0.0f), vec_set(0.0f)};
    size_t d = start;
    for (; d + 4 * WIDTH <= whole; d += 4 * WIDTH)
        UNROLLED for (size_t i = 0; i < 4; ++i)
            sums[i] = add_coded(diagonal, code, bytes, point, d + i * WIDTH, sums[i]);
    for (; d < whole; d += WIDTH) sums[0] = add_coded(diagonal, code, bytes, point, d, sums[0]);
    double total = (double)vec_sum(vec_add(vec_add(sums[0], sums[1]), vec_add(sums[2], sums[3])));
    for (d = whole; d < end; ++d) {
        const uint8_t *at = bytes + (diagonal ? 2 * whole : whole) + (d - whole);
        float y = point[d] - (code->start + code->step * (float)at[0]);
        if (diagonal) {
            const int32_t bits = code->base + at[IFE_LANES] * (1 << code->shift);
            float weight;
            memcpy(&weight, &bits, sizeof weight);
            y *= weight;
        }
        total += (double)(y * y);
    }
    return total;
}

/* Features whose codes are read of every component, and of each one not yet excluded before it is looked at again. */
#define LEAD 64
#define STRIDE 128
/*
 * Share of a log-likelihood's terms that covers the rounding of the norms here (4e-6), of the distance in full (4e-6)
 * and of the constant, several times over.
 */
#define SLACK 4e-5

/* Largest part of a coded squared norm at which the component can still reach best: beyond it, it is excluded. */
INLINE double exclusion(const ife_code *code, double constant, double best) {
    /* Then the distance is at most twice its lower bound, and SLACK of it below 2e-4 of that bound's half square. */
    if (!(code->most <= 1.1f * code->least)) return INFINITY;
    const double needed = 2.0 * 1.0003 * (constant - best + SLACK * (fabs(constant) + fabs(best) + 1.0));
    const double root = needed > 0.0 ? sqrt(needed) : 0.0, wide = 4.0 * (double)code->error;
    const double close = root > wide ? root : wide;
    const double norm = (close + (double)code->error) / (double)code->least;
    return norm * norm;
}

/* Bounds of a component's log-likelihood, as float arithmetic would give it in full, from its coded squared norm. */
INLINE void code_bounds(const ife_code *code, double constant, double squared, double *lower, double *upper) {
    const double norm = sqrt(squared);
    const double far = norm * (double)code->most + (double)code->error;
    const double close = norm * (double)code->least - (double)code->error;
    *lower = -INFINITY;
    *upper = INFINITY;
    if (!(far < 1e18)) return; /* an overflow here is not yet one in full */
    const double slack = SLACK * (0.5 * far * far + fabs(constant) + 1.0);
    *lower = constant - 0.5 * far * far - slack;
    *upper = constant - (close > 0.0 ? 0.5 * close * close : 0.0) + slack;
}

/*
 * upper[r]: no less than the log-likelihood of row r, or -INFINITY when it cannot be the best; returns a number that
 * the best of the rows but the target's reaches.
 */
INLINE double bound_rows(const bool diagonal, const ife_scorer *scorer, const float *point, double *upper) {
    const size_t n = (size_t)scorer->n_features, size = (diagonal ? 2 : 1) * scorer->padded;
    const size_t lead = n < LEAD ? n - n % IFE_LANES : LEAD;
    double partial[IFE_BOUNDED_COMPONENTS];
    double best = -INFINITY, likeliest = -INFINITY;
    int32_t first = 0;
    for (int32_t r = 0; r < scorer->n_rows; ++r)
        for (int32_t k = scorer->offsets[r]; k < scorer->offsets[r + 1]; ++k) {
            partial[k] = coded_norm(diagonal, &scorer->coding[k], scorer->codes + (size_t)k * size, point, 0, lead);
            const double guess = scorer->constants[k] - 0.5 * partial[k] * (double)n / (double)lead;
            if (r == scorer->target_row || !(guess > likeliest)) continue;
            likeliest = guess;
            first = r;
        }
    /* The likeliest row first: what it reaches excludes most others early. */
    for (int32_t i = -1; i < scorer->n_rows; ++i) {
        const int32_t r = i < 0 ? first : i;
        if (r == scorer->target_row || (i >= 0 && r == first)) continue;
        const int32_t count = scorer->offsets[r + 1] - scorer->offsets[r];
        const double several = count > 1 ? log((double)count) : 0.0;
        upper[r] = -INFINITY;
        for (int32_t k = scorer->offsets[r]; k < scorer->offsets[r + 1]; ++k) {
            const ife_code *code = &scorer->coding[k];
            const double constant = scorer->constants[k];
            const double limit = best == -INFINITY ? INFINITY : exclusion(code, constant + several, best);
            double squared = partial[k], low, high;
            size_t d = lead;
            while (d < n && !(squared > limit)) {
                const size_t end = n - d < STRIDE ? n : d + STRIDE;
                squared += coded_norm(diagonal, code, scorer->codes + (size_t)k * size, point, d, end);
                d = end;
            }
            if (squared > limit && squared < 1e30) continue;
            code_bounds(code, constant, squared, &low, &high);
            best = low > best ? low : best;
            upper[r] = high + several > upper[r] ? high + several : upper[r];
        }
    }
    return best;
}

static ife_status score_best(const ife_scorer *scorer, const float *features, float *out, int32_t *n_scored) {
    _Alignas(64) float a[SCRATCH];
    _Alignas(64) float b[SCRATCH];
    double upper[IFE_BOUNDED_COMPONENTS];
    bool finite;
    const comparison with = prepare(scorer, features, 1, false, a, b, &finite);
    *n_scored = 0;
    if (!finite) return IFE_NONFINITE;
    const bool diagonal = scorer->kind == IFE_DIAGONAL;
    const double best = diagonal ? bound_rows(true, scorer, a, upper) : bound_rows(false, scorer, b, upper);
    for (int32_t r = 0; r < scorer->n_rows; ++r) {
        out[r] = -INFINITY;
        if (r != scorer->target_row && upper[r] < best - SLACK * fabs(best)) continue;
        score_rows(scorer, features, 1, &with, r, r + 1, a, b, &finite, out + r, 1);
        ++*n_scored;
    }
    return IFE_OK;
}

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
