/* Log-likelihood of a feature vector under the densities of one guard, and the verdict on it: the C interface. */
#ifndef INFLIGHT_H
#define INFLIGHT_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* What the shared library exports. */
#if defined(__GNUC__)
#define IFE_API __attribute__((visibility("default")))
#else
#define IFE_API
#endif

/* The scorers keep vectors of this length on the stack: a call takes up to 224 KiB of it. */
#define IFE_MAX_FEATURES 16384
/* Far more than any guard has; counts of rows and frames stay clear of INT32_MAX. */
#define IFE_MAX_COMPONENTS 1048576

typedef enum {
    IFE_OK = 0,
    IFE_NONFINITE = 1,  /* a feature is NaN or infinite: every output of that frame is NaN */
    IFE_INVALID = 2,    /* the guard or an argument breaks its contract */
    IFE_NO_MEMORY = 3,  /* the allocation at load failed */
    IFE_UNSUPPORTED = 4 /* this processor or this build lacks the instruction set */
} ife_status;

/* Form of ife_guard.whitener. */
typedef enum { IFE_DIAGONAL = 0, IFE_SHARED = 1, IFE_FULL = 2 } ife_kind;

/*
 * Parameters of one guard.  Every array belongs to the caller and is only read.
 * D = n_features, R = n_rows, M = n_components; z = (features - mean) / scale, without a unit.
 *
 * offsets    (R + 1)  density row r owns the components offsets[r] .. offsets[r + 1] - 1; strictly increasing, 0 to M
 * mean       (D)
 * scale      (D)      >= FLT_MIN
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

/* Zero is IFE_VERDICT_INVALID: memory nobody filled in is never an acceptance. */
typedef enum { IFE_VERDICT_INVALID = 0, IFE_VERDICT_ACCEPT = 1, IFE_VERDICT_TRIGGER = 2 } ife_decision;

/* Verdict on one frame that the classifier predicted as the guard's target. */
typedef struct {
    int32_t decision; /* an ife_decision */
    int32_t source;   /* TRIGGER: class index of the best other class, the lowest among equals; else -1 */
    double margin;    /* nats: best other log-likelihood - target's; < 0 accepts, >= 0 is a trigger, NaN is invalid */
    int32_t n_scored; /* density rows whose parameters were read in full; the others were excluded by bounds */
    int32_t n_rows;
} ife_verdict;

/* A guard laid out for one instruction set.  Never changes after ife_scorer_create: any number of threads share it. */
typedef struct ife_scorer ife_scorer;

/* IFE_OK, or IFE_INVALID when a count, pointer or offset breaks the contract above, or a parameter is not finite. */
IFE_API ife_status ife_guard_check(const ife_guard *guard);

/* Instruction set i that this processor runs, fastest first: "avx512", "avx2", "neon", "portable"; NULL past the end. */
IFE_API const char *ife_instruction_set(int32_t i);

/*
 * Copies a guard into the layout that the scorers read; nothing of the caller's is kept.
 *
 * classes          (R)  class index of each density row
 * target_row            density row of the guard's target class
 * instruction_set       one of the names above, or NULL for the fastest
 * scorer                set to the new scorer, or to NULL when the status is not IFE_OK
 */
IFE_API ife_status ife_scorer_create(const ife_guard *guard, const int32_t *classes, int32_t target_row,
                             const char *instruction_set, ife_scorer **scorer);

/* NULL is allowed. */
IFE_API void ife_scorer_destroy(ife_scorer *scorer);

/*
 * Log-likelihood of one feature vector under each density row: features (D) -> log_likelihoods (R), nats.
 *
 * No heap, no lock, no global state.  A squared distance above FLT_MAX gives -INFINITY, never NaN.
 * Error: at most 1e-5 of the sum of the magnitudes of the terms added (weight, normaliser and half squared distance of
 * each component, by its share in the row), however small the deviations are against z.  Shared adds u (d + u), with
 * d = |W (z - mean)| and u = 2^-22 | |W| |z - origin| |: it matters where means lie thousands of deviations apart.
 */
IFE_API ife_status ife_score(const ife_scorer *scorer, const float *features, float *log_likelihoods);

/*
 * The same for n_frames: features (n_frames, D) -> log_likelihoods (n_frames, R), bit for bit what ife_score gives.
 * IFE_NONFINITE when it holds for at least one frame; the others are scored.
 */
IFE_API ife_status ife_score_batch(const ife_scorer *scorer, const float *features, size_t n_frames,
                                   float *log_likelihoods);

/*
 * Verdict on one frame.  No heap, no lock.  Reads less than ife_score where the verdict needs less:
 * a shared guard of few components (M <= D / 2) is judged in the subspace of its means; the margin then differs from
 * the difference of two log-likelihoods by their error at most.  A diagonal or shared guard of many rows is read with
 * 8 bits a parameter first, and in full only where the bounds from that leave a doubt: decision, source and margin are
 * those of all log-likelihoods, bit for bit.  So they are of a full guard, whose rows are left where the sum over the
 * first rows of their triangle is already too large.
 */
IFE_API ife_status ife_judge(const ife_scorer *scorer, const float *features, ife_verdict *verdict);

/*
 * ife_score, and the verdict that its log-likelihoods (R) make: one pass, for a reader who wants both.  No heap, no lock.
 * Not finite: every log-likelihood is NaN, the verdict is INVALID.
 */
IFE_API ife_status ife_explain(const ife_scorer *scorer, const float *features, float *log_likelihoods,
                               ife_verdict *verdict);

/* Class index of the largest of logits (n_classes), the lowest among equals; -1 when one is not finite or none there. */
IFE_API int32_t ife_predict(const float *logits, int32_t n_classes);

/* Bytes of a frame.  NV12: height rows of luma, then height / 2 rows of interleaved U and V, both sides even. */
typedef enum { IFE_GREY = 0, IFE_RGB = 1, IFE_BGR = 2, IFE_NV12 = 3 } ife_pixels;

/* A frame, 8 bits a sample.  matrix and full_range are read for NV12 alone. */
typedef struct {
    int32_t pixels; /* an ife_pixels */
    int32_t height;
    int32_t width;
    int32_t bt709;      /* 0: ITU-R BT.601, 1: BT.709 */
    int32_t full_range; /* 0: luma 16..235 and chroma 16..240, 1: both 0..255 */
    size_t stride;      /* bytes from one row to the next, of either plane */
    const uint8_t *samples;
    const uint8_t *chroma; /* NV12: first row of U and V; else NULL */
} ife_image;

/* The network's input: (channels, height, width), input = (pixel * scale - mean) / deviation. */
typedef struct {
    int32_t channels; /* 1 or 3 */
    int32_t height;
    int32_t width;
    float scale;
    float mean[3];
    float deviation[3];
} ife_input;

/* Floats of scratch that ife_preprocess needs, 0 when the image or the input breaks its contract. */
IFE_API size_t ife_preprocess_scratch(const ife_image *image, const ife_input *input);

/*
 * Frame to tensor (channels, height, width) in one pass: colour, bilinear resize, normalisation.
 *
 * Half-pixel centres, edges clamped, no antialiasing, nothing rounded to 8 bits.  NV12: each 2 x 2 block shares its
 * chroma, R, G and B are clamped to 0..255 before the resize.  Grey becomes equal channels; colour becomes BT.601 luma
 * for a one-channel network.  scratch: ife_preprocess_scratch floats.  No heap, no lock.
 */
IFE_API ife_status ife_preprocess(const ife_image *image, const ife_input *input, float *scratch, float *tensor);

#ifdef __cplusplus
}
#endif
#endif
