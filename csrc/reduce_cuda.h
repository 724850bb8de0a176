/* Reductions of a warp and of a block, in an order that depends on the number of terms alone. */
#ifndef INFLIGHT_REDUCE_CUDA_H
#define INFLIGHT_REDUCE_CUDA_H

#include "launch_cuda.h"
#include "score_math.h"

#define N_WARPS (IFE_CUDA_BLOCK / WARP)
#define ALL_LANES 0xffffffffu

typedef struct {
    float value;
    int32_t index;
} indexed;

static __device__ __forceinline__ int warp_index() {
    return (int)threadIdx.x / WARP;
}

static __device__ __forceinline__ int lane_index() {
    return (int)threadIdx.x % WARP;
}

/* Sum of term(d) over d = 0 .. n - 1, in every lane; four accumulators a lane keep four loads in flight. */
template <class Term>
static __device__ __forceinline__ float warp_sum(int32_t n, Term term) {
    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    int32_t d = lane_index();
    for (; d + 3 * WARP < n; d += 4 * WARP) {
        sums[0] += term(d);
        sums[1] += term(d + WARP);
        sums[2] += term(d + 2 * WARP);
        sums[3] += term(d + 3 * WARP);
    }
    for (; d < n; d += WARP) sums[0] += term(d);
    float sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, lanes);
    return sum;
}

/* Log-sum-exp of values[0 .. n), n >= 0, in every lane.  A lane without a value brings an empty partial. */
static __device__ __forceinline__ ife_lse warp_lse(const float *values, int32_t n) {
    ife_lse lse = {-INFINITY, 0.0f};
    for (int32_t k = lane_index(); k < n; k += WARP) {
        const ife_lse one = {values[k], 1.0f};
        lse = ife_lse_merge(lse, one);
    }
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) {
        ife_lse other;
        other.max = __shfl_xor_sync(ALL_LANES, lse.max, lanes);
        other.sum = __shfl_xor_sync(ALL_LANES, lse.sum, lanes);
        lse = ife_lse_merge(lse, other);
    }
    return lse;
}

static __device__ __forceinline__ indexed larger(indexed a, indexed b) {
    return b.value > a.value || (b.value == a.value && b.index < a.index) ? b : a;
}

/*
 * Largest of the block's candidates, the lowest index among equals, in every thread.  None of them is NaN.
 * Between two calls the block must pass another barrier.
 */
static __device__ indexed block_largest(indexed candidate) {
    __shared__ indexed slots[N_WARPS];
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) {
        indexed other;
        other.value = __shfl_xor_sync(ALL_LANES, candidate.value, lanes);
        other.index = __shfl_xor_sync(ALL_LANES, candidate.index, lanes);
        candidate = larger(candidate, other);
    }
    if (lane_index() == 0) slots[warp_index()] = candidate;
    __syncthreads();
    candidate = slots[0];
    for (int w = 1; w < N_WARPS; ++w) candidate = larger(candidate, slots[w]);
    return candidate;
}

#endif
