/* What the selective scan's forward and backward passes share.

A task is one sequence and some strips of channels of one group. Every channel has its own decay for each entry of its
state, so there is no matrix product to be had: vectors run over the channels of a strip, whose state stays in the first
cache while the frames go by. */

#ifndef CALD_SELECTIVE_SCAN_H
#define CALD_SELECTIVE_SCAN_H

#include "vectors.h"

#define STRIP 64 /* channels: four cache lines of every frame */
#define AHEAD 8  /* frames */

#define SELECTIVE_FIELDS(FIELD) /* as in __init__.py */                                                          \
    FIELD(int64_t, batch) FIELD(int64_t, frames) FIELD(int64_t, channels) FIELD(int64_t, groups)                 \
    FIELD(int64_t, d_state)                                                                                      \
    FIELD(int64_t, block) /* frames from one kept state to the next */                                           \
    FIELD(int64_t, kept_blocks) /* kept states of a strip */                                                     \
    FIELD(int64_t, parts) /* tasks that share a group's strips */                                                \
    FIELD(int64_t, threads)                                                                                      \
    FIELD(int64_t, reverse) /* from the last valid frame to the first */                                         \
    FIELD(const int64_t *, lengths) /* (batch), or NULL: every frame is valid */                                 \
    FIELD(const float *, A) /* (channels, d_state): times log2(e) */                                             \
    FIELD(const float *, D) /* (channels), or NULL */                                                            \
    FIELD(float *, state) /* (batch, channels, d_state): in, the initial state; out, the final */                \
    FIELD(float *, kept) /* (batch, groups * strips, kept_blocks, d_state, STRIP): before each block; or NULL */ \
    FIELD(Tensor, x) FIELD(Tensor, dt) FIELD(Tensor, B) FIELD(Tensor, C) FIELD(Tensor, y)                        \
    FIELD(double *, dA) /* (batch, channels, d_state). From here on the backward pass alone, for which */        \
    FIELD(double *, dD) /* (batch, channels) */                                                                  \
    FIELD(Tensor, dx) FIELD(Tensor, ddt) /* y is its gradient, and state the final and then the initial one's */ \
    FIELD(Tensor, dB) FIELD(Tensor, dC) /* (parts * batch, frame, group, features) */

typedef struct {
    SELECTIVE_FIELDS(DECLARED)
} Selective;
typedef Selective Arguments;

typedef struct {
    int64_t b, group, part, length;
    int64_t strip, end;       /* strips of the group */
    int64_t channel, width;   /* of the strip at hand: its first channel, and how many it has */
} Task;

INLINE int64_t strips_of(const Selective *scan) { return (scan->channels / scan->groups + STRIP - 1) / STRIP; }

INLINE int64_t task_count(const Selective *scan) { return scan->batch * scan->groups * scan->parts; }

static Task task_of(const Selective *scan, int64_t number) {
    const int64_t strips = strips_of(scan);
    Task task = {.part = number % scan->parts, .group = number / scan->parts % scan->groups};
    task.b = number / scan->parts / scan->groups;
    task.strip = strips * task.part / scan->parts;
    task.end = strips * (task.part + 1) / scan->parts;
    task.length = valid_frames(scan->lengths, task.b, scan->frames);
    return task;
}

INLINE void choose_strip(const Selective *scan, Task *task, int64_t strip) {
    const int64_t per_group = scan->channels / scan->groups, first = strip * STRIP;
    task->channel = task->group * per_group + first;
    task->width = per_group - first < STRIP ? per_group - first : STRIP;
}

/* Where frame ``position`` of the scan lies in a tensor, from a channel or a group on. */
INLINE float *frame_at(const Selective *scan, const Task *task, Tensor tensor, int64_t offset, int64_t position) {
    const int64_t frame = scan->reverse ? task->length - 1 - position : position;
    return tensor.at + task->b * tensor.batch + frame * tensor.frame + offset;
}

INLINE float *maps_at(const Selective *scan, const Task *task, Tensor tensor, int64_t position) {
    return frame_at(scan, task, tensor, task->group * tensor.head, position);
}

static void clear_frames(const Selective *scan, const Task *task, Tensor tensor, int64_t offset, int64_t width) {
    for (int64_t t = task->length; t < scan->frames; t++)
        memset(tensor.at + task->b * tensor.batch + t * tensor.frame + offset, 0, width * sizeof(float));
}

/* A strip of a (channels, d_state) tensor to (d_state, STRIP), and back; channels beyond the strip's width stay 0. */
static void read_strip(const Selective *scan, const Task *task, const float *from, float *to) {
    for (int64_t c = 0; c < STRIP; c++)
        for (int64_t n = 0; n < scan->d_state; n++)
            to[n * STRIP + c] = c < task->width ? from[(task->channel + c) * scan->d_state + n] : 0;
}

static void write_strip(const Selective *scan, const Task *task, const float *from, float *to) {
    for (int64_t c = 0; c < task->width; c++)
        for (int64_t n = 0; n < scan->d_state; n++) to[(task->channel + c) * scan->d_state + n] = from[n * STRIP + c];
}

INLINE float *kept_at(const Selective *scan, const Task *task, int64_t strip, int64_t block) {
    const int64_t row = (task->b * scan->groups + task->group) * strips_of(scan) + strip;
    return scan->kept + (row * scan->kept_blocks + block) * scan->d_state * STRIP;
}

#endif
