/* The scorer with NEON (AArch64). */
#include <arm_neon.h>
#include <string.h>

typedef float32x4_t vec;
#define WIDTH 4
#define FRAMES 4
#define COMPONENTS 2
#define PANEL_FRAMES 3
#define PHASES 2

#define vec_load(p) vld1q_f32(p)
#define vec_store(p, v) vst1q_f32(p, v)
#define vec_set(x) vdupq_n_f32(x)
#define vec_add(a, b) vaddq_f32(a, b)
#define vec_sub(a, b) vsubq_f32(a, b)
#define vec_mul(a, b) vmulq_f32(a, b)
#define vec_fma(a, b, c) vfmaq_f32(c, a, b)
#define vec_fnma(a, b, c) vfmsq_f32(c, a, b)
#define vec_max(a, b) vmaxq_f32(a, b)
#define vec_sum(v) vaddvq_f32(v)
#define vec_round(v) vrndnq_f32(v)
#define vec_power(n) vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23))
#define vec_zero_below(x, limit, v) \
    vreinterpretq_f32_u32(vandq_u32(vcgeq_f32(x, vdupq_n_f32(limit)), vreinterpretq_u32_f32(v)))

static inline void vec_sum4(const vec *v, float *out) {
    vst1q_f32(out, vpaddq_f32(vpaddq_f32(v[0], v[1]), vpaddq_f32(v[2], v[3])));
}

static inline int32x4_t vec_integers(const uint8_t *p) {
    uint32_t four;
    memcpy(&four, p, sizeof four);
    return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four)))));
}

#define vec_bytes(p) vcvtq_f32_s32(vec_integers(p))
#define vec_code(p, base, shift) \
    vreinterpretq_f32_s32(vaddq_s32(vshlq_s32(vec_integers(p), vdupq_n_s32(shift)), vdupq_n_s32(base)))

static inline vec vec_split(vec x, vec *exponent) {
    const int32x4_t bits = vreinterpretq_s32_f32(x);
    const int32x4_t e = vshrq_n_s32(vsubq_s32(bits, vdupq_n_s32(0x3f2aaaab)), 23);
    *exponent = vcvtq_f32_s32(e);
    return vreinterpretq_f32_s32(vsubq_s32(bits, vshlq_n_s32(e, 23)));
}

#include "score_standardise.h"
#include "score_kernels.h"

const ife_kernels ife_kernels_neon = {"neon", true, score, score_best, exponentials, logarithms};
