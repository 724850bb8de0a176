/* Frame to tensor in one pass; the definition is inflight_edge/preprocess.py. */
#include "inflight.h"

#include <stdbool.h>

/* R, G and B from luma and chroma, both already centred: ITU-R BT.601-7 and BT.709-6, section 3. */
typedef struct {
    float luma, chroma, black; /* range to 0..255 and +-127.5 */
    float red_v, green_u, green_v, blue_u;
} colour_matrix;

static colour_matrix make_matrix(const ife_image *image) {
    const double red = image->bt709 ? 0.2126 : 0.299, blue = image->bt709 ? 0.0722 : 0.114, green = 1.0 - red - blue;
    const bool full = image->full_range != 0;
    return (colour_matrix){
        .luma = full ? 1.0f : (float)(255.0 / 219.0),
        .chroma = full ? 1.0f : (float)(255.0 / 224.0),
        .black = full ? 0.0f : 16.0f,
        .red_v = (float)(2.0 * (1.0 - red)),
        .green_u = (float)(2.0 * blue * (1.0 - blue) / green),
        .green_v = (float)(2.0 * red * (1.0 - red) / green),
        .blue_u = (float)(2.0 * (1.0 - blue)),
    };
}

static float luma(float r, float g, float b) {
    return 0.299f * r + 0.587f * g + 0.114f * b;
}

/* Channels of a row in scratch: three for a colour frame and network, else one. */
static size_t row_channels(const ife_image *image, const ife_input *input) {
    return image->pixels == IFE_GREY || input->channels == 1 ? 1 : 3;
}

static void nv12_row(const ife_image *image, const uint8_t *samples, const uint8_t *chroma, float *row) {
    const colour_matrix m = make_matrix(image);
    const size_t width = (size_t)image->width;
    for (size_t pair = 0; pair < width; pair += 2) {
        const float u = ((float)chroma[pair] - 128.0f) * m.chroma;
        const float v = ((float)chroma[pair + 1] - 128.0f) * m.chroma;
        const float red = m.red_v * v, green = m.green_u * u + m.green_v * v, blue = m.blue_u * u;
        for (size_t x = pair; x < pair + 2; ++x) {
            const float y = ((float)samples[x] - m.black) * m.luma;
            row[3 * x] = y + red, row[3 * x + 1] = y - green, row[3 * x + 2] = y + blue;
        }
    }
    /* Loops of their own, which gcc turns into minima and maxima of vectors; in the loop above they become branches. */
    for (size_t i = 0; i < 3 * width; ++i) row[i] = row[i] > 0.0f ? row[i] : 0.0f;
    for (size_t i = 0; i < 3 * width; ++i) row[i] = row[i] < 255.0f ? row[i] : 255.0f;
}

/* Row y of the frame as float pixels, channels interleaved in the network's order. */
static void convert_row(const ife_image *image, const ife_input *input, size_t y, float *row) {
    const uint8_t *samples = image->samples + y * image->stride;
    const size_t width = (size_t)image->width;
    const size_t red = image->pixels == IFE_BGR ? 2 : 0, blue = 2 - red;
    if (image->pixels == IFE_GREY)
        for (size_t x = 0; x < width; ++x) row[x] = (float)samples[x];
    else if (image->pixels == IFE_NV12) {
        nv12_row(image, samples, image->chroma + y / 2 * image->stride, row);
        for (size_t x = 0; x < width && input->channels == 1; ++x)
            row[x] = luma(row[3 * x], row[3 * x + 1], row[3 * x + 2]);
    } else if (input->channels == 1)
        for (size_t x = 0; x < width; ++x)
            row[x] = luma(samples[3 * x + red], samples[3 * x + 1], samples[3 * x + blue]);
    else if (image->pixels == IFE_RGB)
        for (size_t i = 0; i < 3 * width; ++i) row[i] = (float)samples[i];
    else
        for (size_t x = 0; x < width; ++x) {
            row[3 * x] = (float)samples[3 * x + 2];
            row[3 * x + 1] = (float)samples[3 * x + 1];
            row[3 * x + 2] = (float)samples[3 * x];
        }
}

/* Where an output index falls between two input indices. */
static size_t locate(size_t index, size_t size, size_t length, float *weight) {
    double position = ((double)index + 0.5) * ((double)length / (double)size) - 0.5;
    position = position < 0.0 ? 0.0 : position > (double)(length - 1) ? (double)(length - 1) : position;
    const size_t low = (size_t)position;
    *weight = (float)(position - (double)low);
    return low;
}

static bool valid(const ife_image *image, const ife_input *input) {
    if (!image || !input || !image->samples || image->pixels < IFE_GREY || image->pixels > IFE_NV12) return false;
    if (image->height < 1 || image->width < 1 || input->height < 1 || input->width < 1) return false;
    const size_t bytes = image->pixels == IFE_RGB || image->pixels == IFE_BGR ? 3 : 1;
    if (image->stride < bytes * (size_t)image->width) return false;
    if (image->pixels == IFE_NV12 && (!image->chroma || image->height % 2 || image->width % 2)) return false;
    return input->channels == 1 || input->channels == 3;
}

size_t ife_preprocess_scratch(const ife_image *image, const ife_input *input) {
    if (!valid(image, input)) return 0;
    /* Two rows of the frame in colour, and for each column of the tensor its place and its weight. */
    return 6 * (size_t)image->width + 2 * (size_t)input->width;
}

/* One row of the tensor, from two rows of the frame. */
static inline __attribute__((always_inline)) void resize_row(const size_t channels, const float *upper,
                                                             const float *lower, float weight, const int32_t *places,
                                                             const float *weights, size_t last, const ife_input *input,
                                                             float *target) {
    const size_t width = (size_t)input->width, plane = width * (size_t)input->height;
    const size_t copies = (size_t)input->channels / channels;
    const float scale = input->scale;
    float factor[3];
    for (size_t c = 0; c < 3; ++c) factor[c] = 1.0f / input->deviation[c];
    for (size_t x = 0; x < width; ++x) {
        const size_t place = (size_t)places[x], left = place * channels;
        const size_t right = place < last ? left + channels : left;
        for (size_t c = 0; c < channels; ++c) {
            const float a = upper[left + c] + (lower[left + c] - upper[left + c]) * weight;
            const float b = upper[right + c] + (lower[right + c] - upper[right + c]) * weight;
            const float pixel = a + (b - a) * weights[x];
            for (size_t i = 0; i < copies; ++i)
                target[(c + i) * plane + x] = (pixel * scale - input->mean[c + i]) * factor[c + i];
        }
    }
}

ife_status ife_preprocess(const ife_image *image, const ife_input *input, float *scratch, float *tensor) {
    if (!valid(image, input) || !scratch || !tensor) return IFE_INVALID;
    const size_t width = (size_t)input->width, height = (size_t)input->height, rows = (size_t)image->height;
    const size_t channels = row_channels(image, input), columns = (size_t)image->width;
    float *row[2] = {scratch, scratch + 3 * columns};
    float *weights = scratch + 6 * columns;
    int32_t *places = (int32_t *)(void *)(weights + width);
    size_t held[2] = {rows, rows};
    for (size_t x = 0; x < width; ++x) places[x] = (int32_t)locate(x, width, columns, &weights[x]);
    for (size_t y = 0; y < height; ++y) {
        float weight;
        const size_t low = locate(y, height, rows, &weight);
        const size_t needed[2] = {low, low + 1 < rows ? low + 1 : low};
        if (held[1] == low) { /* the lower row of the last pair is the upper row of this one */
            float *other = row[0];
            row[0] = row[1], row[1] = other;
            held[1] = held[0], held[0] = low;
        }
        for (int i = 0; i < 2; ++i)
            if (held[i] != needed[i]) {
                convert_row(image, input, needed[i], row[i]);
                held[i] = needed[i];
            }
        float *target = tensor + y * width;
        if (channels == 3)
            resize_row(3, row[0], row[1], weight, places, weights, columns - 1, input, target);
        else
            resize_row(1, row[0], row[1], weight, places, weights, columns - 1, input, target);
    }
    return IFE_OK;
}
