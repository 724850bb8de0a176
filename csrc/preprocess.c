/* Frame to tensor in one pass; the definition is inflight_edge/preprocess.py. */
#include "preprocess_math.h"

/* Channels of a row in scratch: three for a colour frame and network, else one. */
static size_t row_channels(const ife_image *image, const ife_input *input) {
    return image->pixels == IFE_GREY || input->channels == 1 ? 1 : 3;
}

static void nv12_row(const ife_image *image, const uint8_t *samples, const uint8_t *chroma, float *row) {
    const ife_colour_matrix m = ife_make_matrix(image);
    const size_t width = (size_t)image->width;
    for (size_t pair = 0; pair < width; pair += 2) {
        const ife_rgb add = ife_chroma_offsets(&m, chroma[pair], chroma[pair + 1]);
        for (size_t x = pair; x < pair + 2; ++x) {
            const float y = ife_luma_sample(&m, samples[x]);
            row[3 * x] = y + add.red, row[3 * x + 1] = y + add.green, row[3 * x + 2] = y + add.blue;
        }
    }
    /* Loops of their own, which gcc turns into minima and maxima of vectors; in the loop above they become branches. */
    for (size_t i = 0; i < 3 * width; ++i) row[i] = ife_not_below_black(row[i]);
    for (size_t i = 0; i < 3 * width; ++i) row[i] = ife_not_above_white(row[i]);
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
            row[x] = ife_luma(row[3 * x], row[3 * x + 1], row[3 * x + 2]);
    } else if (input->channels == 1)
        for (size_t x = 0; x < width; ++x)
            row[x] = ife_luma(samples[3 * x + red], samples[3 * x + 1], samples[3 * x + blue]);
    else if (image->pixels == IFE_RGB)
        for (size_t i = 0; i < 3 * width; ++i) row[i] = (float)samples[i];
    else
        for (size_t x = 0; x < width; ++x) {
            row[3 * x] = (float)samples[3 * x + 2];
            row[3 * x + 1] = (float)samples[3 * x + 1];
            row[3 * x + 2] = (float)samples[3 * x];
        }
}

size_t ife_preprocess_scratch(const ife_image *image, const ife_input *input) {
    if (!ife_preprocess_valid(image, input)) return 0;
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
            const float a = ife_between(upper[left + c], lower[left + c], weight);
            const float b = ife_between(upper[right + c], lower[right + c], weight);
            const float pixel = ife_between(a, b, weights[x]);
            for (size_t i = 0; i < copies; ++i)
                target[(c + i) * plane + x] = ife_normalise(pixel, scale, input->mean[c + i], factor[c + i]);
        }
    }
}

ife_status ife_preprocess(const ife_image *image, const ife_input *input, float *scratch, float *tensor) {
    if (!ife_preprocess_valid(image, input) || !scratch || !tensor) return IFE_INVALID;
    const size_t width = (size_t)input->width, height = (size_t)input->height, rows = (size_t)image->height;
    const size_t channels = row_channels(image, input), columns = (size_t)image->width;
    float *row[2] = {scratch, scratch + 3 * columns};
    float *weights = scratch + 6 * columns;
    int32_t *places = (int32_t *)(void *)(weights + width);
    size_t held[2] = {rows, rows};
    for (size_t x = 0; x < width; ++x)
        places[x] = ife_locate((int32_t)x, input->width, image->width, &weights[x]);
    for (size_t y = 0; y < height; ++y) {
        float weight;
        const size_t low = (size_t)ife_locate((int32_t)y, input->height, image->height, &weight);
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
