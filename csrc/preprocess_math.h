/* The arithmetic of preprocessing, once, for C and CUDA; its definition is inflight_edge/preprocess.py and colour.py. */
#ifndef INFLIGHT_PREPROCESS_MATH_H
#define INFLIGHT_PREPROCESS_MATH_H

#include "host_device.h"
#include "inflight.h"

/* R, G and B from luma and chroma, both already centred: ITU-R BT.601-7 and BT.709-6, section 3. */
typedef struct {
    float luma, chroma, black; /* range to 0..255 and +-127.5 */
    float red_v, green_u, green_v, blue_u;
} ife_colour_matrix;

typedef struct {
    float red, green, blue;
} ife_rgb;

IFE_MATH ife_colour_matrix ife_make_matrix(const ife_image *image) {
    const double red = image->bt709 ? 0.2126 : 0.299, blue = image->bt709 ? 0.0722 : 0.114, green = 1.0 - red - blue;
    const int full = image->full_range != 0;
    const ife_colour_matrix matrix = {
        full ? 1.0f : (float)(255.0 / 219.0),
        full ? 1.0f : (float)(255.0 / 224.0),
        full ? 0.0f : 16.0f,
        (float)(2.0 * (1.0 - red)),
        (float)(2.0 * blue * (1.0 - blue) / green),
        (float)(2.0 * red * (1.0 - red) / green),
        (float)(2.0 * (1.0 - blue)),
    };
    return matrix;
}

/* What the chroma of a 2 x 2 block adds to the luma of its pixels. */
IFE_MATH ife_rgb ife_chroma_offsets(const ife_colour_matrix *m, uint8_t u_sample, uint8_t v_sample) {
    const float u = ((float)u_sample - 128.0f) * m->chroma;
    const float v = ((float)v_sample - 128.0f) * m->chroma;
    const ife_rgb offsets = {m->red_v * v, -(m->green_u * u + m->green_v * v), m->blue_u * u};
    return offsets;
}

IFE_MATH float ife_luma_sample(const ife_colour_matrix *m, uint8_t sample) {
    return ((float)sample - m->black) * m->luma;
}

IFE_MATH float ife_not_below_black(float pixel) {
    return pixel > 0.0f ? pixel : 0.0f;
}

IFE_MATH float ife_not_above_white(float pixel) {
    return pixel < 255.0f ? pixel : 255.0f;
}

/* Colour for a one-channel network: BT.601 luma. */
IFE_MATH float ife_luma(float r, float g, float b) {
    return 0.299f * r + 0.587f * g + 0.114f * b;
}

/* Where output index i of `size` falls between two of `length` inputs: half-pixel centres, edges clamped. */
IFE_MATH int32_t ife_locate(int32_t index, int32_t size, int32_t length, float *weight) {
    double position = ((double)index + 0.5) * ((double)length / (double)size) - 0.5;
    position = position < 0.0 ? 0.0 : position > (double)(length - 1) ? (double)(length - 1) : position;
    const int32_t low = (int32_t)position;
    *weight = (float)(position - (double)low);
    return low;
}

IFE_MATH float ife_between(float a, float b, float weight) {
    return a + (b - a) * weight;
}

/* factor is 1 / deviation. */
IFE_MATH float ife_normalise(float pixel, float scale, float mean, float factor) {
    return (pixel * scale - mean) * factor;
}

/* True when the image and the input keep the contracts of inflight.h. */
IFE_MATH int ife_preprocess_valid(const ife_image *image, const ife_input *input) {
    if (!image || !input || !image->samples || image->pixels < IFE_GREY || image->pixels > IFE_NV12) return 0;
    if (image->height < 1 || image->width < 1 || input->height < 1 || input->width < 1) return 0;
    const size_t bytes = image->pixels == IFE_RGB || image->pixels == IFE_BGR ? 3 : 1;
    if (image->stride < bytes * (size_t)image->width) return 0;
    if (image->pixels == IFE_NV12 && (!image->chroma || image->height % 2 || image->width % 2)) return 0;
    return input->channels == 1 || input->channels == 3;
}

#endif
