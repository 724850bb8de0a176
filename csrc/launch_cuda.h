/* How the CUDA sources launch a kernel; tests/cuda_host puts a processor in the place of the GPU. */
#ifndef INFLIGHT_LAUNCH_CUDA_H
#define INFLIGHT_LAUNCH_CUDA_H

#include "inflight_cuda.h"

#include <cuda_runtime.h>

#ifndef IFE_DYNAMIC_SHARED
#define IFE_DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#endif

#define WARP 32

/* Blocks of IFE_CUDA_BLOCK threads.  The status is this launch's own: cudaGetLastError would bring an older error too. */
template <class... Parameters, class... Arguments>
static cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, size_t shared_bytes, void *stream,
                          const Arguments &...arguments) {
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(IFE_CUDA_BLOCK);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = (cudaStream_t)stream;
    const cudaError_t status = cudaLaunchKernelEx(&config, kernel, arguments...);
    if (status != cudaSuccess) (void)cudaGetLastError(); /* returned here; must not surface at an unrelated call */
    return status;
}

/*
 * Above 48 KiB, static shared memory included, a kernel has to ask first.  The limit belongs to the kernel, whoever
 * launches it: always the device's, or one thread would lower what another is about to use.
 */
template <class Kernel>
static cudaError_t allow_shared_bytes(Kernel *kernel, size_t bytes) {
    cudaFuncAttributes attributes;
    int device = 0, most = 0;
    cudaError_t status = cudaFuncGetAttributes(&attributes, kernel);
    if (status == cudaSuccess && bytes + attributes.sharedSizeBytes <= 48 * 1024) return cudaSuccess;
    if (status == cudaSuccess) status = cudaGetDevice(&device);
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (status == cudaSuccess) {
        if (bytes + attributes.sharedSizeBytes > (size_t)most) return cudaErrorInvalidValue;
        const int limit = most - (int)attributes.sharedSizeBytes;
        status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit);
    }
    if (status != cudaSuccess) (void)cudaGetLastError();
    return status;
}

#endif
