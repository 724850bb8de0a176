/* Log-likelihood of a feature vector under the densities of one guard: the C interface. */
#ifndef INFLIGHT_H
#define INFLIGHT_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ife_score keeps two feature vectors of this length on the stack: 2 x 64 KiB. */
#define IFE_MAX_FEATURES 16384

typedef enum {
    IFE_OK = 0,
    IFE_NONFINITE = 1, /* a feature is NaN or infinite: every output is NaN */
    IFE_INVALID = 2    /* the guard or an argument breaks its contract */
} ife_status;

/* Form of ife_guard.whitener. */
typedef enum { IFE_DIAGONAL = 0, IFE_SHARED = 1, IFE_FULL = 2 } ife_kind;

/*
 * Parameters of one guard.  Every array belongs to the caller, is only read, and must outlive the guard.
 * D = n_features, R = n_rows, M = n_components; z = (features - mean) / scale, without a unit.
 *
 * offsets    (R + 1)  density row r owns the components offsets[r] .. offsets[r + 1] - 1; strictly increasing, 0 to M
 * mean       (D)
 * scale      (D)      > 0
 * origin     (D)      shared: a point amid the component means, subtracted from z; other kinds: NULL
 * centres    (M, D)   diagonal, full: component means of z;  shared: W (component mean - origin)
 * whitener            diagonal: (M, D) 1 / standard deviation;
 *                     shared: one lower-triangular W of D (D + 1) / 2 entries, packed row by row;
 *                     full: M of them, one after another
 * constants  (M)      log weight - D/2 log(2 pi) + sum of log diag(W), nats
 */
typedef struct {
    int32_t kind; /* an ife_kind */
    int32_t n_features;
    int32_t n_rows;
    int32_t n_components;
    const int32_t *offsets;
    const float *mean;
    const float *scale;
    const float *origin;
    const float *centres;
    const float *whitener;
    const float *constants;
} ife_guard;

/* IFE_OK, or IFE_INVALID when a count, pointer or offset breaks the contract above.  Call it once, after filling in. */
ife_status ife_guard_check(const ife_guard *guard);

/*
 * Log-likelihood of one feature vector under each density row: features (D) -> log_likelihoods (R), nats.
 *
 * No heap, no lock, no global state: any number of threads may share a guard.  A squared distance above FLT_MAX
 * gives -INFINITY, never NaN.  A NaN or infinite feature makes every output NaN and the status IFE_NONFINITE.
 * The guard must have passed ife_guard_check.
 */
ife_status ife_score(const ife_guard *guard, const float *features, float *log_likelihoods);

#ifdef __cplusplus
}
#endif
#endif
