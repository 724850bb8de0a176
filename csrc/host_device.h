/* Marks a function that C and CUDA share: compiled for the processor, and by nvcc for the GPU too. */
#ifndef INFLIGHT_HOST_DEVICE_H
#define INFLIGHT_HOST_DEVICE_H

#ifdef __CUDACC__
#define IFE_MATH static __host__ __device__ __forceinline__
#else
#define IFE_MATH static inline
#endif

#endif
