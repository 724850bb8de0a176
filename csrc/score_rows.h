/* The verdict of a guard with one triangle a component: rows that cannot be the best are left early. */

/*
 * Squared norm over the panels from `panel` on, added to *squared in the order of whiten: past the last panel it is
 * bit for bit what a score is made of.  Stops where the component's log-likelihood, which can only fall, has fallen
 * below best, or is NaN, which counts as -INFINITY.
 */
SEPARATE void triangle_norm(const ife_scorer *scorer, const float *features, size_t m, size_t panel, size_t end,
                            double best, float *centred, double *squared, bool *finite) {
    const float *triangle = scorer->panels + m * ife_panel_start(scorer->padded / IFE_LANES);
    const float *centre = scorer->centres + m * scorer->padded;
    float rows[IFE_LANES];
    /* The features before it are needed by every panel: all of them once, then 16 a panel. */
    size_t ready = 0;
    for (; panel < end; ++panel) {
        const size_t n_columns = (panel + 1) * IFE_LANES;
        *finite &= standardise(scorer, features, ready, n_columns, centre, centred + ready, centred + ready);
        ready = n_columns;
        ife_count_bytes(n_columns * sizeof rows);
        panel_one(triangle + ife_panel_start(panel), centred, n_columns, rows);
        *squared += squared_norm(rows, IFE_LANES);
        if ((double)ife_component(scorer->constants[m], (float)*squared) < best) return;
    }
}

/* Panels of every component that are read before the likeliest row is looked for. */
#define LEAD_PANELS 2

/* score_best for a full guard; R and M at most IFE_BOUNDED_COMPONENTS. */
SEPARATE ife_status score_best_full(const ife_scorer *scorer, const float *features, float *out, int32_t *n_scored) {
    _Alignas(64) float a[SCRATCH];
    _Alignas(64) float b[SCRATCH];
    double partial[IFE_BOUNDED_COMPONENTS];
    const size_t panels = scorer->padded / IFE_LANES, lead = LEAD_PANELS < panels ? LEAD_PANELS : panels;
    const int32_t target = scorer->target_row;
    const comparison with = {scorer->centres, scorer->padded, scorer->padded, scorer->padded};
    bool finite = true;
    *n_scored = 1;
    score_rows(scorer, features, 1, &with, target, target + 1, a, b, &finite, out + target, 1);
    if (!finite) return IFE_NONFINITE;
    double likeliest = -INFINITY;
    int32_t first = target ? 0 : scorer->n_rows > 1;
    for (int32_t r = 0; r < scorer->n_rows; ++r)
        for (int32_t k = scorer->offsets[r]; r != target && k < scorer->offsets[r + 1]; ++k) {
            partial[k] = 0.0;
            triangle_norm(scorer, features, (size_t)k, 0, lead, -INFINITY, a, &partial[k], &finite);
            const double share = (double)(lead * IFE_LANES) / (double)scorer->padded;
            const double guess = scorer->constants[k] - 0.5 * partial[k] / share;
            if (!(guess > likeliest)) continue;
            likeliest = guess;
            first = r;
        }
    float best = -INFINITY;
    /* The likeliest row first: what it reaches excludes most others early. */
    for (int32_t i = -1; i < scorer->n_rows; ++i) {
        const int32_t r = i < 0 ? first : i;
        if (r == target || (i >= 0 && r == first)) continue;
        const int32_t count = scorer->offsets[r + 1] - scorer->offsets[r];
        /* A row is at most its largest component + log count; 1e-5 covers the rounding of its log-sum-exp. */
        const double several = count > 1 ? log((double)count) + 1e-5 * (fabs((double)best) + 1.0) : 0.0;
        const double below = best > -INFINITY ? (double)best - several : -INFINITY;
        bool alive = i < 0;
        for (int32_t k = scorer->offsets[r]; !alive && k < scorer->offsets[r + 1]; ++k) {
            double squared = partial[k];
            alive = !((double)ife_component(scorer->constants[k], (float)squared) < below);
            if (!alive) continue;
            triangle_norm(scorer, features, (size_t)k, lead, panels, below, a, &squared, &finite);
            const float value = ife_component(scorer->constants[k], (float)squared);
            alive = !((double)value < below);
            if (alive && count == 1) out[r] = value;
        }
        if (!alive) {
            out[r] = -INFINITY;
            continue;
        }
        ++*n_scored;
        if (i < 0 || count > 1) score_rows(scorer, features, 1, &with, r, r + 1, a, b, &finite, out + r, 1);
        best = out[r] > best ? out[r] : best;
    }
    return IFE_OK;
}
