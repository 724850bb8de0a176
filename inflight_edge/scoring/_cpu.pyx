# cython: boundscheck=False, wraparound=False
"""Thin binding of csrc/inflight.h: arrays in, yes or no out, no arithmetic and no allocation.

Arrays come in through NumPy's C interface: a typed memoryview would allocate an object per call.
"""

cimport numpy as cnp

from types import MemberDescriptorType

import numpy as np
from cpython.object cimport PyObject
from cpython.ref cimport Py_INCREF

from inflight_edge.guard import KINDS
from inflight_edge.scoring.verdict_record import DECISIONS
from inflight_edge.verdict import Decision, Verdict

cnp.import_array()

cdef object NO_CLASSES = np.empty(0, np.int32)

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
    ctypedef struct ife_verdict:
        int decision
        int source
        double margin
        int n_scored
        int n_rows
    ctypedef struct ife_scorer:
        pass
    int IFE_OK
    int IFE_NO_MEMORY
    int IFE_UNSUPPORTED
    const char *ife_instruction_set(int i)
    int ife_scorer_create(const ife_guard *guard, const int *classes, int target_row, const char *instruction_set,
                          ife_scorer **scorer)
    void ife_scorer_destroy(ife_scorer *scorer)
    int ife_score(const ife_scorer *scorer, const float *features, float *log_likelihoods)
    int ife_score_batch(const ife_scorer *scorer, const float *features, size_t n_frames, float *log_likelihoods)
    int ife_judge(const ife_scorer *scorer, const float *features, ife_verdict *verdict)
    int ife_explain(const ife_scorer *scorer, const float *features, float *log_likelihoods, ife_verdict *verdict)
    int ife_predict(const float *logits, int n_classes)

cdef extern from "structmember.h":
    ctypedef struct PyMemberDef:
        Py_ssize_t offset

cdef extern from "Python.h":
    ctypedef struct PyTypeObject:
        object (*tp_alloc)(PyTypeObject *cls, Py_ssize_t n_items)
    ctypedef struct PyMemberDescrObject:
        PyMemberDef *d_member

# What a verdict is made of, in C variables: a module's dictionary may have left the caches.
cdef object MADE = Verdict
cdef tuple CODES = DECISIONS
if CODES[0] is not Decision.INVALID:
    raise ImportError("DECISIONS: expected INVALID first, as in ife_verdict")

# Where a Verdict's slots are: an object's own __init__ goes through the interpreter seven times, which costs more than
# the scores after a large network has emptied the caches.
cdef struct Slots:
    Py_ssize_t decision, predicted, source, margin, log_likelihoods, classes, reason

cdef Py_ssize_t _slot(str name) except -1:
    cdef object member = Verdict.__dict__[name]
    if type(member) is not MemberDescriptorType:
        raise TypeError(f"Verdict.{name}: expected a slot, got {type(member).__name__}")
    return (<PyMemberDescrObject *>member).d_member.offset

cdef Slots SLOTS = Slots(_slot("decision"), _slot("predicted"), _slot("source"), _slot("margin"),
                         _slot("log_likelihoods"), _slot("classes"), _slot("reason"))

cdef inline void _set(object instance, Py_ssize_t slot, object value):
    """Fill an empty slot."""
    Py_INCREF(value)
    (<PyObject **>(<char *><PyObject *>instance + slot))[0] = <PyObject *>value


def instruction_sets():
    """Names of the instruction sets that this build and this processor have, fastest first."""
    names = []
    cdef const char *name = ife_instruction_set(0)
    while name != NULL:
        names.append(name.decode())
        name = ife_instruction_set(<int>len(names))
    return tuple(names)


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


def predict(object logits, int n_classes):
    """Class index of the largest of (n_classes,) float32 logits; -1 when the array does not fit or is not finite."""
    if not _fits(logits, 1, n_classes, False):
        return -1
    return ife_predict(<const float *>cnp.PyArray_DATA(<cnp.ndarray>logits), n_classes)


cdef class CpuBackend:
    """Scores with the C extension; never writes to itself after construction."""

    cdef ife_scorer *scorer
    cdef int n_features
    cdef int n_rows
    cdef object verdict_type
    cdef object classes
    cdef object target

    def __cinit__(self, object parameters, object classes, int target_row, object instruction_set, object verdict_type):
        """parameters: inflight_edge.scoring.parameters.Parameters.  classes: (R,) int32 C-contiguous.

        instruction_set: one of instruction_sets().  verdict_type: dtype of ife_verdict.
        Raises ValueError when C refuses them, MemoryError.
        """
        cdef ife_guard guard
        cdef bytes name = instruction_set.encode()
        cdef const char *chosen = name
        guard.kind = KINDS.index(parameters.kind)
        guard.n_features = self.n_features = parameters.mean.shape[0]
        guard.n_rows = self.n_rows = parameters.offsets.shape[0] - 1
        guard.n_components = parameters.constants.shape[0]
        guard.offsets = <const int *>cnp.PyArray_DATA(parameters.offsets)
        guard.mean = <const float *>cnp.PyArray_DATA(parameters.mean)
        guard.scale = <const float *>cnp.PyArray_DATA(parameters.scale)
        guard.origin = NULL
        if parameters.kind == "shared":
            guard.origin = <const float *>cnp.PyArray_DATA(parameters.origin)
        guard.centres = <const float *>cnp.PyArray_DATA(parameters.centres)
        guard.whitener = <const float *>cnp.PyArray_DATA(parameters.whitener)
        guard.constants = <const float *>cnp.PyArray_DATA(parameters.constants)
        self.verdict_type = verdict_type
        self.classes = classes
        self.target = int(classes[target_row])
        cdef const int *class_indices = <const int *>cnp.PyArray_DATA(classes)
        cdef int status
        with nogil:
            status = ife_scorer_create(&guard, class_indices, target_row, chosen, &self.scorer)
        if status == IFE_NO_MEMORY:
            raise MemoryError("parameters: no memory for the scorer's layout")
        if status == IFE_UNSUPPORTED:
            raise ValueError(f"instruction set: expected one of {', '.join(instruction_sets())}, got {instruction_set!r}")
        if status != IFE_OK:
            raise ValueError("parameters: counts, offsets and arrays do not fit together, or are not finite")

    def __dealloc__(self):
        ife_scorer_destroy(self.scorer)

    def score_into(self, object features, object out):
        """(D,) float32 -> (R,) float32.  False when an array does not fit; nothing was written then."""
        if not (_fits(features, 1, self.n_features, False) and _fits(out, 1, self.n_rows, True)):
            return False
        cdef const float *source = <const float *>cnp.PyArray_DATA(<cnp.ndarray>features)
        cdef float *target = <float *>cnp.PyArray_DATA(<cnp.ndarray>out)
        with nogil:
            ife_score(self.scorer, source, target)
        return True

    def score_batch_into(self, object features, object out):
        """(N, D) float32 -> (N, R) float32.  False when an array does not fit; nothing was written then."""
        if not (_fits(features, 2, self.n_features, False) and _fits(out, 2, self.n_rows, True)):
            return False
        cdef cnp.npy_intp n_frames = cnp.PyArray_DIM(<cnp.ndarray>features, 0)
        if cnp.PyArray_DIM(<cnp.ndarray>out, 0) != n_frames:
            return False
        cdef const float *source = <const float *>cnp.PyArray_DATA(<cnp.ndarray>features)
        cdef float *target = <float *>cnp.PyArray_DATA(<cnp.ndarray>out)
        with nogil:
            ife_score_batch(self.scorer, source, <size_t>n_frames, target)
        return True

    def judge_into(self, object features, object out):
        """(D,) float32 -> (1,) of the verdict's dtype.  False when an array does not fit; nothing was written then."""
        if not (_fits(features, 1, self.n_features, False) and cnp.PyArray_Check(out)):
            return False
        cdef cnp.ndarray array = <cnp.ndarray>out
        if not (
            cnp.PyArray_NDIM(array) == 1
            and cnp.PyArray_DIM(array, 0) == 1
            and cnp.PyArray_ISCARRAY(array)
            and (<object>cnp.PyArray_DESCR(array) is self.verdict_type or array.dtype == self.verdict_type)
        ):
            return False
        cdef const float *source = <const float *>cnp.PyArray_DATA(<cnp.ndarray>features)
        cdef ife_verdict *target = <ife_verdict *>cnp.PyArray_DATA(array)
        with nogil:
            ife_judge(self.scorer, source, target)
        return True

    def verdict(self, object features, bint explain):
        """(D,) float32 -> the frame's Verdict, with its log-likelihoods if asked to explain, from one pass.

        None when the array does not fit, or for an INVALID frame, whose reason is looked for elsewhere.
        """
        cdef ife_verdict verdict
        if not _fits(features, 1, self.n_features, False):
            return None
        cdef cnp.npy_intp length = self.n_rows if explain else 0
        cdef cnp.ndarray rows = cnp.PyArray_EMPTY(1, &length, cnp.NPY_FLOAT32, 0)
        cdef const float *source = <const float *>cnp.PyArray_DATA(<cnp.ndarray>features)
        cdef float *target = <float *>cnp.PyArray_DATA(rows)
        with nogil:
            if explain:
                ife_explain(self.scorer, source, target, &verdict)
            else:
                ife_judge(self.scorer, source, &verdict)
        if verdict.decision == 0:  # the first of DECISIONS
            return None
        cdef object result = (<PyTypeObject *>MADE).tp_alloc(<PyTypeObject *>MADE, 0)
        _set(result, SLOTS.decision, CODES[verdict.decision])
        _set(result, SLOTS.predicted, self.target)
        _set(result, SLOTS.source, None if verdict.source < 0 else verdict.source)
        _set(result, SLOTS.margin, verdict.margin)
        _set(result, SLOTS.log_likelihoods, rows)
        _set(result, SLOTS.classes, self.classes if explain else NO_CLASSES)
        _set(result, SLOTS.reason, "")
        return result
