/* What the selective scan's forward and backward passes share.

A task is one sequence and some strips of channels of one group. Every channel has its own decay for each entry of its
state, so there is no matrix product to be had: vectors run over the channels of a strip, whose state stays in the first
cache while the frames go by. */

#ifndef CALD_SELECTIVE_SCAN_H
#define CALD_SELECTIVE_SCAN_H

#include "vectors.h"

#define STRIP 64 /* channels: four cache lines of every frame */
#define AHEAD 8  /* frames */

typedef struct { /* as in __init__.py */
    int64_t batch, frames, channels, groups, d_state;
    int64_t block;       /* frames from one kept state to the next */
    int64_t kept_blocks; /* kept states of a strip */
    int64_t parts;       /* tasks that share a group's strips */
    int64_t threads;
    int64_t reverse;        /* from the last valid frame to the first */
    const int64_t *lengths; /* (batch), or NULL: every frame is valid */
    const float *A;         /* (channels, d_state): times log2(e) */
    const float *D;         /* (channels), or NULL */
    float *state;           /* (batch, channels, d_state): in, the initial state; out, the final one */
    float *kept;            /* (batch, groups * strips, kept_blocks, d_state, STRIP): before each block; or NULL */
    double *dA, *dD;        /* (batch, channels, d_state), (batch, channels): these and the gradients below are the */
    Tensor x, dt, B, C, y;  /* backward pass's alone, where ``y`` is y's gradient, and ``state`` the final and then the */
    Tensor dx, ddt, dB, dC; /* initial state's; dB, dC (parts * batch, frame, group, features) */
} Selective;

typedef struct {
    int64_t b, group, part, length;
    int64_t strip, end;       /* strips of the group */
    int64_t channel, width;   /* of the strip at hand: its first channel, and how many it has */
} Span;

INLINE int64_t strips_of(const Selective *scan) { return (scan->channels / scan->groups + STRIP - 1) / STRIP; }

INLINE int64_t span_count(const Selective *scan) { return scan->batch * scan->groups * scan->parts; }

static Span span_of(const Selective *scan, int64_t number) {
    const int64_t strips = strips_of(scan);
    Span span = {.part = number % scan->parts, .group = number / scan->parts % scan->groups};
    span.b = number / scan->parts / scan->groups;
    span.strip = strips * span.part / scan->parts;
    span.end = strips * (span.part + 1) / scan->parts;
    span.length = scan->lengths ? scan->lengths[span.b] : scan->frames;
    return span;
}

INLINE void choose_strip(const Selective *scan, Span *span, int64_t strip) {
    const int64_t per_group = scan->channels / scan->groups, first = strip * STRIP;
    span->channel = span->group * per_group + first;
    span->width = per_group - first < STRIP ? per_group - first : STRIP;
}

/* Where frame ``position`` of the scan lies in a tensor, from a channel or a group on. */
INLINE float *frame_at(const Selective *scan, const Span *span, Tensor tensor, int64_t offset, int64_t position) {
    const int64_t frame = scan->reverse ? span->length - 1 - position : position;
    return tensor.at + span->b * tensor.batch + frame * tensor.frame + offset;
}

INLINE float *maps_at(const Selective *scan, const Span *span, Tensor tensor, int64_t position) {
    return frame_at(scan, span, tensor, span->group * tensor.head, position);
}

static void clear_frames(const Selective *scan, const Span *span, Tensor tensor, int64_t offset, int64_t width) {
    for (int64_t t = span->length; t < scan->frames; t++)
        memset(tensor.at + span->b * tensor.batch + t * tensor.frame + offset, 0, width * sizeof(float));
}

/* A strip of a (channels, d_state) tensor to (d_state, STRIP), and back; channels beyond the strip's width stay 0. */
static void read_strip(const Selective *scan, const Span *span, const float *from, float *to) {
    for (int64_t c = 0; c < STRIP; c++)
        for (int64_t n = 0; n < scan->d_state; n++)
            to[n * STRIP + c] = c < span->width ? from[(span->channel + c) * scan->d_state + n] : 0;
}

static void write_strip(const Selective *scan, const Span *span, const float *from, float *to) {
    for (int64_t c = 0; c < span->width; c++)
        for (int64_t n = 0; n < scan->d_state; n++) to[(span->channel + c) * scan->d_state + n] = from[n * STRIP + c];
}

INLINE float *kept_at(const Selective *scan, const Span *span, int64_t strip, int64_t block) {
    const int64_t row = (span->b * scan->groups + span->group) * strips_of(scan) + strip;
    return scan->kept + (row * scan->kept_blocks + block) * scan->d_state * STRIP;
}

#endif
