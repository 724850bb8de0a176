/*
 * The scorer in CUDA: loops and memory; the arithmetic is score_math.h's.
 * A block works on one frame and one group of density rows; the block that finishes last makes the verdict.
 */
#include "verdict_cuda.h"

/* Component log-likelihoods kept in shared memory at a time. */
#define CHUNK IFE_CUDA_BLOCK

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
    /* The last block's verdict comes after this, by the ticket; a verdict of an earlier batch never stands for one. */
    if (blockIdx.y == 0 && threadIdx.x == 0) *verdict = {IFE_CUDA_UNJUDGED, predicted, -1, NAN};
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
    const size_t bytes = (size_t)ife_cuda_shared_bytes(params);
    const cudaError_t status = allow_shared_bytes(ife_cuda_kernel, bytes);
    if (status != cudaSuccess) return status;
    const dim3 grid((unsigned)n, (unsigned)params->n_groups);
    return launch(ife_cuda_kernel, grid, bytes, stream, *params, features, logits, *out);
}
