# cython: boundscheck=False, wraparound=False
"""Thin binding of csrc/inflight_cuda.h: raw handles and addresses in, CUDA's status out, no arithmetic."""

from libc.stdint cimport int32_t, uintptr_t

cdef extern from "inflight_cuda.h" nogil:
    ctypedef struct ife_cuda_params:
        pass
    ctypedef struct ife_cuda_out:
        pass
    ctypedef struct ife_cuda_graph:
        pass
    ctypedef struct ife_image:
        pass
    ctypedef struct ife_input:
        pass
    ctypedef int (*ife_cuda_enqueue)(void *context, void *stream) noexcept
    int32_t ife_cuda_groups(int32_t kind, int32_t n_rows, int32_t n_components)
    int ife_cuda_launch(const ife_cuda_params *params, const float *features, const float *logits,
                        const ife_cuda_out *out, int32_t n, void *stream)
    int ife_cuda_preprocess(const ife_image *image, const ife_input *input, float *tensor, void *stream)
    const char *ife_cuda_error_text(int status)
    int ife_cuda_graph_capture(ife_cuda_enqueue enqueue, void *context, void *stream, ife_cuda_graph **graph)
    int ife_cuda_graph_launch(ife_cuda_graph *graph, void *stream)
    int ife_cuda_graph_destroy(ife_cuda_graph *graph)

# cudaErrorUnknown: what a capture's callable that raised is reported as.
cdef int FAILED = 999


def groups(int32_t kind, int32_t n_rows, int32_t n_components):
    """Blocks per frame that suit a guard."""
    return ife_cuda_groups(kind, n_rows, n_components)


def launch(uintptr_t params, uintptr_t features, uintptr_t logits, uintptr_t out, int32_t n_frames, uintptr_t stream):
    """params, out: host addresses of the structs; features, logits: device addresses.  Returns a cudaError_t."""
    cdef int status
    with nogil:
        status = ife_cuda_launch(<const ife_cuda_params *>params, <const float *>features, <const float *>logits,
                                 <const ife_cuda_out *>out, n_frames, <void *>stream)
    return status


def preprocess(uintptr_t image, uintptr_t wanted, uintptr_t tensor, uintptr_t stream):
    """image, wanted: host addresses of an ife_image and an ife_input; tensor: device address.  Returns a cudaError_t."""
    cdef int status
    with nogil:
        status = ife_cuda_preprocess(<const ife_image *>image, <const ife_input *>wanted, <float *>tensor,
                                     <void *>stream)
    return status


def error_text(int status):
    """Text of a status."""
    return ife_cuda_error_text(status).decode()


cdef class _Call:
    cdef object function
    cdef object error


cdef int _enqueue(void *context, void *stream) noexcept with gil:
    cdef _Call call = <_Call>context
    try:
        call.function()
    except BaseException as error:  # it must not cross C: graph_capture hands it back
        call.error = error
        return FAILED
    return 0


def graph_capture(object enqueue, uintptr_t stream):
    """Returns (graph handle or 0, status, the callable's exception or None)."""
    cdef _Call call = _Call()
    call.function = enqueue
    cdef ife_cuda_graph *graph = NULL
    cdef int status = ife_cuda_graph_capture(_enqueue, <void *>call, <void *>stream, &graph)
    return <uintptr_t>graph, status, call.error


def graph_launch(uintptr_t graph, uintptr_t stream):
    """Returns a cudaError_t."""
    cdef int status
    with nogil:
        status = ife_cuda_graph_launch(<ife_cuda_graph *>graph, <void *>stream)
    return status


def graph_destroy(uintptr_t graph):
    """Returns a cudaError_t."""
    return ife_cuda_graph_destroy(<ife_cuda_graph *>graph)
