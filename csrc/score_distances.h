/* Squared distances of standardised points from component means. */

/*
 * Adds to totals[f * CHUNK + c] the squared distances over n features of `frames` points from `components` centres.
 * diagonal: ((high - centre) + low) * inverse deviation, the two interleaved; else: high - centre.
 * Parameters of component c and of the features from d: parameters + c * stride + d / IFE_LANES * block.
 * One frame: the parameters stream past once.  More: a pass for each register of a block of lanes, so that
 * frames x components sums and what they are made of stay in registers; the block is in the first cache by then.
 */
INLINE void distance_tile(const int frames, const int components, const bool diagonal, const float *high,
                          const float *low, size_t step, const float *parameters, size_t stride, size_t block, size_t n,
                          double *totals) {
    vec sums[4][4][UNROLL];
    const int at_once = frames > 1 ? 1 : UNROLL;
    UNROLLED for (int f = 0; f < frames; ++f)
        UNROLLED for (int c = 0; c < components; ++c)
            UNROLLED for (int u = 0; u < UNROLL; ++u) sums[f][c][u] = vec_set(0.0f);
    UNROLLED for (int first = 0; first < UNROLL; first += at_once) {
        const float *blocks = parameters;
        for (size_t d = 0; d < n; d += IFE_LANES, blocks += block) {
            UNROLLED for (int u = first; u < first + at_once; ++u) {
                const size_t at = d + (size_t)u * WIDTH;
                vec centre[4], weight[4];
                UNROLLED for (int c = 0; c < components; ++c) {
                    const float *parameter = blocks + (size_t)c * stride + (size_t)u * WIDTH;
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
    if (frames == 1) {
        UNROLLED for (int c = 0; c < components; ++c) totals[c] += (double)lane_sum(sums[0][c]);
        return;
    }
    /* Four sums at once: of one frame where there are four components, else of four frames. */
    const int groups = components == 4 ? frames : components;
    UNROLLED for (int g = 0; g < groups; ++g) {
        vec each[4];
        float four[4];
        UNROLLED for (int i = 0; i < 4; ++i)
            each[i] = unrolled_sum(components == 4 ? sums[g][i] : sums[i][g]);
        vec_sum4(each, four);
        UNROLLED for (int i = 0; i < 4; ++i)
            totals[components == 4 ? g * CHUNK + i : i * CHUNK + g] += (double)four[i];
    }
}

/* A diagonal tile lies within a group of `group` components; the centres of the others lie `stride` apart. */
#define DIAGONAL(name, frames, components)                                                                        \
    SEPARATE void name(const float *high, const float *low, size_t step, const float *parameters, size_t group,      \
                       size_t n, double *totals) {                                                                \
        distance_tile(frames, components, true, high, low, step, parameters, IFE_DIAGONAL_BLOCK,                  \
                      group * IFE_DIAGONAL_BLOCK, n, totals);                                                     \
    }
#define EUCLIDEAN(name, frames, components)                                                                       \
    SEPARATE void name(const float *points, size_t step, const float *centres, size_t stride, size_t n,             \
                       double *totals) {                                                                          \
        distance_tile(frames, components, false, points, points, step, centres, stride, IFE_LANES, n, totals);    \
    }
DIAGONAL(diagonal_1x1, 1, 1)
DIAGONAL(diagonal_1x2, 1, 2)
DIAGONAL(diagonal_1x4, 1, 4)
DIAGONAL(diagonal_many_x1, FRAMES, 1)
DIAGONAL(diagonal_many_x2, FRAMES, 2)
EUCLIDEAN(euclidean_1x1, 1, 1)
EUCLIDEAN(euclidean_1x2, 1, 2)
EUCLIDEAN(euclidean_1x4, 1, 4)
EUCLIDEAN(euclidean_many_x1, FRAMES, 1)
EUCLIDEAN(euclidean_many_x2, FRAMES, 2)
#if COMPONENTS == 4
DIAGONAL(diagonal_many_x4, FRAMES, 4)
EUCLIDEAN(euclidean_many_x4, FRAMES, 4)
#endif

/* Frames that a tile of n_frames holds. */
INLINE size_t tile_frames(size_t n_frames) {
    return n_frames >= FRAMES ? FRAMES : 1;
}

/* Diagonal: any number of frames; the features from `start` of the components first .. first + n_components - 1. */
INLINE void diagonal_distances(const ife_scorer *scorer, const float *high, const float *low, size_t step,
                               size_t n_frames, size_t first, size_t n_components, size_t start, size_t n,
                               double *totals) {
    for (size_t f = 0, frames; f < n_frames; f += frames) {
        frames = tile_frames(n_frames - f);
        const float *h = high + f * step, *l = low + f * step;
        for (size_t c = 0, wide; c < n_components; c += wide) {
            const ife_group group = ife_group_of((size_t)scorer->n_components, first + c);
            const float *parameters = scorer->centres + ife_diagonal_start(group, scorer->padded, first + c) +
                                      start / IFE_LANES * group.size * IFE_DIAGONAL_BLOCK;
            double *into = totals + f * CHUNK + c;
            const size_t most = frames > 1 ? COMPONENTS : 4, left = n_components - c;
            const size_t inside = group.first + group.size - (first + c); /* components up to the group's end */
            wide = most >= 4 && left >= 4 && inside >= 4 ? 4 : left >= 2 && inside >= 2 ? 2 : 1;
            ife_count_bytes(2 * wide * n * sizeof *parameters);
            if (frames == 1)
                (wide == 4 ? diagonal_1x4 : wide == 2 ? diagonal_1x2 : diagonal_1x1)(h, l, step, parameters, group.size, n,
                                                                                     into);
#if COMPONENTS == 4
            else if (wide == 4)
                diagonal_many_x4(h, l, step, parameters, group.size, n, into);
#endif
            else
                (wide == 2 ? diagonal_many_x2 : diagonal_many_x1)(h, l, step, parameters, group.size, n, into);
        }
    }
}

/* Any number of frames and of centres `stride` apart. */
INLINE void euclidean_distances(const float *points, size_t step, size_t n_frames, const float *centres, size_t stride,
                                size_t n_components, size_t n, double *totals) {
    for (size_t f = 0, frames; f < n_frames; f += frames) {
        frames = tile_frames(n_frames - f);
        const float *point = points + f * step;
        for (size_t c = 0, wide; c < n_components; c += wide) {
            const float *centre = centres + c * stride;
            double *into = totals + f * CHUNK + c;
            const size_t most = frames > 1 ? COMPONENTS : 4, left = n_components - c;
            wide = most >= 4 && left >= 4 ? 4 : left >= 2 ? 2 : 1;
            ife_count_bytes(wide * n * sizeof *centre);
            if (frames == 1)
                (wide == 4 ? euclidean_1x4 : wide == 2 ? euclidean_1x2 : euclidean_1x1)(point, step, centre, stride, n, into);
#if COMPONENTS == 4
            else if (wide == 4)
                euclidean_many_x4(point, step, centre, stride, n, into);
#endif
            else
                (wide == 2 ? euclidean_many_x2 : euclidean_many_x1)(point, step, centre, stride, n, into);
        }
    }
}
