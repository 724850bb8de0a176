/* Verdicts and preprocessing on an NVIDIA GPU, and CUDA graphs of what a caller enqueues.  The C interface. */
#ifndef INFLIGHT_CUDA_H
#define INFLIGHT_CUDA_H

#include "inflight.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Threads of a block; a power of two times 32.  One warp works on one component (full: one row of its whitener). */
#ifndef IFE_CUDA_BLOCK
#define IFE_CUDA_BLOCK 256
#endif
/* Blocks that share one frame, each a group of density rows: the limit of a grid's second axis. */
#define IFE_CUDA_MAX_GROUPS 65535

/* Zero is not an acceptance: nor is memory that nobody filled in. */
typedef enum {
    IFE_CUDA_UNJUDGED = 0, /* Decision.INVALID */
    IFE_CUDA_ACCEPT = 1,
    IFE_CUDA_TRIGGER = 2,
    IFE_CUDA_UNGUARDED = 3
} ife_cuda_decision;

/* Verdict on one frame; what is not known is -1 or NaN.  Same rule as inflight_edge.verdict.decide. */
typedef struct {
    int32_t decision;  /* an ife_cuda_decision */
    int32_t predicted; /* index of the largest logit, the lowest among equals */
    int32_t source;    /* of a TRIGGER: class of the best non-target density row */
    float margin;      /* nats: best non-target log-likelihood - the target's */
} ife_cuda_verdict;

/* One guard of a detector.  The pointers inside `guard`, and `classes`, are device addresses. */
typedef struct {
    ife_guard guard;
    int32_t target;         /* predicted class that this guard judges */
    int32_t target_row;     /* its density row, 0 .. R - 1 */
    const int32_t *classes; /* (R) class index of each row */
} ife_cuda_guard;

/*
 * What a launch needs besides frames.  This struct is in host memory, what it points to in device memory.
 *
 * guards   (n_guards)    each one has passed ife_guard_check before its arrays were copied
 * tickets  (max_frames)  zero before the first launch and after every launch; launches that share them share a stream
 */
typedef struct {
    int32_t n_guards;
    int32_t n_features; /* D, the same in every guard */
    int32_t n_classes;  /* C, number of logits */
    int32_t max_rows;   /* largest R of a guard */
    int32_t n_groups;   /* blocks per frame, see ife_cuda_groups */
    int32_t max_frames;
    int32_t n_vectors; /* feature vectors in shared memory: 3 when a guard is full, else 2 */
    const ife_cuda_guard *guards;
    uint32_t *tickets;
} ife_cuda_params;

/* Where a launch writes: device memory, or host memory mapped into the device. */
typedef struct {
    ife_cuda_verdict *verdicts; /* (n) */
    float *log_likelihoods;     /* (n, max_rows) nats; NaN past a guard's rows and for frames that no guard scored */
} ife_cuda_out;

/* Blocks per frame that suit one guard; a detector takes the largest of its guards. */
int32_t ife_cuda_groups(int32_t kind, int32_t n_rows, int32_t n_components);

/* Bytes of shared memory that a block asks for at launch. */
int32_t ife_cuda_shared_bytes(const ife_cuda_params *params);

/*
 * Enqueue the verdicts on n frames: features (n, D), logits (n, C), both in device memory.  One kernel launch (none for
 * n = 0), no allocation, no synchronisation; may be captured into a graph.  logits NULL: every frame is scored
 * by the first guard, as if its target had been predicted.
 *
 * stream is a cudaStream_t or CUstream of the current context.  Returns 0 or a cudaError_t: cudaErrorInvalidValue
 * when an argument breaks its contract or D needs more shared memory than the device has.
 */
int ife_cuda_launch(const ife_cuda_params *params, const float *features, const float *logits, const ife_cuda_out *out,
                    int32_t n, void *stream);

/*
 * Enqueue the preprocessing of one frame, as ife_preprocess does it: image->samples, image->chroma and tensor
 * (channels, height, width) are device addresses, or host memory mapped into the device.  One kernel launch, no
 * scratch, no synchronisation; may be captured into a graph, with the addresses as they are.
 * Returns 0 or a cudaError_t: cudaErrorInvalidValue when the image or the input breaks its contract.
 */
int ife_cuda_preprocess(const ife_image *image, const ife_input *input, float *tensor, void *stream);

/* Text of a status that a function here returned. */
const char *ife_cuda_error_text(int status);

/* A captured sequence of work, ready to be launched any number of times.  Addresses and shapes in it are fixed. */
typedef struct ife_cuda_graph ife_cuda_graph;

/* Enqueues work on the stream, without waiting for it; 0 or a cudaError_t. */
typedef int (*ife_cuda_enqueue)(void *context, void *stream);

/*
 * Capture what enqueue puts on the stream (any but the default one): nothing of it runs now.  What it puts there
 * must have run once before, as CUDA loads kernels at their first launch.  Returns 0 and a graph, or a status and
 * *graph = NULL; the stream is usable again either way.
 */
int ife_cuda_graph_capture(ife_cuda_enqueue enqueue, void *context, void *stream, ife_cuda_graph **graph);
/* Enqueue all of the graph's work. */
int ife_cuda_graph_launch(ife_cuda_graph *graph, void *stream);
/* Free the graph, when no launch of it is running; NULL is allowed. */
int ife_cuda_graph_destroy(ife_cuda_graph *graph);

#ifdef __cplusplus
}
#endif
#endif
