/* The C interface: checks, the choice of the instruction set, scores, the verdict. */
#include "score.h"
#include "score_math.h"

#include <float.h>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#ifdef IFE_COUNT_BYTES
IFE_API uint64_t ife_bytes_read;
#endif

static bool all_finite(const float *array, size_t n) {
    uint32_t largest = 0;
    for (size_t i = 0; i < n; ++i) {
        const uint32_t bits = ife_magnitude_bits(array[i]);
        largest = bits > largest ? bits : largest;
    }
    return largest < IFE_NONFINITE_BITS;
}

ife_status ife_guard_check(const ife_guard *guard) {
    if (!guard || guard->kind < IFE_DIAGONAL || guard->kind > IFE_FULL) return IFE_INVALID;
    if (guard->n_features < 1 || guard->n_features > IFE_MAX_FEATURES) return IFE_INVALID;
    if (guard->n_rows < 1 || guard->n_components < guard->n_rows || guard->n_components > IFE_MAX_COMPONENTS)
        return IFE_INVALID;
    if (!guard->offsets || !guard->mean || !guard->scale || !guard->centres || !guard->whitener || !guard->constants)
        return IFE_INVALID;
    if ((guard->kind == IFE_SHARED) != (guard->origin != NULL)) return IFE_INVALID;
    if (guard->offsets[0] != 0 || guard->offsets[guard->n_rows] != guard->n_components) return IFE_INVALID;
    for (int32_t c = 0; c < guard->n_rows; ++c)
        if (guard->offsets[c] >= guard->offsets[c + 1]) return IFE_INVALID;
    const size_t n = (size_t)guard->n_features, m = (size_t)guard->n_components, triangle = ife_packed_row(n);
    const size_t whitener = guard->kind == IFE_DIAGONAL ? m * n : guard->kind == IFE_FULL ? m * triangle : triangle;
    if (!all_finite(guard->mean, n) || !all_finite(guard->scale, n) || !all_finite(guard->centres, m * n) ||
        !all_finite(guard->whitener, whitener) || !all_finite(guard->constants, m))
        return IFE_INVALID;
    if (guard->origin && !all_finite(guard->origin, n)) return IFE_INVALID;
    /* Below FLT_MIN the reciprocal could be infinite. */
    for (size_t d = 0; d < n; ++d)
        if (!(guard->scale[d] >= FLT_MIN)) return IFE_INVALID;
    return IFE_OK;
}

const ife_kernels *ife_kernels_at(int32_t i) {
    const ife_kernels *found[4] = {NULL};
    int32_t n = 0;
#ifdef IFE_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f")) found[n++] = &ife_kernels_avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found[n++] = &ife_kernels_avx2;
#elif defined(__aarch64__)
#ifdef __linux__
    if (getauxval(AT_HWCAP) & HWCAP_ASIMD) found[n++] = &ife_kernels_neon;
#else
    found[n++] = &ife_kernels_neon; /* part of every AArch64 processor that runs an application */
#endif
#endif
    found[n++] = &ife_kernels_portable;
    return i >= 0 && i < n ? found[i] : NULL;
}

const char *ife_instruction_set(int32_t i) {
    const ife_kernels *kernels = ife_kernels_at(i);
    return kernels ? kernels->name : NULL;
}

ife_status ife_score_batch(const ife_scorer *scorer, const float *features, size_t n_frames, float *log_likelihoods) {
    return scorer->kernels->score(scorer, features, n_frames, 0, scorer->n_rows, false, log_likelihoods,
                                  (size_t)scorer->n_rows);
}

ife_status ife_score(const ife_scorer *scorer, const float *features, float *log_likelihoods) {
    return ife_score_batch(scorer, features, 1, log_likelihoods);
}

/* Goes on with the rows first .. first + count - 1: the target's value, the best other one and its class. */
static void compare(const ife_scorer *scorer, const float *rows, int32_t first, int32_t count, float *target, float *best,
                    int32_t *source) {
    for (int32_t r = 0; r < count; ++r)
        if (first + r == scorer->target_row) {
            *target = rows[r];
        } else if (rows[r] > *best) {
            *best = rows[r];
            *source = scorer->classes[first + r];
        }
}

/* The rule of inflight_edge/verdict.py. */
static void decide(float target, float best, int32_t source, int32_t n_scored, ife_verdict *verdict) {
    verdict->n_scored = n_scored;
    verdict->margin = (double)best - (double)target; /* both -INFINITY: NaN */
    if (verdict->margin < 0.0) {
        verdict->decision = IFE_VERDICT_ACCEPT;
    } else if (verdict->margin >= 0.0) {
        verdict->decision = IFE_VERDICT_TRIGGER;
        verdict->source = source;
    }
}

ife_status ife_judge(const ife_scorer *scorer, const float *features, ife_verdict *verdict) {
    float rows[IFE_BOUNDED_COMPONENTS];
    float target = -INFINITY, best = -INFINITY;
    int32_t source = -1, n_scored = scorer->n_rows;
    *verdict = (ife_verdict){IFE_VERDICT_INVALID, -1, NAN, 0, scorer->n_rows};
    for (int32_t first = 0; first < scorer->n_rows; first += IFE_BOUNDED_COMPONENTS) {
        const int32_t left = scorer->n_rows - first;
        const int32_t count = left < IFE_BOUNDED_COMPONENTS ? left : IFE_BOUNDED_COMPONENTS;
        const ife_status status =
            scorer->bounded ? scorer->kernels->score_best(scorer, features, rows, &n_scored)
                            : scorer->kernels->score(scorer, features, 1, first, first + count, true, rows, 0);
        if (status != IFE_OK) return status;
        compare(scorer, rows, first, count, &target, &best, &source);
    }
    decide(target, best, source, n_scored, verdict);
    return IFE_OK;
}

ife_status ife_explain(const ife_scorer *scorer, const float *features, float *log_likelihoods, ife_verdict *verdict) {
    float target = -INFINITY, best = -INFINITY;
    int32_t source = -1;
    *verdict = (ife_verdict){IFE_VERDICT_INVALID, -1, NAN, 0, scorer->n_rows};
    const ife_status status = ife_score(scorer, features, log_likelihoods);
    if (status != IFE_OK) return status;
    compare(scorer, log_likelihoods, 0, scorer->n_rows, &target, &best, &source);
    decide(target, best, source, scorer->n_rows, verdict);
    return IFE_OK;
}
