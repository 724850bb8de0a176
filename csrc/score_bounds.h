/* The verdict without most of the parameters: bounds that leave out rows which cannot be the best. */

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
    ife_count_bytes((diagonal ? 2 : 1) * (end - start) + sizeof *code);
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

/* score_best for the other kinds; both apart, so that their scratch is not on the stack at the same time. */
SEPARATE ife_status score_best_coded(const ife_scorer *scorer, const float *features, float *out, int32_t *n_scored) {
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

static ife_status score_best(const ife_scorer *scorer, const float *features, float *out, int32_t *n_scored) {
    return scorer->kind == IFE_FULL ? score_best_full(scorer, features, out, n_scored)
                                    : score_best_coded(scorer, features, out, n_scored);
}
