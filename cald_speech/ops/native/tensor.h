/* What every op's kernels share beside arithmetic: tensors, scratch memory, threads. */

#ifndef CALD_TENSOR_H
#define CALD_TENSOR_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "fields.h"

#define INLINE static inline __attribute__((always_inline))

/* (batch, frame, head or group, features); strides in elements, that of the features is 1 */
#define TENSOR_FIELDS(FIELD) FIELD(float *, at) FIELD(int64_t, batch) FIELD(int64_t, frame) FIELD(int64_t, head)
typedef struct {
    TENSOR_FIELDS(DECLARED)
} Tensor;

/* Of sequence ``b``. Within [0, frames] whatever the caller has made of his lengths since they were checked. */
INLINE int64_t valid_frames(const int64_t *lengths, int64_t b, int64_t frames) {
    const int64_t length = lengths ? lengths[b] : frames;
    return length < 0 ? 0 : length < frames ? length : frames;
}

/* Asks for ``size`` floats that are wanted soon: rows of one head or strip lie a page apart, where processors do not
look ahead by themselves. The address may lie outside the tensor: nothing is read. */
INLINE void expect(const float *at, int64_t size) {
    for (int64_t i = 0; i < size; i += 16) __builtin_prefetch(at + i);
}

typedef struct { /* memory handed out piece by piece; without a ``base`` the bytes are only counted */
    char *base;
    int64_t used;
} Arena;

/* Under the address sanitizer (scripts/sanitize.sh) pieces lie apart, and it watches what is between them. */
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#define APART 64
#else
#define APART 0
#define ASAN_POISON_MEMORY_REGION(at, bytes) ((void)0)
#endif

/* ``count`` numbers of scratch at a cache line's beginning. */
INLINE void *take(Arena *arena, int64_t count, int64_t bytes_each) {
    char *taken = arena->base ? arena->base + arena->used : NULL;
    const int64_t bytes = count * bytes_each, rounded = (bytes + 63) / 64 * 64;
    if (taken) ASAN_POISON_MEMORY_REGION(taken + bytes, rounded + APART - bytes);
    arena->used += rounded + APART;
    return taken;
}

INLINE float *take_floats(Arena *arena, int64_t count) { return take(arena, count, sizeof(float)); }

#ifdef _OPENMP
extern int omp_get_thread_num(void); /* declared here: clang's omp.h is a package of its own */
INLINE int64_t thread_number(void) { return omp_get_thread_num(); }
#else
INLINE int64_t thread_number(void) { return 0; }
#endif

#endif
