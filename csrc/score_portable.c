/* The scorer for any processor: vectors of four floats, which GCC and Clang lower to whatever there is. */
#include "score_math.h"

typedef float vec __attribute__((vector_size(16)));
typedef int32_t integers __attribute__((vector_size(16)));
#define WIDTH 4
#define FRAMES 4
#define COMPONENTS 2
#define PANEL_FRAMES 2
#define PHASES 1

#define vec_set(x) ((vec){(x), (x), (x), (x)})
#define vec_add(a, b) ((a) + (b))
#define vec_sub(a, b) ((a) - (b))
#define vec_mul(a, b) ((a) * (b))
#define vec_fma(a, b, c) ((a) * (b) + (c))
#define vec_fnma(a, b, c) ((c) - (a) * (b))
#define vec_sum(v) (((v)[0] + (v)[2]) + ((v)[1] + (v)[3]))

static inline vec vec_load(const float *p) {
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline void vec_store(float *p, vec v) {
    memcpy(p, &v, sizeof v);
}

static inline void vec_sum4(const vec *v, float *out) {
    for (int i = 0; i < 4; ++i) out[i] = vec_sum(v[i]);
}

static inline vec vec_select(integers mask, vec yes, vec no) {
    return (vec)((mask & (integers)yes) | (~mask & (integers)no));
}

static inline vec vec_max(vec a, vec b) {
    return vec_select(a > b, a, b);
}

/* Adding 1.5 * 2^23 pushes the fraction out; |v| < 2^22. */
static inline vec vec_round(vec v) {
    return (v + vec_set(12582912.0f)) - vec_set(12582912.0f);
}

static inline vec vec_power(vec n) {
    return (vec)((__builtin_convertvector(n, integers) + 127) << 23);
}

static inline vec vec_zero_below(vec x, float limit, vec v) {
    return (vec)((x >= vec_set(limit)) & (integers)v);
}

static inline integers vec_integers(const uint8_t *p) {
    return (integers){p[0], p[1], p[2], p[3]};
}

#define vec_bytes(p) __builtin_convertvector(vec_integers(p), vec)
#define vec_code(p, base, shift) ((vec)((vec_integers(p) << (shift)) + (base)))

static inline vec vec_split(vec x, vec *exponent) {
    const integers e = ((integers)x - 0x3f2aaaab) >> 23;
    *exponent = __builtin_convertvector(e, vec);
    return (vec)((integers)x - e * (1 << 23));
}

static inline vec vec_standardise(vec x, vec mean, vec scale, vec inverse, vec *low) {
    vec high;
    for (int l = 0; l < WIDTH; ++l) {
        const ife_pair z = ife_standardise_pair(x[l], mean[l], scale[l], inverse[l]);
        high[l] = z.high;
        (*low)[l] = z.low;
    }
    return high;
}

#include "score_kernels.h"

const ife_kernels ife_kernels_portable = {"portable", false, score, score_best, exponentials, logarithms};
