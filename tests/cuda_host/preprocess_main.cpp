/*
 * Runs the CUDA preprocessing on the CPU.  Reads cases from standard input and writes each one's tensor to standard
 * output, as test_preprocess_cuda.py says; every plane is on the heap in its exact size, for AddressSanitizer.
 */
#include "inflight_cuda.h"

#include <cstdio>
#include <cstdlib>
#include <vector>

static void read_into(void *target, std::size_t n_bytes) {
    if (std::fread(target, 1, n_bytes, stdin) != n_bytes) std::exit(4);
}

/* A call that breaks the contract: it must say so and touch nothing. */
static void check_refusals() {
    uint8_t sample = 0;
    float tensor = 0.0f;
    const ife_input input = {1, 1, 1, 1.0f, {0.0f, 0.0f, 0.0f}, {1.0f, 1.0f, 1.0f}};
    const ife_image image = {IFE_GREY, 1, 1, 0, 0, 1, &sample, nullptr};
    std::vector<ife_image> images(6, image);
    images[0].pixels = 4;
    images[1].height = 0;
    images[2].stride = 0;
    images[3].samples = nullptr;
    images[4].pixels = IFE_NV12;
    images[5].width = INT32_MAX, images[5].stride = INT32_MAX;
    for (const ife_image &wrong : images)
        if (ife_cuda_preprocess(&wrong, &input, &tensor, nullptr) != 1) std::exit(8);
    ife_input two = input, huge = input;
    two.channels = 2;
    huge.height = INT32_MAX;
    if (ife_cuda_preprocess(&image, &two, &tensor, nullptr) != 1) std::exit(8);
    if (ife_cuda_preprocess(&image, &huge, &tensor, nullptr) != 1) std::exit(8);
    if (ife_cuda_preprocess(&image, &input, nullptr, nullptr) != 1) std::exit(8);
    if (ife_cuda_preprocess(nullptr, &input, &tensor, nullptr) != 1) std::exit(8);
}

int main() {
    check_refusals();
    ife_image image;
    while (std::fread(&image, sizeof image, 1, stdin) == 1) {
        ife_input input;
        read_into(&input, sizeof input);
        const bool nv12 = image.pixels == IFE_NV12;
        const std::size_t row = (std::size_t)image.width * (image.pixels == IFE_RGB || image.pixels == IFE_BGR ? 3 : 1);
        /* The last row ends with its last pixel, whatever the stride. */
        std::vector<uint8_t> samples((std::size_t)(image.height - 1) * image.stride + row);
        std::vector<uint8_t> chroma(nv12 ? (std::size_t)(image.height / 2 - 1) * image.stride + row : 0);
        read_into(samples.data(), samples.size());
        read_into(chroma.data(), chroma.size());
        image.samples = samples.data();
        image.chroma = nv12 ? chroma.data() : nullptr;
        std::vector<float> tensor((std::size_t)input.channels * input.height * input.width);
        if (ife_cuda_preprocess(&image, &input, tensor.data(), nullptr) != 0) std::exit(6);
        std::fwrite(tensor.data(), sizeof(float), tensor.size(), stdout);
    }
    return 0;
}
