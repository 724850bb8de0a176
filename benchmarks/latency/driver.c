/*
 * Times the C interface from C, and measures what this core can read and compute at most.
 *
 * Each sample is the difference of two clock readings (CLOCK_MONOTONIC, ns) around one call: the cost of a reading is
 * in it; ife_bench_clock measures that cost the same way.
 */
#include <inflight.h>

#include <stdlib.h>
#include <string.h>
#include <time.h>

#define EXPORT __attribute__((visibility("default")))

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Samples of n_warm + n_calls calls of STATEMENT, the warm ones thrown away; i counts the calls. */
#define TIME_CALLS(STATEMENT)                           \
    for (size_t i = 0; i < n_warm + n_calls; ++i) {     \
        const int64_t start = now();                    \
        STATEMENT;                                      \
        const int64_t end = now();                      \
        if (i >= n_warm) samples[i - n_warm] = end - start; \
    }

/* Inside: nothing but the second reading of the clock. */
EXPORT void ife_bench_clock(size_t n_warm, size_t n_calls, int64_t *samples) {
    TIME_CALLS(__asm__ volatile("" ::: "memory"))
}

/* Inside: one ife_score, of the next frame of the pool. */
EXPORT void ife_bench_score(const ife_scorer *scorer, const float *features, size_t n_features, size_t pool, float *out,
                            size_t n_warm, size_t n_calls, int64_t *samples) {
    TIME_CALLS(ife_score(scorer, features + i % pool * n_features, out))
}

/* Inside: one ife_judge, of the next frame of the pool. */
EXPORT void ife_bench_judge(const ife_scorer *scorer, const float *features, size_t n_features, size_t pool,
                            ife_verdict *verdict, size_t n_warm, size_t n_calls, int64_t *samples) {
    TIME_CALLS(ife_judge(scorer, features + i % pool * n_features, verdict))
}

/* Inside: one ife_score_batch of n_frames frames. */
EXPORT void ife_bench_batch(const ife_scorer *scorer, const float *features, size_t n_frames, float *out, size_t n_warm,
                            size_t n_calls, int64_t *samples) {
    TIME_CALLS(ife_score_batch(scorer, features, n_frames, out))
}

#if defined(__AVX512F__)
#define WIDTH 64
#elif defined(__AVX__)
#define WIDTH 32
#else
#define WIDTH 16
#endif
typedef int32_t integers __attribute__((vector_size(WIDTH)));
typedef float reals __attribute__((vector_size(WIDTH)));

/* Reads every byte once.  OR has a latency of one cycle, so that the loads are the limit. */
static int32_t read_all(const integers *data, size_t n) {
    integers a = {0}, b = {0}, c = {0}, d = {0}, e = {0}, f = {0}, g = {0}, h = {0};
    for (size_t j = 0; j + 8 <= n; j += 8) {
        a |= data[j], b |= data[j + 1], c |= data[j + 2], d |= data[j + 3];
        e |= data[j + 4], f |= data[j + 5], g |= data[j + 6], h |= data[j + 7];
    }
    a |= b | c | d | e | f | g | h;
    int32_t total = 0;
    for (size_t j = 0; j < WIDTH / sizeof total; ++j) total |= a[j];
    return total;
}

/* Inside: one pass over a buffer of that many bytes (a multiple of 512), already read n_warm times.  1: no memory. */
EXPORT int ife_bench_read(size_t bytes, size_t n_warm, size_t n_calls, int64_t *samples) {
    integers *data = aligned_alloc(64, bytes);
    if (!data) return 1;
    memset(data, 1, bytes);
    volatile int32_t sink;
    TIME_CALLS(sink = read_all(data, bytes / sizeof *data))
    (void)sink;
    free(data);
    return 0;
}

#if defined(__aarch64__)
#define IN_REGISTER(x) "+w"(x)
#elif defined(__x86_64__) && defined(__AVX512F__)
#define IN_REGISTER(x) "+v"(x)
#elif defined(__x86_64__)
#define IN_REGISTER(x) "+x"(x)
#else
#define IN_REGISTER(x) "+m"(x)
#endif
#define CHAINS 12 /* independent, to hide the latency of a multiply-add; few enough for 16 registers */

static float multiply_add(size_t rounds, float factor, float term) {
    const reals m = factor - (reals){0}, t = term - (reals){0};
    reals a = t, b = t, c = t, d = t, e = t, f = t, g = t, h = t, k = t, l = t, n = t, o = t;
    for (size_t r = 0; r < rounds; ++r) {
        a = a * m + t, b = b * m + t, c = c * m + t, d = d * m + t, e = e * m + t, f = f * m + t;
        g = g * m + t, h = h * m + t, k = k * m + t, l = l * m + t, n = n * m + t, o = o * m + t;
        /* Keeps the chains apart: equal ones would be computed once. */
        __asm__ volatile("" : IN_REGISTER(a), IN_REGISTER(b), IN_REGISTER(c), IN_REGISTER(d), IN_REGISTER(e), IN_REGISTER(f));
        __asm__ volatile("" : IN_REGISTER(g), IN_REGISTER(h), IN_REGISTER(k), IN_REGISTER(l), IN_REGISTER(n), IN_REGISTER(o));
    }
    a += b + c + d + e + f + g + h + k + l + n + o;
    return a[0];
}

/* Inside: rounds x CHAINS multiply-adds of WIDTH / 4 floats.  Returns the operations of one call. */
EXPORT double ife_bench_multiply_add(size_t rounds, size_t n_warm, size_t n_calls, int64_t *samples) {
    volatile float factor = 0.999f, term = 0.001f, sink;
    TIME_CALLS(sink = multiply_add(rounds, factor, term))
    (void)sink;
    return 2.0 * CHAINS * (WIDTH / sizeof(float)) * (double)rounds;
}
