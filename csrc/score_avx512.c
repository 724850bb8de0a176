/* The scorer with AVX-512 F. */
#include <immintrin.h>

typedef __m512 vec;
#define WIDTH 16
#define FRAMES 4
#define COMPONENTS 4
#define PANEL_FRAMES 6
#define PHASES 4

#define vec_load(p) _mm512_loadu_ps(p)
#define vec_store(p, v) _mm512_storeu_ps(p, v)
#define vec_set(x) _mm512_set1_ps(x)
#define vec_add(a, b) _mm512_add_ps(a, b)
#define vec_sub(a, b) _mm512_sub_ps(a, b)
#define vec_mul(a, b) _mm512_mul_ps(a, b)
#define vec_fma(a, b, c) _mm512_fmadd_ps(a, b, c)
#define vec_fnma(a, b, c) _mm512_fnmadd_ps(a, b, c)
#define vec_max(a, b) _mm512_max_ps(a, b)
#define vec_sum(v) _mm512_reduce_add_ps(v)
#define vec_round(v) _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
#define vec_power(n) _mm512_scalef_ps(_mm512_set1_ps(1.0f), n)
#define vec_zero_below(x, limit, v) _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(limit), _CMP_GE_OQ), v)

#define vec_integers(p) _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(const void *)(p)))
#define vec_bytes(p) _mm512_cvtepi32_ps(vec_integers(p))
#define vec_code(p, base, shift) \
    _mm512_castsi512_ps( \
        _mm512_add_epi32(_mm512_sll_epi32(vec_integers(p), _mm_cvtsi32_si128(shift)), _mm512_set1_epi32(base)))

/* As vec_sum adds: halves, halves of these, then (0 + 2) + (1 + 3). */
static inline void vec_sum4(const vec *v, float *out) {
    const vec ab = vec_add(_mm512_shuffle_f32x4(v[0], v[1], 0x44), _mm512_shuffle_f32x4(v[0], v[1], 0xee));
    const vec cd = vec_add(_mm512_shuffle_f32x4(v[2], v[3], 0x44), _mm512_shuffle_f32x4(v[2], v[3], 0xee));
    const vec four = vec_add(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
    const vec two = vec_add(four, _mm512_permute_ps(four, 0x4e));
    const vec sums = vec_add(two, _mm512_permute_ps(two, 0xb1));
    _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, sums)));
}

static inline vec vec_split(vec x, vec *exponent) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i e = _mm512_srai_epi32(_mm512_sub_epi32(bits, _mm512_set1_epi32(0x3f2aaaab)), 23);
    *exponent = _mm512_cvtepi32_ps(e);
    return _mm512_castsi512_ps(_mm512_sub_epi32(bits, _mm512_slli_epi32(e, 23)));
}

#include "score_standardise.h"
#include "score_kernels.h"

const ife_kernels ife_kernels_avx512 = {"avx512", true, score, score_best, exponentials, logarithms};
