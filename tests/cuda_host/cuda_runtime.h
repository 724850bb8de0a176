/*
 * Runs a CUDA kernel on the CPU: enough of the language for the CUDA sources of csrc, compiled by g++ -std=c++20.
 *
 * The threads of a block are fibers of one thread, or with CUDA_HOST_THREADS one system thread each, so that
 * ThreadSanitizer sees a missing barrier.  Blocks run one after another: races between blocks cannot show.
 * A barrier that not every thread reaches, or reached at two places at once, ends the program with a message.
 */
#ifndef CUDA_HOST_RUNTIME_H
#define CUDA_HOST_RUNTIME_H

#include "cuda_runtime_api.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#ifdef CUDA_HOST_THREADS
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#else
#include <ucontext.h>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif
#endif

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads, blocks)
/* A section of its own, so that every block finds garbage in it as on a device. */
#define __shared__ static __attribute__((section("cuda_shared")))
#define threadIdx (cuda_host::self->index)
#define blockIdx cuda_host::block_index
#define __syncthreads() cuda_host::sync(__FILE__, __LINE__)
#define __syncthreads_or(flag) cuda_host::sync_or(flag, __LINE__)
#define __shfl_xor_sync(mask, value, lanes) cuda_host::shuffle_xor(mask, value, lanes, __LINE__)
#define __threadfence() ((void)0)
#define __ldcg(address) (*(address))
#define IFE_DYNAMIC_SHARED(type, name) type *name = reinterpret_cast<type *>(cuda_host::dynamic_shared)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern char __start_cuda_shared[], __stop_cuda_shared[];

namespace cuda_host {

[[noreturn]] inline void fail(const char *what, int line, int other) {
    std::fprintf(stderr, "cuda_host: %s (lines %d and %d)\n", what, line, other);
    std::_Exit(3);
}

struct Barrier {
    int size = 0, arrived = 0, line = 0;
    std::uint64_t generation = 0;
#ifdef CUDA_HOST_THREADS
    std::mutex mutex;
    std::condition_variable changed;
#endif
};

#ifndef CUDA_HOST_THREADS
/* A stack and where it was left.  Entered by setcontext once, then by a jump: that makes no system call, and
 * AddressSanitizer does not take it for the end of all frames of the stack that is left. */
struct Fiber {
    ucontext_t context;
    void *place[5];
    bool started = false;
    const void *stack = nullptr;
    std::size_t size = 0;
    void *fake_stack = nullptr;
};
#endif

struct Thread {
    dim3 index;
    unsigned shuffles = 0;
    Barrier *awaited = nullptr; /* fibers: runs again when its generation is no longer this one */
    std::uint64_t generation = 0;
    bool finished = false;
#ifndef CUDA_HOST_THREADS
    Fiber fiber;
    std::unique_ptr<char[]> stack;
#endif
};

struct Warp {
    Barrier barrier;
    std::uint64_t slots[2][32]; /* two, so that one barrier a shuffle is enough */
};

inline dim3 block_index;
inline char *dynamic_shared;
inline Barrier block_barrier;
inline std::vector<int> votes;
inline std::unique_ptr<Warp[]> warps;
/* The barrier named by file:line is left out: shows that the checks find what is missing. */
inline const char *const skipped_barrier = std::getenv("CUDA_HOST_SKIP");

#ifdef CUDA_HOST_THREADS
inline thread_local Thread *self;
#else
inline Thread *self;
inline Fiber scheduler;
inline std::function<void()> body;

/* AddressSanitizer must know whose stack it is on. */
inline void leaving([[maybe_unused]] Fiber &from, [[maybe_unused]] const Fiber &to) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.size);
#endif
}

inline void arrived([[maybe_unused]] const Fiber &at, [[maybe_unused]] Fiber *from = nullptr) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(at.fake_stack, from ? &from->stack : nullptr, from ? &from->size : nullptr);
#endif
}

[[noreturn, gnu::noinline]] __attribute__((no_sanitize("address"))) inline void enter_fiber(Fiber &to) {
    if (to.started) __builtin_longjmp(to.place, 1);
    to.started = true;
    setcontext(&to.context);
    fail("setcontext failed", 0, 0);
}

/* Returns when another fiber switches back. */
__attribute__((noinline, no_sanitize("address"))) inline void switch_fiber(Fiber &from, Fiber &to) {
    if (__builtin_setjmp(from.place) == 0) {
        leaving(from, to);
        enter_fiber(to);
    }
    arrived(from);
}
#endif

inline void wait(Barrier &barrier, int line) {
#ifdef CUDA_HOST_THREADS
    std::unique_lock lock(barrier.mutex);
#endif
    if (barrier.arrived == 0) barrier.line = line;
    if (barrier.line != line) fail("threads wait at different barriers", barrier.line, line);
    const std::uint64_t generation = barrier.generation;
    if (++barrier.arrived == barrier.size) {
        barrier.arrived = 0;
        ++barrier.generation;
#ifdef CUDA_HOST_THREADS
        barrier.changed.notify_all();
#endif
        return;
    }
#ifdef CUDA_HOST_THREADS
    if (!barrier.changed.wait_for(lock, std::chrono::seconds(20), [&] { return barrier.generation != generation; }))
        fail("a barrier that not every thread reaches", line, 0);
#else
    self->awaited = &barrier;
    self->generation = generation;
    switch_fiber(self->fiber, scheduler);
#endif
}

inline bool is_skipped(const char *file, int line) {
    if (!skipped_barrier) return false;
    const char *name = std::strrchr(file, '/');
    return std::string(name ? name + 1 : file) + ":" + std::to_string(line) == skipped_barrier;
}

inline void sync(const char *file, int line) {
    if (!is_skipped(file, line)) wait(block_barrier, line);
}

inline int sync_or(int flag, int line) {
    votes[self->index.x] = flag != 0;
    wait(block_barrier, line);
    int any = 0;
    for (int vote : votes) any |= vote;
    wait(block_barrier, line);
    return any;
}

template <class T>
T shuffle_xor(unsigned mask, T value, int lanes, int line) {
    static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
    if (mask != 0xffffffffu) fail("only whole warps can shuffle", line, 0);
    Warp &warp = warps[self->index.x / 32];
    std::uint64_t *slots = warp.slots[self->shuffles++ % 2];
    std::memcpy(&slots[self->index.x % 32], &value, sizeof(T));
    wait(warp.barrier, line);
    std::memcpy(&value, &slots[(self->index.x % 32) ^ (unsigned)lanes], sizeof(T));
    return value;
}

inline std::uint32_t add(std::uint32_t *address, std::uint32_t value) {
    const std::uint32_t old = *address;
    *address += value;
    return old;
}

/* Not memset, which AddressSanitizer checks: there are red zones between the variables. */
__attribute__((no_sanitize("address"))) inline void fill_shared_with_garbage() {
    for (volatile char *byte = __start_cuda_shared; byte < __stop_cuda_shared; ++byte) *byte = '\xff';
}

#ifdef CUDA_HOST_THREADS
inline void run_block(std::vector<Thread> &threads, const std::function<void()> &kernel) {
    std::vector<std::thread> running;
    for (Thread &thread : threads)
        running.emplace_back([&thread, &kernel] {
            self = &thread;
            kernel();
        });
    for (std::thread &thread : running) thread.join();
}
#else
inline void enter() {
    arrived(self->fiber, &scheduler);
    body();
    self->finished = true;
    switch_fiber(self->fiber, scheduler);
}

inline void run_block(std::vector<Thread> &threads, const std::function<void()> &kernel) {
    constexpr std::size_t stack_size = 128 * 1024;
    body = kernel;
    scheduler.started = true;
    for (Thread &thread : threads) {
        thread.awaited = nullptr;
        thread.finished = false;
        if (!thread.stack) thread.stack = std::make_unique_for_overwrite<char[]>(stack_size);
        Fiber &fiber = thread.fiber;
        fiber = {};
        fiber.stack = thread.stack.get();
        fiber.size = stack_size;
        getcontext(&fiber.context);
        fiber.context.uc_stack = {thread.stack.get(), 0, stack_size};
        makecontext(&fiber.context, enter, 0);
    }
    for (std::size_t left = threads.size(); left > 0;) {
        bool progress = false;
        for (Thread &thread : threads) {
            if (thread.finished || (thread.awaited && thread.awaited->generation == thread.generation)) continue;
            self = &thread;
            switch_fiber(scheduler, thread.fiber);
            progress = true;
            left -= thread.finished;
        }
        if (!progress) fail("a barrier that not every thread reaches", block_barrier.line, 0);
    }
}
#endif

inline void launch(dim3 grid, unsigned block, std::size_t bytes, const std::function<void()> &kernel) {
    std::vector<Thread> threads(block);
    votes.assign(block, 0);
    block_barrier.size = (int)block;
    block_barrier.arrived = 0;
    warps = std::make_unique<Warp[]>(block / 32);
    for (unsigned w = 0; w < block / 32; ++w) warps[w].barrier.size = 32;
    for (unsigned t = 0; t < block; ++t) threads[t].index.x = t;
    for (block_index.y = 0; block_index.y < grid.y; ++block_index.y)
        for (block_index.x = 0; block_index.x < grid.x; ++block_index.x) {
            dynamic_shared = static_cast<char *>(std::malloc(bytes));
            std::memset(dynamic_shared, 0xff, bytes);
            fill_shared_with_garbage();
            run_block(threads, kernel);
            if (block_barrier.arrived != 0) fail("a thread ended before a barrier", block_barrier.line, 0);
            std::free(dynamic_shared);
        }
}

}  // namespace cuda_host

inline std::uint32_t atomicAdd(std::uint32_t *address, std::uint32_t value) {
    return cuda_host::add(address, value);
}

/* Compute capability 8.7.  The limit that a kernel asked for is kept, and a launch beyond it refused. */
constexpr int cuda_host_static_bytes = 1168, cuda_host_most_bytes = 163 * 1024;
inline int cuda_host_limit = 48 * 1024 - cuda_host_static_bytes;

struct cudaFuncAttributes {
    std::size_t sharedSizeBytes;
};

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    std::size_t dynamicSmemBytes;
    cudaStream_t stream;
};

template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *attributes, Kernel *) {
    attributes->sharedSizeBytes = cuda_host_static_bytes;
    return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel *, cudaFuncAttribute, int bytes) {
    if (bytes + cuda_host_static_bytes > cuda_host_most_bytes) return cudaErrorInvalidValue;
    cuda_host_limit = bytes;
    return cudaSuccess;
}

inline cudaError_t cudaGetDevice(int *device) {
    *device = 0;
    return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr, int) {
    *value = cuda_host_most_bytes;
    return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *config, void (*kernel)(Parameters...), Arguments &&...arguments) {
    if (config->dynamicSmemBytes > (std::size_t)cuda_host_limit) return cudaErrorInvalidValue;
    if (config->gridDim.y > 65535 || config->gridDim.x > 0x7fffffffu) return cudaErrorInvalidValue;
    cuda_host::launch(config->gridDim, config->blockDim.x, config->dynamicSmemBytes, [&] { kernel(arguments...); });
    return cudaSuccess;
}

extern "C" inline cudaError_t cudaGetLastError(void) {
    return cudaSuccess;
}

#endif
