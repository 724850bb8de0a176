/* Products with triangular whiteners, and coordinates in the subspace of the means. */

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
            ife_count_bytes(n_columns * IFE_LANES * sizeof *panel);
            if (count == 1)
                panel_one(panel, from, n_columns, target);
            else
                panel_many(panel, from, step, n_columns, target, y ? step : IFE_LANES);
            for (size_t i = 0; norms && i < count; ++i) norms[f + i] += squared_norm(rows + i * IFE_LANES, IFE_LANES);
        }
    }
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
            ife_count_bytes(4 * (end - start) * sizeof *basis);
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
