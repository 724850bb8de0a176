/* CUDA graphs: capture of a callable on a stream.  Host code only, on the CUDA runtime. */
#include "inflight_cuda.h"

#include <cuda_runtime_api.h>
#include <stddef.h>

/* A status is returned once: left behind, it would surface at an unrelated call of this thread. */
static int returned(int status) {
    if (status != cudaSuccess) (void)cudaGetLastError();
    return status;
}

int ife_cuda_graph_capture(ife_cuda_enqueue enqueue, void *context, void *stream, ife_cuda_graph **graph) {
    if (!graph) return cudaErrorInvalidValue;
    *graph = NULL;
    if (!enqueue || !stream) return cudaErrorInvalidValue;
    /* Thread local: an allocation in another thread neither fails nor ends this capture. */
    int status = cudaStreamBeginCapture((cudaStream_t)stream, cudaStreamCaptureModeThreadLocal);
    if (status != cudaSuccess) return returned(status);
    status = enqueue(context, stream);
    cudaGraph_t captured = NULL;
    /* Always ended, or the stream would stay in capture mode for good. */
    const int ended = cudaStreamEndCapture((cudaStream_t)stream, &captured);
    if (status == cudaSuccess) status = ended;
    cudaGraphExec_t executable = NULL;
    if (status == cudaSuccess) status = cudaGraphInstantiateWithFlags(&executable, captured, 0);
    if (captured) {
        const int destroyed = cudaGraphDestroy(captured);
        if (status == cudaSuccess) status = destroyed;
    }
    if (status != cudaSuccess) {
        /* The status that counts is the first one. */
        if (executable) (void)cudaGraphExecDestroy(executable);
        return returned(status);
    }
    *graph = (ife_cuda_graph *)executable;
    return cudaSuccess;
}

int ife_cuda_graph_launch(ife_cuda_graph *graph, void *stream) {
    if (!graph || !stream) return cudaErrorInvalidValue;
    return returned(cudaGraphLaunch((cudaGraphExec_t)graph, (cudaStream_t)stream));
}

int ife_cuda_graph_destroy(ife_cuda_graph *graph) {
    if (!graph) return cudaSuccess;
    return returned(cudaGraphExecDestroy((cudaGraphExec_t)graph));
}

const char *ife_cuda_error_text(int status) {
    return cudaGetErrorString((cudaError_t)status);
}
