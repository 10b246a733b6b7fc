/* The gated delta rule's backward pass: block by block against the scan, everything but each block's first state anew. */

#include "gradients.h"
#include "pass.h"

static void open_chunk(const Delta *delta, const Task *task, const Maps *m, const MapGradients *sums, int64_t start,
                       int64_t count) {
    const int64_t chunk = delta->chunk, d_state = padded(delta->d_state);
    open_maps(delta, task, m, start, count);
    float *of_maps[] = {sums->dq, sums->dk}, *of_pairs[] = {sums->dqk, sums->dkk};
    for (int i = 0; i < 2; i++) memset(of_maps[i], 0, chunk * d_state * sizeof(float));
    for (int i = 0; i < 2 && !delta->per_channel; i++) memset(of_pairs[i], 0, chunk * chunk * sizeof(float));
}

/* Once all heads have added to them: what q and k have by way of their products, and out. */
static void close_chunk(const Delta *delta, const Task *task, const Maps *m, const MapGradients *sums, int64_t start,
                        int64_t count) {
    static const float one = 1;
    const int64_t chunk = delta->chunk, d_state = padded(delta->d_state);
    if (!delta->per_channel) {
        const Left dqk = {sums->dqk, chunk, 1}, dkk = {sums->dkk, chunk, 1};
        const Left by_column = {sums->dqk, 1, chunk}, of_keys_by_column = {sums->dkk, 1, chunk};
        product(chunk, d_state, chunk, dqk, m->k, d_state, &one, 0, sums->dq, d_state, LEFT_LOWER);
        product(chunk, d_state, chunk, dkk, m->k, d_state, &one, 0, sums->dk, d_state, LEFT_LOWER);
        product(chunk, d_state, chunk, by_column, m->q, d_state, &one, 0, sums->dk, d_state, LEFT_UPPER);
        product(chunk, d_state, chunk, of_keys_by_column, m->k, d_state, &one, 0, sums->dk, d_state, LEFT_UPPER);
    }
    Task part = *task;
    part.b += task->part * delta->batch;
    for (int64_t i = 0; i < count; i++) {
        memcpy(at(delta, &part, delta->dq, task->group, start + i), sums->dq + i * d_state, delta->d_state * sizeof(float));
        memcpy(at(delta, &part, delta->dk, task->group, start + i), sums->dk + i * d_state, delta->d_state * sizeof(float));
    }
}

/* What of a block's chunks does not depend on what comes after them, of one head; ``kept`` is the state before the first. */
static void find_states(const Delta *delta, const Task *task, const Scratch *s, const float *kept, int64_t head,
                        int64_t first, int64_t end) {
    const int64_t chunk = delta->chunk, width = padded(delta->head_dim), d_state = padded(delta->d_state);
    memcpy(s->state, kept, d_state * width * sizeof(float));
    for (int64_t c = first; c < end; c++) {
        const Own *o = s->own + c - first;
        const int64_t start = c * chunk, left = task->length - start;
        transpose(s->state, d_state, width, s->states[c - first]);
        open_own(delta, task, s->maps + c - first, o, head, start, left < chunk ? left : chunk);
        solve(delta, o, s->state);
        if (c + 1 < end) move_on(delta, o, s->state);
    }
}

/* The gradients of one head's v, beta and g at the frames of a chunk. */
static void put_out(const Delta *delta, const Task *task, const Scratch *s, int64_t head, int64_t start, int64_t count) {
    const int64_t width = padded(delta->head_dim), d_state = padded(delta->d_state);
    const int64_t ahead = ahead_of(delta, task, delta->dv);
    for (int64_t i = 0; i < count; i++) {
        float *dv = at(delta, task, delta->dv, head, start + i), *dg = at(delta, task, delta->dg, head, start + i);
        expect(dv + ahead, delta->head_dim);
        memcpy(dv, s->derror + i * width, delta->head_dim * sizeof(float));
        *at(delta, task, delta->dbeta, head, start + i) = s->dbeta[i];
        if (delta->per_channel)
            memcpy(dg, s->dg + i * d_state, delta->d_state * sizeof(float));
        else
            *dg = s->dg[i];
    }
}

static void run_block(const Delta *delta, const Task *task, const Scratch *s, int64_t first, int64_t end) {
    const int64_t chunk = delta->chunk, width = padded(delta->head_dim), state_size = padded(delta->d_state) * width;
    for (int64_t c = first; c < end; c++) {
        const int64_t left = task->length - c * chunk;
        open_chunk(delta, task, s->maps + c - first, s->sums + c - first, c * chunk, left < chunk ? left : chunk);
    }
    for (int64_t head = task->head; head < task->end; head++) {
        const int64_t block = (task->b * delta->heads + head) * delta->kept_blocks + first / delta->block;
        find_states(delta, task, s, delta->kept + block * state_size, head, first, end);
        for (int64_t c = end - 1; c >= first; c--) {
            const int64_t at_chunk = c - first, left = task->length - c * chunk, count = left < chunk ? left : chunk;
            pack(delta, task, delta->y, head, c * chunk, count, delta->head_dim, s->dy, width);
            differentiate(delta, s, s->maps + at_chunk, s->sums + at_chunk, s->own + at_chunk, s->states[at_chunk],
                          s->dstates + (head - task->head) * state_size);
            put_out(delta, task, s, head, c * chunk, count);
        }
    }
    for (int64_t c = first; c < end; c++) {
        const int64_t left = task->length - c * chunk;
        close_chunk(delta, task, s->maps + c - first, s->sums + c - first, c * chunk, left < chunk ? left : chunk);
    }
}

static void run_task(const Delta *delta, Task task, const Scratch *s) {
    const int64_t width = padded(delta->head_dim), state_size = padded(delta->d_state) * width;
    const int64_t callers = delta->head_dim * delta->d_state, chunks = (task.length + delta->chunk - 1) / delta->chunk;
    float *callers_state = delta->state + (task.b * delta->heads + task.head) * callers;
    Task part = task;
    part.b += task.part * delta->batch;
    clear_padding(delta, &part, delta->dq, task.group, delta->d_state);
    clear_padding(delta, &part, delta->dk, task.group, delta->d_state);
    for (int64_t head = task.head; head < task.end; head++) {
        read_state(delta, callers_state + (head - task.head) * callers, s->dstates + (head - task.head) * state_size, width);
        clear_padding(delta, &task, delta->dv, head, delta->head_dim);
        clear_padding(delta, &task, delta->dbeta, head, 1);
        clear_padding(delta, &task, delta->dg, head, delta->per_channel ? delta->d_state : 1);
    }
    for (int64_t first = (chunks - 1) / delta->block * delta->block; first >= 0 && chunks; first -= delta->block)
        run_block(delta, &task, s, first, first + delta->block < chunks ? first + delta->block : chunks);
    for (int64_t head = task.head; head < task.end; head++)
        write_state(delta, s->dstates + (head - task.head) * state_size, width, callers_state + (head - task.head) * callers);
}

EXPORT_PASS(cald_gated_delta_backward, nothing_more)
