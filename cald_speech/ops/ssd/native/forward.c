/* The SSD's forward pass (Dao & Gu, arXiv 2405.21060, section 6), chunk by chunk and head by head in the caches.

With S the state before a chunk, its frames are y_i = into_i C_i S + sum_{j <= i} C_i B_j decay_ij dt_j x_j + D x_i, and
the state after it is through S + sum_j out_j dt_j B_j x_j. C B^T is computed once for all heads of a group. */

#include "ssd.h"
#include "pass.h"

typedef struct {
    float *B, *C, *B_by_frame; /* (chunk, d_state) twice, and B transposed */
    float *products;           /* C B^T, (chunk, chunk) */
    float *x, *y;              /* (chunk, head_dim) */
    float *weights, *weighted; /* (chunk, chunk); B times out_dt */
    float *states;             /* of every head of the task, (d_state, head_dim) */
    Decays decays;
} Scratch;

static Scratch take_scratch(const Scan *scan, Arena *arena) {
    const int64_t chunk = scan->chunk, width = padded(scan->head_dim), d_state = padded(scan->d_state);
    const int64_t most_heads = scan->heads / scan->groups / scan->parts + 1;
    Scratch s;
    float **of_state[] = {&s.B, &s.C, &s.B_by_frame, &s.weighted};
    for (int i = 0; i < 4; i++) *of_state[i] = take_floats(arena, chunk * d_state);
    s.products = take_floats(arena, chunk * chunk);
    s.weights = take_floats(arena, chunk * chunk);
    s.x = take_floats(arena, chunk * width);
    s.y = take_floats(arena, chunk * width);
    s.states = take_floats(arena, most_heads * d_state * width);
    s.decays = take_decays(arena, chunk);
    return s;
}

static void find_weights(const Scan *scan, const Scratch *s) {
    for (int64_t i = 0; i < scan->chunk; i++)
        for (int64_t j = 0; j < padded(i + 1); j += LANES)
            store(s->weights + i * scan->chunk + j,
                  load(s->products + i * scan->chunk + j) * decay_between(&s->decays, i, j) * load(s->decays.dt + j));
}

static void put_out(const Scan *scan, const Task *task, const Scratch *s, int64_t head, int64_t start, int64_t count) {
    const int64_t width = padded(scan->head_dim);
    const int64_t ahead = ahead_of(scan, task, scan->y);
    const float D = scan->D ? scan->D[head] : 0;
    for (int64_t i = 0; i < count; i++) {
        float *restrict to = at(scan, task, scan->y, head, start + i);
        expect(to + ahead, scan->head_dim);
        const float *restrict y = s->y + i * width, *restrict x = s->x + i * width;
        if (scan->add)
            for (int64_t p = 0; p < scan->head_dim; p++) to[p] += y[p] + D * x[p];
        else
            for (int64_t p = 0; p < scan->head_dim; p++) to[p] = y[p] + D * x[p];
    }
}

static void scan_chunk(const Scan *scan, const Task *task, const Scratch *s, float *state, int64_t head, int64_t start,
                       int64_t count) {
    const int64_t chunk = scan->chunk, width = padded(scan->head_dim), d_state = padded(scan->d_state);
    pack(scan, task, scan->x, head, start, count, scan->head_dim, s->x, width);
    find_decays(scan, task, head, start, count, s->decays);
    find_weights(scan, s);
    product(chunk, width, d_state, (Left){s->C, d_state, 1}, state, width, NULL, 0, s->y, width, WHOLE);
    product(chunk, width, chunk, (Left){s->weights, chunk, 1}, s->x, width, s->decays.into, 1, s->y, width, LEFT_LOWER);
    put_out(scan, task, s, head, start, count);
    scale_rows(s->B, s->decays.out_dt, chunk, d_state, s->weighted);
    product(d_state, width, chunk, (Left){s->weighted, 1, d_state}, s->x, width, s->decays.through, 0, state, width, WHOLE);
}

static void run_task(const Scan *scan, Task task, const Scratch *s) {
    const int64_t chunk = scan->chunk, width = padded(scan->head_dim), d_state = padded(scan->d_state);
    const int64_t state_size = d_state * width, callers = scan->head_dim * scan->d_state;
    float *callers_state = scan->state + (task.b * scan->heads + task.head) * callers;
    for (int64_t head = task.head; head < task.end; head++) {
        read_state(scan, callers_state + (head - task.head) * callers, s->states + (head - task.head) * state_size, width);
        if (!scan->add) clear_padding(scan, &task, scan->y, head, scan->head_dim);
    }
    for (int64_t start = 0, c = 0; start < task.length; start += chunk, c++) {
        const int64_t count = task.length - start < chunk ? task.length - start : chunk;
        pack(scan, &task, scan->B, task.group, start, count, scan->d_state, s->B, d_state);
        pack(scan, &task, scan->C, task.group, start, count, scan->d_state, s->C, d_state);
        transpose(s->B, chunk, d_state, s->B_by_frame);
        product(chunk, chunk, d_state, (Left){s->C, d_state, 1}, s->B_by_frame, chunk, NULL, 0, s->products, chunk, OUT_LOWER);
        for (int64_t head = task.head; head < task.end; head++) {
            float *state = s->states + (head - task.head) * state_size;
            if (scan->kept && c % scan->block == 0) {
                const int64_t block = (task.b * scan->heads + head) * scan->kept_blocks + c / scan->block;
                memcpy(scan->kept + block * state_size, state, state_size * sizeof(float));
            }
            scan_chunk(scan, &task, s, state, head, start, count);
        }
    }
    for (int64_t head = task.head; head < task.end; head++)
        write_state(scan, s->states + (head - task.head) * state_size, width, callers_state + (head - task.head) * callers);
}

EXPORT_PASS(cald_ssd_forward, nothing_more)

EXPORT_FIELDS(cald_ssd, Scan, SCAN_FIELDS)
