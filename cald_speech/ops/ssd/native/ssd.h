/* What the SSD's forward and backward passes share: the call's arguments, tasks, packing, decays.

A task is one sequence and some heads of one group. It goes over chunks of the sequence in the order of the scan, and
everything it computes with lies in scratch, frame by frame in that order: a scan in reverse differs in the addresses
that frames are read from and written to, and in nothing else. */

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

typedef struct {
    int64_t b, group, part, head, end, length;
} Task;

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

INLINE int64_t task_count(const Scan *scan) { return scan->batch * scan->groups * scan->parts; }

static Task task_of(const Scan *scan, int64_t number) {
    const int64_t per_group = scan->heads / scan->groups;
    Task task = {.part = number % scan->parts, .group = number / scan->parts % scan->groups};
    task.b = number / scan->parts / scan->groups;
    task.head = task.group * per_group + per_group * task.part / scan->parts;
    task.end = task.group * per_group + per_group * (task.part + 1) / scan->parts;
    task.length = valid_frames(scan->lengths, task.b, scan->frames);
    return task;
}

/* Where frame ``position`` of the scan lies in a tensor. */
INLINE float *at(const Scan *scan, const Task *task, Tensor tensor, int64_t head, int64_t position) {
    const int64_t frame = scan->reverse ? task->length - 1 - position : position;
    return tensor.at + task->b * tensor.batch + frame * tensor.frame + head * tensor.head;
}

/* From a head's rows of a chunk to those that are wanted next: the next head's, or the next chunk's of the only head. */
INLINE int64_t ahead_of(const Scan *scan, const Task *task, Tensor tensor) {
    if (task->end - task->head > 1) return tensor.head;
    return scan->reverse ? -scan->chunk * tensor.frame : scan->chunk * tensor.frame;
}

/* Frames [start, start + count) of the scan into ``chunk`` rows of ``row`` floats; rows beyond are zeros. */
static void pack(const Scan *scan, const Task *task, Tensor tensor, int64_t head, int64_t start, int64_t count,
                 int64_t width, float *to, int64_t row) {
    const int64_t ahead = ahead_of(scan, task, tensor);
    for (int64_t i = 0; i < count; i++) {
        const float *from = at(scan, task, tensor, head, start + i);
        expect(from + ahead, width);
        memcpy(to + i * row, from, width * sizeof(float));
    }
    memset(to + count * row, 0, (scan->chunk - count) * row * sizeof(float));
}

/* Zeros in frames beyond the sequence's end. */
static void clear_padding(const Scan *scan, const Task *task, Tensor tensor, int64_t head, int64_t width) {
    for (int64_t t = task->length; t < scan->frames; t++)
        memset(tensor.at + task->b * tensor.batch + t * tensor.frame + head * tensor.head, 0, width * sizeof(float));
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

/* A state from the caller's (head_dim, d_state) to rows of ``row`` floats for each of d_state, and back. What lies beyond
in scratch is cleared: it takes part in products with zeros, which a NaN of the task before would survive. */
static void read_state(const Scan *scan, const float *from, float *to, int64_t row) {
    memset(to, 0, padded(scan->d_state) * row * sizeof(float));
    for (int64_t p = 0; p < scan->head_dim; p++)
        for (int64_t n = 0; n < scan->d_state; n++) to[n * row + p] = from[p * scan->d_state + n];
}

static void write_state(const Scan *scan, const float *from, int64_t row, float *to) {
    for (int64_t p = 0; p < scan->head_dim; p++)
        for (int64_t n = 0; n < scan->d_state; n++) to[p * scan->d_state + n] = from[n * row + p];
}

#endif
