/* What the short convolution's forward and backward passes share: the call's arguments, tasks, where frames lie.

A task is one sequence, a block of its frames and a strip of channels. It goes over its frames in the order of the scan,
TILE_FRAMES at a time, by a list of addresses of their rows: reverse, what stands before the first frame and after the
last one differ in these addresses and in nothing else. */

#ifndef CALD_SHORT_CONV_H
#define CALD_SHORT_CONV_H

#include "vectors.h"

#define TILE_FRAMES 4 /* frames that share the loads of taps and of each other's inputs */
#define USUAL_TAPS 4  /* as a constant it lets the compiler keep inputs in registers */

#define CONV_FIELDS(FIELD) /* as in __init__.py */                                                                 \
    FIELD(int64_t, batch) FIELD(int64_t, frames) FIELD(int64_t, channels) FIELD(int64_t, taps)                     \
    FIELD(int64_t, block) /* frames of a task, a multiple of TILE_FRAMES */                                        \
    FIELD(int64_t, blocks) /* of a sequence, at least 1: the first one sees to the states too */                   \
    FIELD(int64_t, strip) /* channels of a task, a multiple of PAD */                                              \
    FIELD(int64_t, threads)                                                                                        \
    FIELD(int64_t, reverse) /* from the last valid frame to the first */                                           \
    FIELD(int64_t, silu)                                                                                           \
    FIELD(const int64_t *, lengths) /* (batch), or NULL: every frame is valid */                                   \
    FIELD(const float *, taps_bias) /* (taps + 1, padded channels), the bias last, zeros beyond the channels */    \
    FIELD(float *, history) /* (batch, taps - 1, channels): the inputs before the scan's first frame */            \
    FIELD(float *, state) /* (batch, taps - 1, channels): the last inputs; backwards their gradient */             \
    FIELD(Tensor, x) FIELD(Tensor, y)                                                                              \
    FIELD(float *, dhistory) /* From here on the backward pass alone, for which y is its gradient */               \
    FIELD(float *, block_sums) /* (batch * blocks, taps + 1, padded channels): a block's gradient of taps_bias, */ \
    FIELD(float *, dtaps_bias) /* and their sum */                                                                 \
    FIELD(Tensor, dx)

typedef struct {
    CONV_FIELDS(DECLARED)
} Conv;
typedef Conv Arguments;

typedef struct {
    int64_t b, block, start, end; /* of frames */
    int64_t channel, width;       /* the first channel of the strip, and how many */
    int64_t length;
} Task;

INLINE int64_t task_count(const Conv *conv) {
    return conv->batch * conv->blocks * ((conv->channels + conv->strip - 1) / conv->strip);
}

static Task task_of(const Conv *conv, int64_t number) {
    const int64_t strips = (conv->channels + conv->strip - 1) / conv->strip;
    Task task = {.b = number / strips / conv->blocks, .block = number / strips % conv->blocks};
    task.start = task.block * conv->block;
    task.end = task.start + conv->block < conv->frames ? task.start + conv->block : conv->frames;
    task.channel = number % strips * conv->strip;
    task.width = conv->channels - task.channel < conv->strip ? conv->channels - task.channel : conv->strip;
    task.length = valid_frames(conv->lengths, task.b, conv->frames);
    return task;
}

/* The end of the task's valid frames. */
INLINE int64_t valid_end(const Task *task) { return task->end < task->length ? task->end : task->length; }

/* Where frame ``position`` of the scan lies in a tensor. */
INLINE float *frame_at(const Conv *conv, const Task *task, Tensor tensor, int64_t position) {
    const int64_t frame = conv->reverse ? task->length - 1 - position : position;
    return tensor.at + task->b * tensor.batch + frame * tensor.frame + task->channel;
}

/* Where row ``index`` of a sequence's history or state lies. */
INLINE float *state_at(const Conv *conv, const Task *task, float *states, int64_t index) {
    return states + (task->b * (conv->taps - 1) + index) * conv->channels + task->channel;
}

/* The rows that the filter sees at ``position`` and the frames after it in a tile: taps - 1 + TILE_FRAMES of them. */
static void find_inputs(const Conv *conv, const Task *task, int64_t position, const float *zeros, const float **rows) {
    const int64_t past = conv->taps - 1;
    for (int64_t i = 0; i < past + TILE_FRAMES; i++) {
        const int64_t seen = position - past + i;
        if (seen < 0)
            rows[i] = state_at(conv, task, conv->history, seen + past);
        else
            rows[i] = seen < task->length ? frame_at(conv, task, conv->x, seen) : zeros;
    }
}

/* Zeros in the task's frames beyond the sequence's end. */
static void clear_padding(const Task *task, Tensor tensor) {
    for (int64_t t = task->start > task->length ? task->start : task->length; t < task->end; t++)
        memset(tensor.at + task->b * tensor.batch + t * tensor.frame + task->channel, 0, task->width * sizeof(float));
}

/* The first ``count`` lanes of a vector, the rest zeros. Only a strip's last vector can have less than all. */
INLINE vec load_first(const float *at, int64_t count) {
    if (count >= LANES) return load(at);
    vec v = {0};
    for (int64_t lane = 0; lane < count; lane++) v[lane] = at[lane];
    return v;
}

INLINE void store_first(float *at, vec v, int64_t count) {
    if (count >= LANES) store(at, v);
    else
        for (int64_t lane = 0; lane < count; lane++) at[lane] = v[lane];
}

/* The filter before its activation, for TILE_FRAMES frames and the vector of channels at ``j`` of the strip. */
INLINE void convolve(const Conv *conv, const int64_t taps, const float *taps_bias, const float *const *rows, int64_t j,
                     int64_t count, vec *sums) {
    const int64_t row = padded(conv->channels);
#pragma GCC unroll 4
    for (int i = 0; i < TILE_FRAMES; i++) sums[i] = load(taps_bias + taps * row + j);
#pragma GCC unroll 4
    for (int64_t k = 0; k < taps; k++) {
        const vec tap = load(taps_bias + k * row + j);
#pragma GCC unroll 4
        for (int i = 0; i < TILE_FRAMES; i++) sums[i] += tap * load_first(rows[i + k] + j, count);
    }
}

/* sigmoid(v), and sigmoid(-v) = 1 - sigmoid(v) without cancellation; off by 2e-7 at most. No exponent is positive. */
INLINE vec sigmoid_of(vec v, vec *of_minus_v) {
    const vec e = exp2_of((vec)((ivec)v | INT32_MIN) * 1.44269504f); /* exp(-|v|) */
    const vec larger = 1.0f / (1.0f + e), smaller = e * larger;
    const ivec negative = v < 0.0f;
    *of_minus_v = (vec)(((ivec)larger & negative) | ((ivec)smaller & ~negative));
    return (vec)(((ivec)smaller & negative) | ((ivec)larger & ~negative));
}

#endif
