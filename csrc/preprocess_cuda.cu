/*
 * Frame to tensor in CUDA: one launch, nothing between; the arithmetic is preprocess_math.h's.
 * A block makes a tile of the tensor, a thread one pixel of it from four of the frame.
 */
#include "launch_cuda.h"
#include "preprocess_math.h"

#define TILE_WIDTH WARP
#define TILE_HEIGHT (IFE_CUDA_BLOCK / WARP)

typedef struct {
    ife_image image;
    ife_input input;
    ife_colour_matrix matrix;
    float factor[3]; /* 1 / deviation */
    uint32_t tiles_in_row;
} frame_work;

/* Between which two indices of the frame an index of the tensor falls. */
typedef struct {
    int32_t low, high;
    float weight;
} tap;

static __device__ __forceinline__ tap find_tap(int32_t index, int32_t size, int32_t length) {
    tap found;
    found.low = ife_locate(index, size, length, &found.weight);
    found.high = found.low + 1 < length ? found.low + 1 : found.low;
    return found;
}

/* One pixel of the frame, 0..255; one value in `red` for a grey frame or a one-channel network. */
static __device__ __forceinline__ ife_rgb pixel_at(const frame_work &work, int32_t y, int32_t x) {
    const ife_image &image = work.image;
    const uint8_t *row = image.samples + (size_t)y * image.stride;
    ife_rgb pixel = {0.0f, 0.0f, 0.0f};
    if (image.pixels == IFE_GREY) {
        pixel.red = (float)row[x];
        return pixel;
    }
    if (image.pixels == IFE_NV12) {
        const uint8_t *chroma = image.chroma + (size_t)(y / 2) * image.stride + (size_t)(x / 2 * 2);
        const ife_rgb add = ife_chroma_offsets(&work.matrix, chroma[0], chroma[1]);
        const float luma = ife_luma_sample(&work.matrix, row[x]);
        pixel.red = ife_not_above_white(ife_not_below_black(luma + add.red));
        pixel.green = ife_not_above_white(ife_not_below_black(luma + add.green));
        pixel.blue = ife_not_above_white(ife_not_below_black(luma + add.blue));
    } else {
        const uint8_t *samples = row + 3 * (size_t)x;
        const int bgr = image.pixels == IFE_BGR;
        pixel.red = (float)samples[bgr ? 2 : 0];
        pixel.green = (float)samples[1];
        pixel.blue = (float)samples[bgr ? 0 : 2];
    }
    if (work.input.channels == 1) pixel.red = ife_luma(pixel.red, pixel.green, pixel.blue);
    return pixel;
}

static __device__ __forceinline__ ife_rgb between(const ife_rgb &a, const ife_rgb &b, float weight) {
    const ife_rgb pixel = {ife_between(a.red, b.red, weight), ife_between(a.green, b.green, weight),
                           ife_between(a.blue, b.blue, weight)};
    return pixel;
}

__global__ void __launch_bounds__(IFE_CUDA_BLOCK, 4) ife_cuda_preprocess_kernel(const frame_work work, float *tensor) {
    /* Once a tile, not once a pixel: places are divided in double, which most GPUs do slowly. */
    __shared__ tap columns[TILE_WIDTH], rows[TILE_HEIGHT];
    const int32_t width = work.input.width, height = work.input.height;
    const int32_t left = (int32_t)(blockIdx.x % work.tiles_in_row) * TILE_WIDTH;
    const int32_t top = (int32_t)(blockIdx.x / work.tiles_in_row) * TILE_HEIGHT;
    const int32_t thread = (int32_t)threadIdx.x;
    if (thread < TILE_WIDTH)
        columns[thread] = find_tap(left + thread, width, work.image.width);
    else if (thread < TILE_WIDTH + TILE_HEIGHT)
        rows[thread - TILE_WIDTH] = find_tap(top + thread - TILE_WIDTH, height, work.image.height);
    __syncthreads();
    const int32_t x = left + thread % TILE_WIDTH, y = top + thread / TILE_WIDTH;
    if (x >= width || y >= height) return;
    const tap column = columns[thread % TILE_WIDTH], row = rows[thread / TILE_WIDTH];
    /* Down first and across then, as in preprocess.c. */
    const ife_rgb a = between(pixel_at(work, row.low, column.low), pixel_at(work, row.high, column.low), row.weight);
    const ife_rgb b = between(pixel_at(work, row.low, column.high), pixel_at(work, row.high, column.high), row.weight);
    ife_rgb pixel = between(a, b, column.weight);
    if (work.image.pixels == IFE_GREY) pixel.green = pixel.blue = pixel.red;
    const size_t plane = (size_t)width * (size_t)height;
    float *target = tensor + (size_t)y * (size_t)width + (size_t)x;
    const ife_input &input = work.input;
    target[0] = ife_normalise(pixel.red, input.scale, input.mean[0], work.factor[0]);
    if (input.channels == 1) return;
    target[plane] = ife_normalise(pixel.green, input.scale, input.mean[1], work.factor[1]);
    target[2 * plane] = ife_normalise(pixel.blue, input.scale, input.mean[2], work.factor[2]);
}

extern "C" int ife_cuda_preprocess(const ife_image *image, const ife_input *input, float *tensor, void *stream) {
    if (!ife_preprocess_valid(image, input) || !tensor) return cudaErrorInvalidValue;
    /* The limit of indices here; no frame or tensor that a bundle can name comes near it. */
    if (image->height > 1 << 28 || image->width > 1 << 28 || input->height > 1 << 28 || input->width > 1 << 28)
        return cudaErrorInvalidValue;
    frame_work work;
    work.image = *image;
    work.input = *input;
    work.matrix = ife_make_matrix(image);
    for (int c = 0; c < 3; ++c) work.factor[c] = c < input->channels ? 1.0f / input->deviation[c] : 0.0f;
    work.tiles_in_row = (uint32_t)((input->width + TILE_WIDTH - 1) / TILE_WIDTH);
    const uint64_t tiles = (uint64_t)work.tiles_in_row * (uint64_t)((input->height + TILE_HEIGHT - 1) / TILE_HEIGHT);
    if (tiles > INT32_MAX) return cudaErrorInvalidValue;
    return launch(ife_cuda_preprocess_kernel, dim3((unsigned)tiles), 0, stream, work, tensor);
}
