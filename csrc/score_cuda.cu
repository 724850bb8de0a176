/*
 * The scorer and the verdict in CUDA: loops, memory and reductions; the arithmetic is score_math.h's.
 * A block works on one frame and one group of density rows; the block that finishes last makes the verdict.
 */
#include "inflight_cuda.h"
#include "score_math.h"

#include <cuda_runtime.h>
#include <limits.h>

#ifndef IFE_LAUNCH
#define IFE_LAUNCH(kernel, grid, block, bytes, stream, ...) kernel<<<grid, block, bytes, stream>>>(__VA_ARGS__)
#define IFE_DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#endif

#define WARP 32
#define N_WARPS (IFE_CUDA_BLOCK / WARP)
#define ALL_LANES 0xffffffffu
/* Component log-likelihoods kept in shared memory at a time. */
#define CHUNK IFE_CUDA_BLOCK

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

/*
 * z in shared memory: shared z - origin (D); the others z to 46 bits, its high parts (D) and then its low parts (D).
 * True in every thread when a feature is not finite.
 */
static __device__ int standardise(const ife_guard *guard, const float *features, float *z) {
    int nonfinite = 0;
    for (int32_t d = (int32_t)threadIdx.x; d < guard->n_features; d += IFE_CUDA_BLOCK) {
        const float x = features[d];
        nonfinite |= ife_magnitude_bits(x) >= IFE_NONFINITE_BITS;
        const float scale = guard->scale[d];
        const ife_pair pair = ife_standardise_pair(x, guard->mean[d], scale, 1.0f / scale);
        if (guard->kind == IFE_SHARED) {
            z[d] = ife_pair_difference(pair, guard->origin[d]);
        } else {
            z[d] = pair.high;
            z[guard->n_features + d] = pair.low;
        }
    }
    return __syncthreads_or(nonfinite);
}

/* z - centre at feature d, z as standardise left it for diagonal and full. */
static __device__ __forceinline__ float difference(const float *z, int32_t n, int32_t d, float centre) {
    const ife_pair pair = {z[d], z[n + d]};
    return ife_pair_difference(pair, centre);
}

static __device__ int features_nonfinite(const float *features, int32_t n_features) {
    int nonfinite = 0;
    for (int32_t d = (int32_t)threadIdx.x; d < n_features; d += IFE_CUDA_BLOCK)
        nonfinite |= ife_magnitude_bits(features[d]) >= IFE_NONFINITE_BITS;
    return __syncthreads_or(nonfinite);
}

/* Row of a packed lower triangle times z, in every lane. */
static __device__ __forceinline__ float warp_row(const float *packed, const float *z, int32_t row) {
    const float *entries = packed + ife_packed_row((size_t)row);
    return warp_sum(row + 1, [=](int32_t d) { return entries[d] * z[d]; });
}

static __device__ void whiten(const float *packed, const float *z, int32_t n, float *y) {
    for (int32_t row = warp_index(); row < n; row += N_WARPS) {
        const float value = warp_row(packed, z, row);
        if (lane_index() == 0) y[row] = value;
    }
    __syncthreads();
}

/* ||W (z - centre)||^2 in thread 0, W packed; the whole block works on it.  y (D) is scratch. */
static __device__ float block_norm(const float *packed, const float *z, const float *centre, int32_t n, float *y) {
    __shared__ double norms[N_WARPS];
    for (int32_t d = (int32_t)threadIdx.x; d < n; d += IFE_CUDA_BLOCK) y[d] = difference(z, n, d, centre[d]);
    __syncthreads();
    double norm = 0.0;
    for (int32_t row = warp_index(); row < n; row += N_WARPS) {
        const double value = warp_row(packed, y, row);
        norm += value * value;
    }
    if (lane_index() == 0) norms[warp_index()] = norm;
    __syncthreads();
    norm = norms[0];
    for (int w = 1; w < N_WARPS; ++w) norm += norms[w];
    return (float)norm;
}

/* values[k] = log-likelihood of component first + k, k = 0 .. count - 1.  Needs a barrier before they are read. */
static __device__ void component_values(const ife_guard *guard, int32_t first, int32_t count, const float *z, float *y,
                                        float *values) {
    const int32_t n = guard->n_features;
    if (guard->kind == IFE_FULL) {
        for (int32_t k = 0; k < count; ++k) {
            const size_t m = (size_t)(first + k);
            const float *packed = guard->whitener + m * ife_packed_row((size_t)n);
            const float distance = block_norm(packed, z, guard->centres + m * (size_t)n, n, y);
            if (threadIdx.x == 0) values[k] = ife_component(guard->constants[m], distance);
        }
        return;
    }
    for (int32_t k = warp_index(); k < count; k += N_WARPS) {
        const size_t m = (size_t)(first + k);
        const float *centre = guard->centres + m * (size_t)n;
        const float *weights = guard->whitener + m * (size_t)n;
        const float distance =
            guard->kind == IFE_DIAGONAL
                ? warp_sum(n, [=](int32_t d) { return ife_distance_term(difference(z, n, d, centre[d]) * weights[d], 0.0f); })
                : warp_sum(n, [=](int32_t d) { return ife_distance_term(y[d], centre[d]); });
        if (lane_index() == 0) values[k] = ife_component(guard->constants[m], distance);
    }
}

/* One past the last of the rows from `row` on whose components fit a chunk together; at least row + 1. */
static __device__ int32_t rows_that_fit(const int32_t *offsets, int32_t row, int32_t end) {
    int32_t low = row + 1;
    int32_t high = end - row < CHUNK ? end : row + CHUNK;
    while (low < high) {
        const int32_t middle = low + (high - low + 1) / 2;
        if (offsets[middle] - offsets[row] <= CHUNK)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

/*
 * Log-likelihoods of the rows begin .. end - 1.  Rows never straddle a chunk unless they are longer than one, and a
 * row's terms are added in an order that depends on its length alone: equal rows score equal bit for bit.
 */
static __device__ void score_rows(const ife_guard *guard, int32_t begin, int32_t end, const float *z, float *y,
                                  float *log_likelihoods) {
    __shared__ float values[CHUNK];
    const int32_t *offsets = guard->offsets;
    for (int32_t row = begin, next; row < end; row = next) {
        next = rows_that_fit(offsets, row, end);
        const int32_t last = offsets[next];
        ife_lse lse = {-INFINITY, 0.0f}; /* outlives a chunk only in warp 0, for one long row */
        for (int32_t first = offsets[row]; first < last; first += CHUNK) {
            const int32_t count = last - first < CHUNK ? last - first : CHUNK;
            component_values(guard, first, count, z, y, values);
            __syncthreads();
            for (int32_t c = row + warp_index(); c < next; c += N_WARPS) {
                const int32_t from = offsets[c] > first ? offsets[c] - first : 0;
                const int32_t to = offsets[c + 1] - first < count ? offsets[c + 1] - first : count;
                lse = ife_lse_merge(lse, warp_lse(values + from, to - from));
                if (offsets[c + 1] > first + count) continue;
                if (lane_index() == 0) log_likelihoods[c] = ife_lse_value(lse);
                lse.max = -INFINITY;
                lse.sum = 0.0f;
            }
            __syncthreads();
        }
    }
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

/* 4 blocks to a multiprocessor let a thread have 64 registers; left alone, the compiler spills to reach 5. */
__global__ void __launch_bounds__(IFE_CUDA_BLOCK, 4)
    ife_cuda_kernel(const ife_cuda_params params, const float *features, const float *logits, const ife_cuda_out out) {
    IFE_DYNAMIC_SHARED(float, vectors);
    float *z = vectors;
    /* After z: the second of two vectors for shared, the third for full. */
    float *y = vectors + (size_t)(params.n_vectors - 1) * (size_t)params.n_features;
    const size_t frame = blockIdx.x;
    const float *frame_features = features + frame * (size_t)params.n_features;
    float *log_likelihoods = out.log_likelihoods + frame * (size_t)params.max_rows;
    ife_cuda_verdict *verdict = out.verdicts + frame;

    const ife_cuda_guard *judge = params.guards;
    int32_t predicted = judge->target;
    if (logits) {
        predicted = predict(logits + frame * (size_t)params.n_classes, params.n_classes);
        judge = predicted < 0 ? NULL : find_guard(&params, predicted);
    }
    if (!judge) {
        const int valid = predicted >= 0 && !features_nonfinite(frame_features, params.n_features);
        write_unscored(valid ? IFE_CUDA_UNGUARDED : IFE_CUDA_UNJUDGED, predicted, params.max_rows, verdict, log_likelihoods);
        return;
    }
    const ife_guard *guard = &judge->guard;
    if (standardise(guard, frame_features, z)) {
        write_unscored(IFE_CUDA_UNJUDGED, predicted, params.max_rows, verdict, log_likelihoods);
        return;
    }
    if (guard->kind == IFE_SHARED) whiten(guard->whitener, z, guard->n_features, y);
    const int64_t group = blockIdx.y;
    const int32_t begin = (int32_t)(group * guard->n_rows / params.n_groups);
    const int32_t end = (int32_t)((group + 1) * guard->n_rows / params.n_groups);
    score_rows(guard, begin, end, z, y, log_likelihoods);
    if (group == 0)
        for (int32_t c = guard->n_rows + (int32_t)threadIdx.x; c < params.max_rows; c += IFE_CUDA_BLOCK)
            log_likelihoods[c] = NAN;
    if (!is_last(params.tickets + frame, params.n_groups)) return;
    const ife_cuda_verdict judged = decide(judge, log_likelihoods);
    if (threadIdx.x == 0) *verdict = judged;
}

extern "C" int32_t ife_cuda_groups(int32_t kind, int32_t n_rows, int32_t n_components) {
    /* shared: every block would whiten the frame again, which costs more than the distances. */
    if (kind == IFE_SHARED) return 1;
    /* full: the block works on one component at a time.  diagonal: a component is a warp's work. */
    const int32_t wanted = kind == IFE_FULL ? n_rows : (n_components + N_WARPS - 1) / N_WARPS;
    const int32_t most = n_rows < IFE_CUDA_MAX_GROUPS ? n_rows : IFE_CUDA_MAX_GROUPS;
    return wanted < most ? wanted : most;
}

extern "C" int32_t ife_cuda_shared_bytes(const ife_cuda_params *params) {
    return params->n_features * params->n_vectors * (int32_t)sizeof(float);
}

extern "C" int ife_cuda_launch(const ife_cuda_params *params, const float *features, const float *logits,
                               const ife_cuda_out *out, int32_t n, void *stream) {
    if (n == 0) return cudaSuccess;
    if (!params || !features || !out || !out->verdicts || !out->log_likelihoods || n < 0) return cudaErrorInvalidValue;
    if (!params->guards || params->n_guards < 1 || !params->tickets || n > params->max_frames)
        return cudaErrorInvalidValue;
    if (params->n_vectors < 2 || params->n_vectors > 3) return cudaErrorInvalidValue;
    if (params->n_features < 1 || params->n_features > IFE_MAX_FEATURES || params->max_rows < 1)
        return cudaErrorInvalidValue;
    if (params->n_groups < 1 || params->n_groups > IFE_CUDA_MAX_GROUPS || (logits && params->n_classes < 1))
        return cudaErrorInvalidValue;
    const int32_t bytes = ife_cuda_shared_bytes(params);
    /* Above 48 KiB, static shared memory included, a kernel has to ask first. */
    if (bytes > 40 * 1024) {
        const cudaError_t status =
            cudaFuncSetAttribute(ife_cuda_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
        if (status != cudaSuccess) {
            (void)cudaGetLastError(); /* it is returned here and must not surface again at an unrelated call */
            return status;
        }
    }
    const dim3 grid((unsigned)n, (unsigned)params->n_groups);
    IFE_LAUNCH(ife_cuda_kernel, grid, IFE_CUDA_BLOCK, bytes, (cudaStream_t)stream, *params, features, logits, *out);
    return cudaGetLastError();
}
