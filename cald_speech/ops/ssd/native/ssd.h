/* What the SSD's forward and backward passes share: the call's arguments, decays. */

#ifndef CALD_SSD_H
#define CALD_SSD_H

#include "product.h"

#define SCAN_FIELDS(FIELD) /* as in __init__.py */                                                                \
    FIELD(int64_t, batch) FIELD(int64_t, frames) FIELD(int64_t, heads) FIELD(int64_t, head_dim)                   \
    FIELD(int64_t, groups) FIELD(int64_t, d_state)                                                                \
    FIELD(int64_t, chunk) /* frames of a chunk, a multiple of PAD */                                              \
    FIELD(int64_t, block) /* chunks from one kept state to the next */                                            \
    FIELD(int64_t, kept_blocks) /* kept states of a sequence */                                                   \
    FIELD(int64_t, parts) /* tasks that share a group's heads */                                                  \
    FIELD(int64_t, threads)                                                                                       \
    FIELD(int64_t, reverse) /* from the last valid frame to the first */                                          \
    FIELD(int64_t, add) /* to what y (in the backward pass, dx) holds already */                                  \
    FIELD(const int64_t *, lengths) /* (batch), or NULL: every frame is valid */                                  \
    FIELD(const double *, A) /* (heads): times log2(e) */                                                         \
    FIELD(const float *, D) /* (heads), or NULL */                                                                \
    FIELD(float *, state) /* (batch, heads, head_dim, d_state): in, the initial state; out, the final */          \
    FIELD(float *, kept) /* (batch, heads, kept_blocks, d_state, head_dim), padded; or NULL */                    \
    FIELD(Tensor, x) FIELD(Tensor, dt) FIELD(Tensor, B) FIELD(Tensor, C) FIELD(Tensor, y)                         \
    FIELD(double *, dA) FIELD(double *, dD) /* (batch, heads). From here on the backward pass alone, for which */ \
    FIELD(Tensor, dx) FIELD(Tensor, ddt) /* y is its gradient, and state the final and then the initial one's */  \
    FIELD(Tensor, dB) FIELD(Tensor, dC) /* (parts * batch, frame, group, features) */

typedef struct {
    SCAN_FIELDS(DECLARED)
} Scan;
typedef Scan Arguments;

#include "heads.h"

typedef struct { /* one chunk of one head, a value for each frame */
    double *cum;    /* log2 of the decay from the state before the chunk to the frame, <= 0 */
    float *dt;      /* 0 beyond the chunk's end */
    float *into;    /* 2^cum: from the state before the chunk to the frame */
    float *out;     /* from the frame to the state after the chunk */
    float *out_dt;  /* the same times dt */
    float *through; /* one value: from the state before the chunk to the state after it */
} Decays;

static Decays take_decays(Arena *arena, int64_t chunk) {
    Decays d;
    d.cum = take(arena, chunk, sizeof(double));
    float **each[] = {&d.dt, &d.into, &d.out, &d.out_dt};
    for (int i = 0; i < 4; i++) *each[i] = take_floats(arena, chunk);
    d.through = take_floats(arena, 1);
    return d;
}

/* Decays of frames [start, start + count) of one head. Sums in double: a float's rest of 2e-5 would be the result's. */
static void find_decays(const Scan *scan, const Task *task, int64_t head, int64_t start, int64_t count, Decays d) {
    const int64_t chunk = scan->chunk;
    double sum = 0;
    for (int64_t i = 0; i < chunk; i++) {
        const float dt = i < count ? *at(scan, task, scan->dt, head, start + i) : 0;
        const double decay = dt * scan->A[head];
        /* 2^-150 is 0 in float: a stronger decay is no different. */
        sum += decay < -150 ? -150 : decay;
        d.cum[i] = sum;
        d.dt[i] = dt;
    }
    for (int64_t i = 0; i < chunk; i += LANES) {
        const dvec cum = *(dvec *)(d.cum + i);
        store(d.into + i, exp2_of(__builtin_convertvector(cum, vec)));
        const vec out = exp2_of(__builtin_convertvector(sum - cum, vec));
        store(d.out + i, out);
        store(d.out_dt + i, out * load(d.dt + i));
    }
    *d.through = d.into[chunk - 1];
}

/* For frames j to j + LANES: 2^(cum_i - cum_j) at or before frame i of the scan, and 0 after it. */
INLINE vec decay_between(const Decays *d, int64_t i, int64_t j) {
    ivec frame;
    for (int lane = 0; lane < LANES; lane++) frame[lane] = (int32_t)j + lane;
    const vec decay = exp2_of(__builtin_convertvector(d->cum[i] - *(dvec *)(d->cum + j), vec));
    return where(frame <= (int32_t)i, decay);
}

/* B or C with each frame's row times a factor. */
static void scale_rows(const float *in, const float *factors, int64_t rows, int64_t width, float *out) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < width; j += LANES) store(out + i * width + j, factors[i] * load(in + i * width + j));
}

#endif
