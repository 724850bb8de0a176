# cython: boundscheck=False, wraparound=False
"""Thin binding of ife_preprocess in csrc/inflight.h; inflight_edge/preprocess.py checks what it passes."""

cimport numpy as cnp
from libc.stdlib cimport free, malloc

import numpy as np

cnp.import_array()

cdef extern from "inflight.h" nogil:
    ctypedef struct ife_image:
        int pixels
        int height
        int width
        int bt709
        int full_range
        size_t stride
        const unsigned char *samples
        const unsigned char *chroma
    ctypedef struct ife_input:
        int channels
        int height
        int width
        float scale
        float mean[3]
        float deviation[3]
    int IFE_GREY
    int IFE_RGB
    int IFE_BGR
    int IFE_NV12
    int IFE_OK
    size_t ife_preprocess_scratch(const ife_image *image, const ife_input *input)
    int ife_preprocess(const ife_image *image, const ife_input *input, float *scratch, float *tensor)

FORMATS = {"grey": IFE_GREY, "rgb": IFE_RGB, "bgr": IFE_BGR, "nv12": IFE_NV12}


def preprocess(cnp.ndarray frame, str pixels, bint bt709, bint full_range, tuple shape, float scale, tuple mean, tuple std):
    """Frame to (channels, height, width) float32.

    frame: uint8, C-contiguous: (H, W), (H, W, 3), or for nv12 (H * 3 / 2, W).  pixels: a key of FORMATS.
    shape: of the input, 1 or 3 channels.  mean, std: one number or one per channel.
    Raises ValueError when C refuses the shapes, MemoryError.
    """
    cdef ife_image image
    cdef ife_input wanted
    cdef int c, status
    if cnp.PyArray_TYPE(frame) != cnp.NPY_UINT8 or not cnp.PyArray_ISCARRAY_RO(frame):
        raise ValueError(f"frame: expected a C-contiguous uint8 array, got {(<object>frame).dtype} with strides {(<object>frame).strides}")
    image.pixels = FORMATS[pixels]
    image.width = <int>frame.shape[1]
    image.height = <int>(frame.shape[0] if image.pixels != IFE_NV12 else frame.shape[0] // 3 * 2)
    image.bt709 = bt709
    image.full_range = full_range
    # Not NumPy's, which is any number for an axis of one row.
    image.stride = <size_t>image.width * (3 if image.pixels in (IFE_RGB, IFE_BGR) else 1)
    image.samples = <const unsigned char *>cnp.PyArray_DATA(frame)
    image.chroma = NULL
    if image.pixels == IFE_NV12:
        image.chroma = image.samples + <size_t>image.height * image.stride
    wanted.channels, wanted.height, wanted.width = shape
    wanted.scale = scale
    for c in range(3):
        wanted.mean[c] = mean[c if c < len(mean) else 0]
        wanted.deviation[c] = std[c if c < len(std) else 0]
    cdef size_t size = ife_preprocess_scratch(&image, &wanted)
    if size == 0 or cnp.PyArray_NDIM(frame) != (3 if image.pixels in (IFE_RGB, IFE_BGR) else 2):
        raise ValueError(f"frame: expected {pixels} pixels, got shape {(<object>frame).shape} for input {shape}")
    cdef cnp.ndarray tensor = np.empty(shape, np.float32)
    cdef float *target = <float *>cnp.PyArray_DATA(tensor)
    cdef float *scratch = <float *>malloc(size * sizeof(float))
    if scratch == NULL:
        raise MemoryError("preprocess: no memory for two rows of the frame")
    with nogil:
        status = ife_preprocess(&image, &wanted, scratch, target)
        free(scratch)
    if status != IFE_OK:
        raise ValueError("frame: refused by the C interface")
    return tensor
