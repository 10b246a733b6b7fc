/* What scans over heads share: tasks, packing, states. Included once the op has said what its Arguments are.

A task is one sequence and some heads of one group. It goes over chunks of the sequence in the order of the scan, and
everything it computes with lies in scratch, frame by frame in that order: a scan in reverse differs in the addresses
that frames are read from and written to, and in nothing else. */

#ifndef CALD_HEADS_H
#define CALD_HEADS_H

#include "vectors.h"

typedef struct {
    int64_t b, group, part, head, end, length;
} Task;

INLINE int64_t task_count(const Arguments *scan) { return scan->batch * scan->groups * scan->parts; }

static Task task_of(const Arguments *scan, int64_t number) {
    const int64_t per_group = scan->heads / scan->groups;
    Task task = {.part = number % scan->parts, .group = number / scan->parts % scan->groups};
    task.b = number / scan->parts / scan->groups;
    task.head = task.group * per_group + per_group * task.part / scan->parts;
    task.end = task.group * per_group + per_group * (task.part + 1) / scan->parts;
    task.length = valid_frames(scan->lengths, task.b, scan->frames);
    return task;
}

/* Where frame ``position`` of the scan lies in a tensor. */
INLINE float *at(const Arguments *scan, const Task *task, Tensor tensor, int64_t head, int64_t position) {
    const int64_t frame = scan->reverse ? task->length - 1 - position : position;
    return tensor.at + task->b * tensor.batch + frame * tensor.frame + head * tensor.head;
}

/* From a head's rows of a chunk to those that are wanted next: the next head's, or the next chunk's of the only head. */
INLINE int64_t ahead_of(const Arguments *scan, const Task *task, Tensor tensor) {
    if (task->end - task->head > 1) return tensor.head;
    return scan->reverse ? -scan->chunk * tensor.frame : scan->chunk * tensor.frame;
}

/* Frames [start, start + count) of the scan into ``chunk`` rows of ``row`` floats; rows beyond are zeros. */
static void pack(const Arguments *scan, const Task *task, Tensor tensor, int64_t head, int64_t start, int64_t count,
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
static void clear_padding(const Arguments *scan, const Task *task, Tensor tensor, int64_t head, int64_t width) {
    for (int64_t t = task->length; t < scan->frames; t++)
        memset(tensor.at + task->b * tensor.batch + t * tensor.frame + head * tensor.head, 0, width * sizeof(float));
}

/* A state from the caller's (head_dim, d_state) to rows of ``row`` floats for each of d_state, and back. What lies beyond
in scratch is cleared: it takes part in products with zeros, which a NaN of the task before would survive. */
static void read_state(const Arguments *scan, const float *from, float *to, int64_t row) {
    memset(to, 0, padded(scan->d_state) * row * sizeof(float));
    for (int64_t p = 0; p < scan->head_dim; p++)
        for (int64_t n = 0; n < scan->d_state; n++) to[n * row + p] = from[p * scan->d_state + n];
}

static void write_state(const Arguments *scan, const float *from, int64_t row, float *to) {
    for (int64_t p = 0; p < scan->head_dim; p++)
        for (int64_t n = 0; n < scan->d_state; n++) to[p * scan->d_state + n] = from[n * row + p];
}

#endif
