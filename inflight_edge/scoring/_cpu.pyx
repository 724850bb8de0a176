# cython: boundscheck=False, wraparound=False
"""Thin binding of csrc/score_cpu.c: arrays in, yes or no out, no arithmetic and no allocation.

Arrays come in through NumPy's C interface: a typed memoryview would allocate an object per call.
"""

cimport numpy as cnp

from inflight_edge.guard import KINDS

cnp.import_array()

cdef extern from "inflight.h" nogil:
    ctypedef struct ife_guard:
        int kind
        int n_features
        int n_rows
        int n_components
        const int *offsets
        const float *mean
        const float *scale
        const float *origin
        const float *centres
        const float *whitener
        const float *constants
    int IFE_OK
    int IFE_INVALID
    int ife_guard_check(const ife_guard *guard)
    int ife_score(const ife_guard *guard, const float *features, float *log_likelihoods)


cdef bint _fits(object candidate, int n_axes, cnp.npy_intp length, bint writeable):
    """An aligned, C-contiguous float32 array of that many axes, the last of that length."""
    if not cnp.PyArray_Check(candidate):
        return False
    cdef cnp.ndarray array = <cnp.ndarray>candidate
    return (
        cnp.PyArray_TYPE(array) == cnp.NPY_FLOAT32
        and cnp.PyArray_NDIM(array) == n_axes
        and cnp.PyArray_DIM(array, n_axes - 1) == length
        and cnp.PyArray_ISCARRAY_RO(array)
        and (not writeable or cnp.PyArray_ISWRITEABLE(array))
    )


cdef class CpuBackend:
    """Scores with the C extension; holds the parameters alive and never writes to itself after construction."""

    cdef ife_guard guard
    cdef readonly object parameters

    def __cinit__(self, object parameters):
        """parameters: inflight_edge.scoring.parameters.Parameters.  Raises ValueError when C refuses them."""
        self.parameters = parameters
        self.guard.kind = KINDS.index(parameters.kind)
        self.guard.n_features = parameters.mean.shape[0]
        self.guard.n_rows = parameters.offsets.shape[0] - 1
        self.guard.n_components = parameters.constants.shape[0]
        self.guard.offsets = <const int *>cnp.PyArray_DATA(parameters.offsets)
        self.guard.mean = <const float *>cnp.PyArray_DATA(parameters.mean)
        self.guard.scale = <const float *>cnp.PyArray_DATA(parameters.scale)
        self.guard.origin = NULL
        if parameters.kind == "shared":
            self.guard.origin = <const float *>cnp.PyArray_DATA(parameters.origin)
        self.guard.centres = <const float *>cnp.PyArray_DATA(parameters.centres)
        self.guard.whitener = <const float *>cnp.PyArray_DATA(parameters.whitener)
        self.guard.constants = <const float *>cnp.PyArray_DATA(parameters.constants)
        if ife_guard_check(&self.guard) != IFE_OK:
            raise ValueError("parameters: counts, offsets and arrays do not fit together")

    def score_into(self, object features, object out):
        """(D,) float32 -> (R,) float32.  False when an array does not fit; nothing was written then."""
        if not (_fits(features, 1, self.guard.n_features, False) and _fits(out, 1, self.guard.n_rows, True)):
            return False
        cdef const float *source = <const float *>cnp.PyArray_DATA(<cnp.ndarray>features)
        cdef float *target = <float *>cnp.PyArray_DATA(<cnp.ndarray>out)
        cdef int status
        with nogil:
            status = ife_score(&self.guard, source, target)
        return status != IFE_INVALID

    def score_batch_into(self, object features, object out):
        """(N, D) float32 -> (N, R) float32.  False when an array does not fit; nothing was written then."""
        if not (_fits(features, 2, self.guard.n_features, False) and _fits(out, 2, self.guard.n_rows, True)):
            return False
        cdef cnp.npy_intp n, n_frames = cnp.PyArray_DIM(<cnp.ndarray>features, 0)
        if cnp.PyArray_DIM(<cnp.ndarray>out, 0) != n_frames:
            return False
        cdef const float *source = <const float *>cnp.PyArray_DATA(<cnp.ndarray>features)
        cdef float *target = <float *>cnp.PyArray_DATA(<cnp.ndarray>out)
        cdef bint valid = True
        with nogil:
            for n in range(n_frames):
                if ife_score(&self.guard, source, target) == IFE_INVALID:
                    valid = False
                source += self.guard.n_features
                target += self.guard.n_rows
        return valid
