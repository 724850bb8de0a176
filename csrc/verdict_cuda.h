/* A frame's verdict in CUDA: prediction, the guard that judges it, the rule, and which block applies it. */
#ifndef INFLIGHT_VERDICT_CUDA_H
#define INFLIGHT_VERDICT_CUDA_H

#include "reduce_cuda.h"

#include <limits.h>

/* Index of the largest logit, -1 when one is not finite; in every thread. */
static __device__ int32_t predict(const float *logits, int32_t n_classes) {
    indexed best = {-INFINITY, INT32_MAX};
    int nonfinite = 0;
    for (int32_t c = (int32_t)threadIdx.x; c < n_classes; c += IFE_CUDA_BLOCK) {
        const indexed candidate = {logits[c], c};
        nonfinite |= ife_magnitude_bits(candidate.value) >= IFE_NONFINITE_BITS;
        best = larger(best, candidate);
    }
    if (__syncthreads_or(nonfinite)) return -1;
    return block_largest(best).index;
}

/* The guard of a predicted class, or NULL. */
static __device__ const ife_cuda_guard *find_guard(const ife_cuda_params *params, int32_t predicted) {
    for (int32_t g = 0; g < params->n_guards; ++g)
        if (params->guards[g].target == predicted) return params->guards + g;
    return NULL;
}

/* The rule of inflight_edge.verdict.decide, fails closed; the whole block, result in thread 0. */
static __device__ ife_cuda_verdict decide(const ife_cuda_guard *judge, const float *log_likelihoods) {
    indexed best = {-INFINITY, INT32_MAX};
    int unusable = 0;
    for (int32_t c = (int32_t)threadIdx.x; c < judge->guard.n_rows; c += IFE_CUDA_BLOCK) {
        /* Past the L1 cache, which may hold nothing newer than this block. */
        const indexed candidate = {__ldcg(log_likelihoods + c), c};
        unusable |= !(candidate.value < INFINITY); /* NaN too */
        if (c != judge->target_row) best = larger(best, candidate);
    }
    unusable = __syncthreads_or(unusable);
    best = block_largest(best);
    ife_cuda_verdict verdict = {IFE_CUDA_UNJUDGED, judge->target, -1, NAN};
    if (unusable || threadIdx.x != 0) return verdict;
    const float margin = best.value - __ldcg(log_likelihoods + judge->target_row);
    if (margin < 0.0f) {
        verdict.decision = IFE_CUDA_ACCEPT;
        verdict.margin = margin;
    } else if (margin >= 0.0f) {
        verdict.decision = IFE_CUDA_TRIGGER;
        verdict.source = judge->classes[best.index];
        verdict.margin = margin;
    }
    return verdict;
}

/* A frame that no guard scores: one block writes, the others have nothing to do. */
static __device__ void write_unscored(ife_cuda_decision decision, int32_t predicted, int32_t max_rows, ife_cuda_verdict *verdict,
                                      float *log_likelihoods) {
    if (blockIdx.y != 0) return;
    for (int32_t c = (int32_t)threadIdx.x; c < max_rows; c += IFE_CUDA_BLOCK) log_likelihoods[c] = NAN;
    const ife_cuda_verdict unscored = {decision, predicted, -1, NAN};
    if (threadIdx.x == 0) *verdict = unscored;
}

/* True in every thread of the block that is the last of n_groups to come here for this frame. */
static __device__ int is_last(uint32_t *ticket, int32_t n_groups) {
    __shared__ int last;
    if (n_groups == 1) return 1; /* every path here has passed a barrier since the scores were written */
    __threadfence();             /* this thread's scores are visible to all blocks before the ticket is */
    __syncthreads(); /* between blocks: every thread's fence comes before the ticket */
    if (threadIdx.x == 0) {
        last = atomicAdd(ticket, 1u) == (uint32_t)(n_groups - 1);
        if (last) *ticket = 0; /* ready for the next launch: no other block comes any more */
    }
    __syncthreads();
    if (last) __threadfence(); /* no score is read before the ticket */
    return last;
}

#endif
