/* Vectors of as many floats as a register of this processor holds, and what the kernels make of them.

GCC's and clang's vector extension, no intrinsics: the same source for AVX-512, AVX2, SSE and NEON. */

#ifndef CALD_VECTORS_H
#define CALD_VECTORS_H

#include "tensor.h"

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#define PAD 16 /* widths and chunks in scratch are multiples of it: whole vectors and whole tiles on every processor */
#define TILE_ROWS 8

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef double dvec __attribute__((vector_size(8 * LANES), aligned(8), may_alias));

INLINE int64_t padded(int64_t size) { return (size + PAD - 1) / PAD * PAD; }
INLINE vec load(const float *at) { return *(const vec *)at; }
INLINE void store(float *at, vec v) { *(vec *)at = v; }
INLINE vec where(ivec mask, vec v) { return (vec)((ivec)v & mask); } /* v, and 0 where the mask is 0 */

typedef float four __attribute__((vector_size(16), aligned(4), may_alias));

INLINE float sum_of(vec v) {
#if LANES == 16
    typedef float eight __attribute__((vector_size(32)));
    const eight halves = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                         __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
#else
    const vec halves = v;
#endif
#if LANES >= 8
    const four quarter = __builtin_shufflevector(halves, halves, 0, 1, 2, 3) +
                         __builtin_shufflevector(halves, halves, 4, 5, 6, 7);
#else
    const four quarter = halves;
#endif
    const four pairs = quarter + __builtin_shufflevector(quarter, quarter, 2, 3, 0, 1);
    return pairs[0] + pairs[1];
}

INLINE float dot(const float *a, const float *b, int64_t size) { /* size a multiple of LANES */
    vec sum = {0};
    for (int64_t j = 0; j < size; j += LANES) sum += load(a + j) * load(b + j);
    return sum_of(sum);
}

/* 2^x for x <= 0, off by 1e-7 of it at most; 0 below 2^-126, 1 for a positive x, so nothing overflows; NaN for NaN. */
INLINE vec exp2_of(vec x) {
    /* 1.5 * 2^23: adding it leaves the nearest integer in the last bits; 127 more, the bias of a float's exponent. */
    const vec to_exponent = (vec){0} + (12582912.0f + 127.0f);
    const ivec normal = ~(x < -126.0f);
    x = where(~(x > 0.0f), x);
    const vec shifted = x + to_exponent;
    const vec f = x - (shifted - to_exponent); /* in [-1/2, 1/2] */
    vec power = f * 1.535330320e-4f + 1.339887634e-3f; /* (2^f - 1) / f, least squares: 2e-9 of 2^f */
    power = power * f + 9.618437610e-3f;
    power = power * f + 5.550332466e-2f;
    power = power * f + 2.402264791e-1f;
    power = power * f + 6.931472029e-1f;
    power = power * f + 1.0f;
    return where(normal, power * (vec)((ivec)shifted << 23));
}

/* out (columns, rows) = in (rows, columns), both multiples of four. */
static inline void transpose(const float *in, int64_t rows, int64_t columns, float *out) {
    for (int64_t i = 0; i < rows; i += 4)
        for (int64_t j = 0; j < columns; j += 4) {
            const float *from = in + i * columns + j;
            const four a = *(const four *)from, b = *(const four *)(from + columns);
            const four c = *(const four *)(from + 2 * columns), d = *(const four *)(from + 3 * columns);
            const four ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
            const four ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
            const four cd_low = __builtin_shufflevector(c, d, 0, 4, 1, 5);
            const four cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
            float *to = out + j * rows + i;
            *(four *)to = __builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5);
            *(four *)(to + rows) = __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7);
            *(four *)(to + 2 * rows) = __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5);
            *(four *)(to + 3 * rows) = __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7);
        }
}

#endif
