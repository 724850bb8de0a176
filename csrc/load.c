/* A guard laid out as the scorers read it. */
#include "score.h"
#include "score_math.h"

#include <float.h>
#include <stdlib.h>

/* Parameters, in bytes, above which the verdict reads their codes first: below, they are in the caches anyway. */
#define CODED_BYTES (1 << 19)
/* Work, in multiplications, that finding the subspace of the means may cost at load: seconds. */
#define SUBSPACE_WORK 4e9

/* Aligned to 64 bytes, all zero; NULL when there is none. */
static void *zeroed(size_t count, size_t size) {
    const size_t bytes = (count * size + 63) / 64 * 64;
    void *memory = aligned_alloc(64, bytes ? bytes : 64);
    if (memory) memset(memory, 0, bytes);
    return memory;
}

static float *copy(const float *source, size_t rows, size_t columns, size_t stride) {
    float *target = zeroed(rows * stride, sizeof *target);
    for (size_t r = 0; target && r < rows; ++r)
        memcpy(target + r * stride, source + r * columns, columns * sizeof *target);
    return target;
}

static float *interleave(const ife_guard *guard, size_t padded) {
    const size_t n = (size_t)guard->n_features, m = (size_t)guard->n_components;
    float *target = zeroed(2 * m * padded, sizeof *target);
    for (size_t k = 0; target && k < m; ++k)
        for (size_t d = 0; d < n; ++d) {
            const ife_group group = ife_group_of(m, k);
            float *block = target + ife_diagonal_start(group, padded, k) + d / IFE_LANES * group.size * IFE_DIAGONAL_BLOCK;
            block[d % IFE_LANES] = guard->centres[k * n + d];
            block[IFE_LANES + d % IFE_LANES] = guard->whitener[k * n + d];
        }
    return target;
}

static float *make_panels(const ife_guard *guard, size_t padded) {
    const size_t n = (size_t)guard->n_features, m = guard->kind == IFE_FULL ? (size_t)guard->n_components : 1;
    const size_t size = ife_panel_start(padded / IFE_LANES);
    float *target = zeroed(m * size, sizeof *target);
    const float *packed = guard->whitener;
    for (size_t k = 0; target && k < m; ++k)
        for (size_t row = 0; row < n; packed += ++row) {
            float *panel = target + k * size + ife_panel_start(row / IFE_LANES) + row % IFE_LANES;
            for (size_t d = 0; d <= row; ++d) panel[d * IFE_LANES] = packed[d];
        }
    return target;
}

/* Orthonormal basis (rank, D) of the differences of the centres: Gram-Schmidt, twice.  Returns the rank. */
static size_t span_centres(const ife_guard *guard, double *basis) {
    const size_t n = (size_t)guard->n_features;
    size_t rank = 0;
    for (size_t k = 1; k < (size_t)guard->n_components; ++k) {
        double *vector = basis + rank * n;
        double before = 0.0, after = 0.0;
        for (size_t d = 0; d < n; ++d) {
            vector[d] = (double)guard->centres[k * n + d] - guard->centres[d];
            before += vector[d] * vector[d];
        }
        for (int pass = 0; pass < 2; ++pass)
            for (size_t r = 0; r < rank; ++r) {
                double product = 0.0;
                for (size_t d = 0; d < n; ++d) product += basis[r * n + d] * vector[d];
                for (size_t d = 0; d < n; ++d) vector[d] -= product * basis[r * n + d];
            }
        for (size_t d = 0; d < n; ++d) after += vector[d] * vector[d];
        /* A part of less than 1e-9 of the vector is the rounding of what was subtracted. */
        if (!(after > 1e-18 * before)) continue;
        for (size_t d = 0; d < n; ++d) vector[d] /= sqrt(after);
        ++rank;
    }
    return rank;
}

/* Fills rank, basis, positions and largest_norm of a shared guard where the subspace saves reading; false: no memory. */
static bool make_subspace(const ife_guard *guard, ife_scorer *scorer) {
    const size_t n = (size_t)guard->n_features, m = (size_t)guard->n_components, padded = scorer->padded;
    if (2 * (m - 1) >= n || (double)m * (double)n * (double)(2 * m + n) > SUBSPACE_WORK) return true;
    double *span = malloc(m * n * sizeof *span);
    double *row = malloc(n * sizeof *row);
    bool enough = span && row;
    const size_t rank = enough ? span_centres(guard, span) : 0, width = ife_padded(rank);
    scorer->basis = zeroed((rank + 3) / 4 * 4 * padded, sizeof *scorer->basis);
    scorer->positions = zeroed(m * width, sizeof *scorer->positions);
    enough = enough && scorer->basis && scorer->positions;
    for (size_t r = 0; enough && r < rank; ++r) {
        const float *packed = guard->whitener;
        memset(row, 0, n * sizeof *row);
        for (size_t i = 0; i < n; packed += ++i)
            for (size_t d = 0; d <= i; ++d) row[d] += span[r * n + i] * packed[d];
        for (size_t d = 0; d < n; ++d) scorer->basis[r * padded + d] = (float)row[d];
        for (size_t k = 0; k < m; ++k) {
            double product = 0.0;
            for (size_t d = 0; d < n; ++d) product += span[r * n + d] * guard->centres[k * n + d];
            scorer->positions[k * width + r] = (float)product;
        }
    }
    double whitener = 0.0, farthest = 0.0;
    for (size_t i = 0; i < n * (n + 1) / 2; ++i) whitener += (double)guard->whitener[i] * guard->whitener[i];
    for (size_t k = 0; k < m; ++k) {
        double norm = 0.0;
        for (size_t d = 0; d < n; ++d) norm += (double)guard->centres[k * n + d] * guard->centres[k * n + d];
        farthest = norm > farthest ? norm : farthest;
    }
    /* |W x - c|^2 <= 2 |W|^2 |x|^2 + 2 |c|^2, to be below FLT_MAX with room for rounding. */
    scorer->largest_norm = (0.25 * FLT_MAX - farthest) / whitener;
    scorer->rank = (int32_t)rank;
    free(span);
    free(row);
    return enough;
}

/* Codes of one component.  A weight keeps the upper bits of its float: as many as its range leaves room for. */
static void encode(const float *centres, const float *weights, size_t n, ife_code *code, uint8_t *bytes) {
    float low = centres[0], high = centres[0], least = 0.0f, most = 0.0f;
    for (size_t d = 0; d < n; ++d) {
        low = centres[d] < low ? centres[d] : low;
        high = centres[d] > high ? centres[d] : high;
        if (weights) {
            least = d == 0 || weights[d] < least ? weights[d] : least;
            most = weights[d] > most ? weights[d] : most;
        }
    }
    code->start = low;
    code->step = (high * 0.5f - low * 0.5f) / 127.5f;
    code->least = code->most = 1.0f;
    if (weights) {
        code->base = (int32_t)ife_magnitude_bits(least);
        const int32_t range = (int32_t)ife_magnitude_bits(most) - code->base;
        while ((range >> code->shift) > 255) ++code->shift;
    }
    double error = 0.0, size = 0.0, least_ratio = INFINITY, most_ratio = 0.0;
    for (size_t d = 0; d < n; ++d) {
        uint8_t *block = bytes + (weights ? 2 : 1) * (d / IFE_LANES * IFE_LANES) + d % IFE_LANES;
        const double steps = code->step > 0.0f ? ((double)centres[d] - low) / code->step : 0.0;
        block[0] = (uint8_t)(steps < 255.0 ? steps + 0.5 : 255.0);
        const double centre = (double)block[0] * code->step + low;
        double weight = 1.0;
        if (weights) {
            const int32_t dropped = ((int32_t)ife_magnitude_bits(weights[d]) - code->base) >> code->shift;
            const int32_t bits = code->base + dropped * (1 << code->shift);
            float decoded;
            memcpy(&decoded, &bits, sizeof decoded);
            block[IFE_LANES] = (uint8_t)dropped;
            weight = weights[d];
            least_ratio = weight / decoded < least_ratio ? weight / decoded : least_ratio;
            most_ratio = weight / decoded > most_ratio ? weight / decoded : most_ratio;
        }
        error += (centres[d] - centre) * (centres[d] - centre) * weight * weight;
        const double reach = fmax(fabs((double)centres[d]), fmax(fabs((double)low), fabs((double)high)));
        size += reach * reach * weight * weight;
    }
    if (weights) {
        code->least = (float)(least_ratio * (1.0 - 1e-7));
        code->most = (float)(most_ratio * (1.0 + 1e-7));
    }
    /* z and centre^ are rounded to floats: 2^-20 of |centre weight| is several times what that can move y. */
    code->error = (float)((sqrt(error) + ldexp(1.0, -20) * sqrt(size)) * (1.0 + 1e-6));
}

/* Codes where the verdict gains by them; false: no memory. */
static bool make_codes(const ife_guard *guard, ife_scorer *scorer) {
    const size_t n = (size_t)guard->n_features, m = (size_t)guard->n_components;
    const bool diagonal = guard->kind == IFE_DIAGONAL;
    const size_t size = (diagonal ? 2 : 1) * scorer->padded;
    if (guard->kind == IFE_FULL || scorer->rank || !scorer->kernels->reads_codes) return true;
    if (guard->n_rows < 3 || n < IFE_LANES || guard->n_components > IFE_BOUNDED_COMPONENTS) return true;
    if (m * size * sizeof(float) < CODED_BYTES) return true;
    if (diagonal)
        for (size_t i = 0; i < m * n; ++i)
            if (!(guard->whitener[i] > 0.0f)) return true;
    scorer->codes = zeroed(m * size, 1);
    scorer->coding = zeroed(m, sizeof *scorer->coding);
    if (!scorer->codes || !scorer->coding) return false;
    for (size_t k = 0; k < m; ++k)
        encode(guard->centres + k * n, diagonal ? guard->whitener + k * n : NULL, n, &scorer->coding[k],
               scorer->codes + k * size);
    return true;
}

ife_status ife_scorer_create(const ife_guard *guard, const int32_t *classes, int32_t target_row,
                             const char *instruction_set, ife_scorer **scorer) {
    if (!scorer) return IFE_INVALID;
    *scorer = NULL;
    if (ife_guard_check(guard) != IFE_OK || !classes) return IFE_INVALID;
    if (target_row < 0 || target_row >= guard->n_rows) return IFE_INVALID;
    const ife_kernels *kernels = NULL;
    for (int32_t i = 0; !kernels && ife_instruction_set(i); ++i)
        if (!instruction_set || !strcmp(instruction_set, ife_instruction_set(i))) kernels = ife_kernels_at(i);
    if (!kernels) return IFE_UNSUPPORTED;
    ife_scorer *made = zeroed(1, sizeof *made);
    if (!made) return IFE_NO_MEMORY;
    const size_t n = (size_t)guard->n_features, m = (size_t)guard->n_components, rows = (size_t)guard->n_rows;
    const size_t padded = made->padded = ife_padded(n);
    made->kernels = kernels;
    made->kind = guard->kind;
    made->n_features = guard->n_features;
    made->n_rows = guard->n_rows;
    made->n_components = guard->n_components;
    made->target_row = target_row;
    made->offsets = zeroed(rows + 1, sizeof *made->offsets);
    made->classes = zeroed(rows, sizeof *made->classes);
    made->constants = copy(guard->constants, 1, m, m);
    made->mean = copy(guard->mean, 1, n, padded);
    made->scale = copy(guard->scale, 1, n, padded);
    made->inverse_scale = zeroed(padded, sizeof *made->inverse_scale);
    made->origin = guard->origin ? copy(guard->origin, 1, n, padded) : NULL;
    made->centres = guard->kind == IFE_DIAGONAL ? interleave(guard, padded) : copy(guard->centres, m, n, padded);
    made->panels = guard->kind == IFE_DIAGONAL ? NULL : make_panels(guard, padded);
    if (!made->offsets || !made->classes || !made->constants || !made->mean || !made->scale || !made->inverse_scale ||
        !made->centres || (guard->origin && !made->origin) || (guard->kind != IFE_DIAGONAL && !made->panels) ||
        (guard->kind == IFE_SHARED && !make_subspace(guard, made)) || !make_codes(guard, made)) {
        ife_scorer_destroy(made);
        return IFE_NO_MEMORY;
    }
    /* Full: the sum over the first rows of a triangle only grows.  Of two classes both are needed. */
    made->bounded = made->codes || (made->kind == IFE_FULL && made->n_rows >= 3 &&
                                    made->n_components <= IFE_BOUNDED_COMPONENTS);
    memcpy(made->offsets, guard->offsets, (rows + 1) * sizeof *made->offsets);
    memcpy(made->classes, classes, rows * sizeof *made->classes);
    for (size_t d = n; d < padded; ++d) made->scale[d] = 1.0f;
    for (size_t d = 0; d < padded; ++d) made->inverse_scale[d] = 1.0f / made->scale[d];
    *scorer = made;
    return IFE_OK;
}

void ife_scorer_destroy(ife_scorer *scorer) {
    if (!scorer) return;
    free(scorer->offsets);
    free(scorer->classes);
    free(scorer->constants);
    free(scorer->mean);
    free(scorer->scale);
    free(scorer->inverse_scale);
    free(scorer->origin);
    free(scorer->centres);
    free(scorer->panels);
    free(scorer->basis);
    free(scorer->positions);
    free(scorer->codes);
    free(scorer->coding);
    free(scorer);
}
