/* The selective scan's backward pass: block by block against the scan, each from the state kept before it.

With g the gradient of the state after frame t, which is C dy and what the frame that follows hands back: the gradients
of x and dt are sums over the state, those of B and C sums over the channels; dt A's is g times the decayed state, not a
difference, which would cancel. */

#include "selective_scan.h"
#include "pass.h"

typedef struct {
    float *A, *gradient;    /* (d_state, STRIP) */
    float *decays, *states; /* (block, d_state, STRIP); of states one more: the one before the block comes first */
    float *x, *dt;          /* (block, STRIP) */
    float *dA;              /* (d_state, STRIP): the block's */
    float *dy, *dx, *ddt, *D, *dD; /* (STRIP) */
} Scratch;

static Scratch take_scratch(const Selective *scan, Arena *arena) {
    const int64_t state_size = scan->d_state * STRIP;
    Scratch s;
    float **of_state[] = {&s.A, &s.gradient, &s.dA}, **rows[] = {&s.dy, &s.dx, &s.ddt, &s.D, &s.dD};
    for (int i = 0; i < 3; i++) *of_state[i] = take_floats(arena, state_size);
    for (int i = 0; i < 5; i++) *rows[i] = take_floats(arena, STRIP);
    s.decays = take_floats(arena, scan->block * state_size);
    s.states = take_floats(arena, (scan->block + 1) * state_size);
    s.x = take_floats(arena, scan->block * STRIP);
    s.dt = take_floats(arena, scan->block * STRIP);
    return s;
}

/* x, dt, decays and states of a block of ``count`` frames, from the state that was kept before it. */
static void scan_again(const Selective *scan, const Task *task, const Scratch *s, int64_t start, int64_t count) {
    const int64_t state_size = scan->d_state * STRIP;
    memset(s->x, 0, count * STRIP * sizeof(float));
    memset(s->dt, 0, count * STRIP * sizeof(float));
    for (int64_t t = 0; t < count; t++) {
        float *x = s->x + t * STRIP, *dt = s->dt + t * STRIP;
        expect(frame_at(scan, task, scan->x, task->channel, start + t + AHEAD), task->width);
        expect(frame_at(scan, task, scan->dt, task->channel, start + t + AHEAD), task->width);
        memcpy(x, frame_at(scan, task, scan->x, task->channel, start + t), task->width * sizeof(float));
        memcpy(dt, frame_at(scan, task, scan->dt, task->channel, start + t), task->width * sizeof(float));
        const float *B = maps_at(scan, task, scan->B, start + t), *before = s->states + t * state_size;
        float *decays = s->decays + t * state_size, *after = s->states + (t + 1) * state_size;
        for (int64_t n = 0; n < scan->d_state; n++)
            for (int64_t c = 0; c < STRIP; c += LANES) {
                const int64_t at = n * STRIP + c;
                const vec decay = exp2_of(load(dt + c) * load(s->A + at));
                store(decays + at, decay);
                store(after + at, decay * load(before + at) + load(dt + c) * load(x + c) * B[n]);
            }
    }
}

/* One frame, ``t`` of its block: the gradients of its x and dt, its additions to those of A, B and C. */
static void step_back(const Selective *scan, const Scratch *s, int64_t t, const float *B, const float *C, float *dB,
                      float *dC) {
    const int64_t state_size = scan->d_state * STRIP;
    const float *x = s->x + t * STRIP, *dt = s->dt + t * STRIP, *decays = s->decays + t * state_size;
    const float *before = s->states + t * state_size, *after = before + state_size;
    vec sum_B[STRIP / LANES], sum_decay[STRIP / LANES]; /* over the state: of g B, and of g decay h A */
    for (int64_t c = 0; c < STRIP / LANES; c++) sum_B[c] = sum_decay[c] = (vec){0};
    for (int64_t n = 0; n < scan->d_state; n++) {
        vec over_B = {0}, over_C = {0};
#pragma GCC unroll 16
        for (int64_t i = 0; i < STRIP / LANES; i++) {
            const int64_t c = i * LANES, at = n * STRIP + c;
            const vec dy = load(s->dy + c), g = load(s->gradient + at) + C[n] * dy, carried = g * load(decays + at);
            const vec through = carried * load(before + at);
            store(s->gradient + at, carried);
            store(s->dA + at, load(s->dA + at) + through * load(dt + c));
            sum_B[i] += g * B[n];
            sum_decay[i] += through * load(s->A + at);
            over_B += g * load(dt + c) * load(x + c);
            over_C += dy * load(after + at);
        }
        dB[n] += sum_of(over_B);
        dC[n] += sum_of(over_C);
    }
    for (int64_t i = 0; i < STRIP / LANES; i++) {
        const int64_t c = i * LANES;
        const vec dy = load(s->dy + c);
        store(s->dx + c, sum_B[i] * load(dt + c) + load(s->D + c) * dy);
        store(s->ddt + c, sum_B[i] * load(x + c) + 0.6931471805599453f * sum_decay[i]); /* A is in powers of two */
        store(s->dD + c, load(s->dD + c) + dy * load(x + c));
    }
}

static void run_block(const Selective *scan, const Task *task, const Task *part, const Scratch *s, int64_t start,
                      int64_t count) {
    const int64_t bytes = task->width * sizeof(float), first = task->b * scan->channels + task->channel;
    scan_again(scan, task, s, start, count);
    memset(s->dA, 0, scan->d_state * STRIP * sizeof(float));
    memset(s->dD, 0, STRIP * sizeof(float));
    for (int64_t t = count - 1; t >= 0; t--) {
        expect(frame_at(scan, task, scan->y, task->channel, start + t - AHEAD), task->width);
        memcpy(s->dy, frame_at(scan, task, scan->y, task->channel, start + t), bytes);
        step_back(scan, s, t, maps_at(scan, task, scan->B, start + t), maps_at(scan, task, scan->C, start + t),
                  maps_at(scan, part, scan->dB, start + t), maps_at(scan, part, scan->dC, start + t));
        memcpy(frame_at(scan, task, scan->dx, task->channel, start + t), s->dx, bytes);
        memcpy(frame_at(scan, task, scan->ddt, task->channel, start + t), s->ddt, bytes);
    }
    /* Sums over all frames in double: a float would drift over hours of them. */
    for (int64_t c = 0; c < task->width; c++) {
        scan->dD[first + c] += s->dD[c];
        for (int64_t n = 0; n < scan->d_state; n++) scan->dA[(first + c) * scan->d_state + n] += s->dA[n * STRIP + c];
    }
}

static void run_strip(const Selective *scan, const Task *task, const Task *part, const Scratch *s, int64_t strip) {
    const int64_t state_size = scan->d_state * STRIP;
    float *state = scan->state + task->b * scan->channels * scan->d_state;
    clear_frames(scan, task, scan->dx, task->channel, task->width);
    clear_frames(scan, task, scan->ddt, task->channel, task->width);
    read_strip(scan, task, scan->A, s->A);
    read_strip(scan, task, state, s->gradient);
    float *rows[] = {s->dy, s->D};
    for (int i = 0; i < 2; i++) memset(rows[i], 0, STRIP * sizeof(float));
    if (scan->D) memcpy(s->D, scan->D + task->channel, task->width * sizeof(float));
    for (int64_t block = (task->length + scan->block - 1) / scan->block - 1; block >= 0; block--) {
        const int64_t start = block * scan->block, left = task->length - start;
        memcpy(s->states, kept_at(scan, task, strip, block), state_size * sizeof(float));
        run_block(scan, task, part, s, start, left < scan->block ? left : scan->block);
    }
    write_strip(scan, task, s->gradient, state);
}

/* dB, dC, dA and dD: zeros, added to. */
static void run_task(const Selective *scan, Task task, const Scratch *s) {
    Task part = task;
    part.b += task.part * scan->batch;
    for (int64_t strip = task.strip; strip < task.end; strip++) {
        choose_strip(scan, &task, strip);
        run_strip(scan, &task, &part, s, strip);
    }
}

EXPORT_PASS(cald_selective_scan_backward, nothing_more)
