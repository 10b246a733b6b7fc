/* The SSD's backward pass: block by block against the scan, everything but each block's first state computed again. */

#include "gradients.h"
#include "pass.h"

static void open_chunk(const Scan *scan, const Task *task, const Shared *c, int64_t start, int64_t count) {
    const int64_t chunk = scan->chunk, d_state = padded(scan->d_state);
    pack(scan, task, scan->B, task->group, start, count, scan->d_state, c->B, d_state);
    pack(scan, task, scan->C, task->group, start, count, scan->d_state, c->C, d_state);
    transpose(c->B, chunk, d_state, c->B_by_frame);
    product(chunk, chunk, d_state, (Left){c->C, d_state, 1}, c->B_by_frame, chunk, NULL, 0, c->products, chunk, OUT_LOWER);
    float *sums[] = {c->dB, c->dC};
    for (int i = 0; i < 2; i++) memset(sums[i], 0, chunk * d_state * sizeof(float));
    memset(c->dproducts, 0, chunk * chunk * sizeof(float));
}

/* Once all heads have added to them: dC += dproducts B, dB += dproducts^T C, and out. */
static void close_chunk(const Scan *scan, const Task *task, const Shared *c, int64_t start, int64_t count) {
    static const float one = 1;
    const int64_t chunk = scan->chunk, d_state = padded(scan->d_state);
    product(chunk, d_state, chunk, (Left){c->dproducts, chunk, 1}, c->B, d_state, &one, 0, c->dC, d_state, LEFT_LOWER);
    product(chunk, d_state, chunk, (Left){c->dproducts, 1, chunk}, c->C, d_state, &one, 0, c->dB, d_state, LEFT_UPPER);
    Task part = *task;
    part.b += task->part * scan->batch;
    for (int64_t i = 0; i < count; i++) {
        memcpy(at(scan, &part, scan->dB, task->group, start + i), c->dB + i * d_state, scan->d_state * sizeof(float));
        memcpy(at(scan, &part, scan->dC, task->group, start + i), c->dC + i * d_state, scan->d_state * sizeof(float));
    }
}

/* x, the decays and the state before each chunk of a block, of one head; ``kept`` is the state before the first. */
static void find_states(const Scan *scan, const Task *task, const Scratch *s, const float *kept, int64_t head,
                        int64_t first, int64_t end) {
    const int64_t chunk = scan->chunk, width = padded(scan->head_dim), d_state = padded(scan->d_state);
    transpose(kept, d_state, width, s->own[0].state);
    for (int64_t c = first; c < end; c++) {
        const Own *own = s->own + c - first;
        const int64_t start = c * chunk, left = task->length - start, count = left < chunk ? left : chunk;
        pack(scan, task, scan->x, head, start, count, scan->head_dim, own->x, width);
        find_decays(scan, task, head, start, count, own->decays);
        if (c + 1 == end) break;
        scale_rows(s->shared[c - first].B, own->decays.out_dt, chunk, d_state, s->scaled);
        memcpy(own[1].state, own->state, width * d_state * sizeof(float));
        product(width, d_state, chunk, (Left){own->x, 1, width}, s->scaled, d_state, own->decays.through, 0, own[1].state,
                d_state, WHOLE);
    }
}

/* The gradients of one head's x, dt, A and D at the frames of a chunk. */
static void put_out(const Scan *scan, const Task *task, const Scratch *s, const Own *own, int64_t head, int64_t start,
                    int64_t count) {
    const int64_t width = padded(scan->head_dim);
    const double A = scan->A[head] * 0.6931471805599453; /* ln 2 */
    const int64_t ahead = ahead_of(scan, task, scan->dx);
    const float D = scan->D ? scan->D[head] : 0;
    double dA = 0, dD = 0;
    for (int64_t i = 0; i < count; i++) {
        float *restrict to = at(scan, task, scan->dx, head, start + i);
        expect(to + ahead, scan->head_dim);
        const float *restrict dx = s->dx + i * width, *restrict dy = s->dy + i * width;
        if (scan->add)
            for (int64_t p = 0; p < scan->head_dim; p++) to[p] += dx[p] + D * dy[p];
        else
            for (int64_t p = 0; p < scan->head_dim; p++) to[p] = dx[p] + D * dy[p];
        *at(scan, task, scan->ddt, head, start + i) = s->direct[i] + A * s->dlog[i];
        dA += own->decays.dt[i] * s->dlog[i];
        if (scan->D) dD += dot(dy, own->x + i * width, width);
    }
    scan->dA[task->b * scan->heads + head] += dA;
    scan->dD[task->b * scan->heads + head] += dD;
}

static void run_block(const Scan *scan, const Task *task, const Scratch *s, int64_t first, int64_t end) {
    const int64_t chunk = scan->chunk, width = padded(scan->head_dim), state_size = padded(scan->d_state) * width;
    for (int64_t c = first; c < end; c++) {
        const int64_t left = task->length - c * chunk;
        open_chunk(scan, task, s->shared + c - first, c * chunk, left < chunk ? left : chunk);
    }
    for (int64_t head = task->head; head < task->end; head++) {
        const int64_t block = (task->b * scan->heads + head) * scan->kept_blocks + first / scan->block;
        find_states(scan, task, s, scan->kept + block * state_size, head, first, end);
        for (int64_t c = end - 1; c >= first; c--) {
            const int64_t left = task->length - c * chunk, count = left < chunk ? left : chunk;
            const Own *own = s->own + c - first;
            pack(scan, task, scan->y, head, c * chunk, count, scan->head_dim, s->dy, width);
            differentiate(scan, s, s->shared + c - first, own, s->dstates + (head - task->head) * state_size);
            put_out(scan, task, s, own, head, c * chunk, count);
        }
    }
    for (int64_t c = first; c < end; c++) {
        const int64_t left = task->length - c * chunk;
        close_chunk(scan, task, s->shared + c - first, c * chunk, left < chunk ? left : chunk);
    }
}

static void run_task(const Scan *scan, Task task, const Scratch *s) {
    const int64_t width = padded(scan->head_dim), state_size = padded(scan->d_state) * width;
    const int64_t callers = scan->head_dim * scan->d_state, chunks = (task.length + scan->chunk - 1) / scan->chunk;
    float *callers_state = scan->state + (task.b * scan->heads + task.head) * callers;
    Task part = task;
    part.b += task.part * scan->batch;
    clear_padding(scan, &part, scan->dB, task.group, scan->d_state);
    clear_padding(scan, &part, scan->dC, task.group, scan->d_state);
    for (int64_t head = task.head; head < task.end; head++) {
        read_state(scan, callers_state + (head - task.head) * callers, s->dstates + (head - task.head) * state_size, width);
        if (!scan->add) clear_padding(scan, &task, scan->dx, head, scan->head_dim);
        clear_padding(scan, &task, scan->ddt, head, 1);
    }
    for (int64_t first = (chunks - 1) / scan->block * scan->block; first >= 0 && chunks; first -= scan->block)
        run_block(scan, &task, s, first, first + scan->block < chunks ? first + scan->block : chunks);
    for (int64_t head = task.head; head < task.end; head++)
        write_state(scan, s->dstates + (head - task.head) * state_size, width, callers_state + (head - task.head) * callers);
}

EXPORT_PASS(cald_ssd_backward, nothing_more)
