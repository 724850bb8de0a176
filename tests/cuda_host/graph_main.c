/* Runs graph_cuda.c against a double of the runtime, in which any one call may fail.  Prints what is wrong. */
#include "inflight_cuda.h"

#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdio.h>

static int failures = 0;

#define EXPECT(condition)                                                           \
    do {                                                                            \
        if (!(condition)) {                                                         \
            printf("line %d, call %d fails: %s\n", __LINE__, failing, #condition); \
            ++failures;                                                             \
        }                                                                           \
    } while (0)

static int calls, failing; /* the call with this number fails; 0: none */
static int capturing, graphs, executables, launches, enqueued;
static char stream_object, graph_object, executable_object, context_object;

static cudaError_t last_error; /* the runtime keeps it until somebody asks */

static cudaError_t status(void) {
    if (++calls != failing) return cudaSuccess;
    return last_error = cudaErrorStreamCaptureInvalidated;
}

cudaError_t cudaGetLastError(void) {
    const cudaError_t last = last_error;
    last_error = cudaSuccess;
    return last;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
    EXPECT((void *)stream == (void *)&stream_object && mode == cudaStreamCaptureModeThreadLocal && !capturing);
    const cudaError_t result = status();
    capturing = result == cudaSuccess;
    return result;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    EXPECT((void *)stream == (void *)&stream_object && capturing);
    const cudaError_t result = status();
    capturing = 0;
    *graph = result == cudaSuccess ? (cudaGraph_t)(void *)&graph_object : NULL;
    graphs += result == cudaSuccess;
    return result;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long flags) {
    EXPECT((void *)graph == (void *)&graph_object && flags == 0);
    const cudaError_t result = status();
    if (result == cudaSuccess) *executable = (cudaGraphExec_t)(void *)&executable_object;
    executables += result == cudaSuccess;
    return result;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    EXPECT((void *)graph == (void *)&graph_object);
    --graphs;
    return status();
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
    EXPECT((void *)executable == (void *)&executable_object && (void *)stream == (void *)&stream_object);
    ++launches;
    return status();
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
    EXPECT((void *)executable == (void *)&executable_object);
    --executables;
    return cudaSuccess;
}

const char *cudaGetErrorString(cudaError_t code) {
    return code == cudaSuccess ? "no error" : "an error";
}

static int enqueue(void *context, void *stream) {
    EXPECT(context == &context_object && stream == &stream_object && capturing);
    ++enqueued;
    return status();
}

int main(void) {
    ife_cuda_graph *graph = NULL;
    /* begin, enqueue, end, instantiate, destroy */
    for (failing = 1; failing <= 5; ++failing) {
        calls = 0;
        const int result = ife_cuda_graph_capture(enqueue, &context_object, &stream_object, &graph);
        EXPECT(result == cudaErrorStreamCaptureInvalidated);
        EXPECT(graph == NULL && !capturing && graphs == 0 && executables == 0);
        EXPECT(last_error == cudaSuccess); /* it was returned: left behind, the next launch would look as if it failed */
    }
    failing = 0;
    EXPECT(enqueued == 4);
    EXPECT(ife_cuda_graph_capture(enqueue, &context_object, &stream_object, &graph) == cudaSuccess);
    EXPECT(graph != NULL && !capturing && graphs == 0 && executables == 1);
    EXPECT(launches == 0 && enqueued == 5);
    EXPECT(ife_cuda_graph_launch(graph, &stream_object) == cudaSuccess && launches == 1);
    calls = 0, failing = 1;
    EXPECT(ife_cuda_graph_launch(graph, &stream_object) == cudaErrorStreamCaptureInvalidated && launches == 2);
    EXPECT(last_error == cudaSuccess);
    failing = 0;
    EXPECT(ife_cuda_graph_launch(NULL, &stream_object) == cudaErrorInvalidValue);
    EXPECT(ife_cuda_graph_launch(graph, NULL) == cudaErrorInvalidValue && launches == 2);
    EXPECT(ife_cuda_graph_destroy(graph) == cudaSuccess && executables == 0);
    EXPECT(ife_cuda_graph_destroy(NULL) == cudaSuccess && executables == 0);
    graph = (ife_cuda_graph *)(void *)&executable_object;
    EXPECT(ife_cuda_graph_capture(NULL, NULL, &stream_object, &graph) == cudaErrorInvalidValue && graph == NULL);
    EXPECT(ife_cuda_graph_capture(enqueue, NULL, NULL, &graph) == cudaErrorInvalidValue);
    EXPECT(ife_cuda_graph_capture(enqueue, NULL, &stream_object, NULL) == cudaErrorInvalidValue);
    EXPECT(ife_cuda_error_text(1)[0] == 'a');
    return failures != 0;
}
