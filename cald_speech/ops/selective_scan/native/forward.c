/* The selective scan's forward pass (Gu & Dao, arXiv 2312.00752): h <- 2^(dt A) h + dt x B, y = <h, C> + D x. */

#include "selective_scan.h"
#include "pass.h"

typedef struct {
    float *A, *state; /* (d_state, STRIP) */
    float *x, *dt, *D, *y; /* (STRIP) */
} Scratch;

static Scratch take_scratch(const Selective *scan, Arena *arena) {
    Scratch s;
    s.A = take_floats(arena, scan->d_state * STRIP);
    s.state = take_floats(arena, scan->d_state * STRIP);
    float **rows[] = {&s.x, &s.dt, &s.D, &s.y};
    for (int i = 0; i < 4; i++) *rows[i] = take_floats(arena, STRIP);
    return s;
}

/* One frame: moves the state on and leaves the output. */
static void step(const Selective *scan, const Scratch *s, const float *B, const float *C) {
    for (int64_t c = 0; c < STRIP; c += LANES) {
        const vec x = load(s->x + c), dt = load(s->dt + c), weighted = x * dt;
        vec y = load(s->D + c) * x;
        for (int64_t n = 0; n < scan->d_state; n++) {
            float *at = s->state + n * STRIP + c;
            const vec state = exp2_of(dt * load(s->A + n * STRIP + c)) * load(at) + weighted * B[n];
            store(at, state);
            y += state * C[n];
        }
        store(s->y + c, y);
    }
}

static void run_strip(const Selective *scan, const Task *task, const Scratch *s, int64_t strip) {
    const int64_t bytes = task->width * sizeof(float), state_size = scan->d_state * STRIP;
    float *state = scan->state + task->b * scan->channels * scan->d_state;
    clear_frames(scan, task, scan->y, task->channel, task->width);
    read_strip(scan, task, scan->A, s->A);
    read_strip(scan, task, state, s->state);
    float *rows[] = {s->x, s->dt, s->D};
    for (int i = 0; i < 3; i++) memset(rows[i], 0, STRIP * sizeof(float));
    if (scan->D) memcpy(s->D, scan->D + task->channel, bytes);
    for (int64_t t = 0; t < task->length; t++) {
        if (scan->kept && t % scan->block == 0)
            memcpy(kept_at(scan, task, strip, t / scan->block), s->state, state_size * sizeof(float));
        expect(frame_at(scan, task, scan->x, task->channel, t + AHEAD), task->width);
        expect(frame_at(scan, task, scan->dt, task->channel, t + AHEAD), task->width);
        memcpy(s->x, frame_at(scan, task, scan->x, task->channel, t), bytes);
        memcpy(s->dt, frame_at(scan, task, scan->dt, task->channel, t), bytes);
        step(scan, s, maps_at(scan, task, scan->B, t), maps_at(scan, task, scan->C, t));
        memcpy(frame_at(scan, task, scan->y, task->channel, t), s->y, bytes);
    }
    write_strip(scan, task, s->state, state);
}

static void run_task(const Selective *scan, Task task, const Scratch *s) {
    for (int64_t strip = task.strip; strip < task.end; strip++) {
        choose_strip(scan, &task, strip);
        run_strip(scan, &task, s, strip);
    }
}

EXPORT_PASS(cald_selective_scan_forward, nothing_more)

EXPORT_FIELDS(cald_selective_scan, Selective, SELECTIVE_FIELDS)
