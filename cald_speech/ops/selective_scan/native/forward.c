/* The selective scan's forward pass (Gu & Dao, arXiv 2312.00752): h <- 2^(dt A) h + dt x B, y = <h, C> + D x. */

#include "selective_scan.h"

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

/* Bytes that one thread needs. */
int64_t cald_selective_scan_forward_scratch(const Selective *scan) {
    Arena counted = {0};
    take_scratch(scan, &counted);
    return counted.used;
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

static void run_strip(const Selective *scan, const Span *span, const Scratch *s, int64_t strip) {
    const int64_t bytes = span->width * sizeof(float), state_size = scan->d_state * STRIP;
    float *state = scan->state + span->b * scan->channels * scan->d_state;
    clear_frames(scan, span, scan->y, span->channel, span->width);
    read_strip(scan, span, scan->A, s->A);
    read_strip(scan, span, state, s->state);
    float *rows[] = {s->x, s->dt, s->D};
    for (int i = 0; i < 3; i++) memset(rows[i], 0, STRIP * sizeof(float));
    if (scan->D) memcpy(s->D, scan->D + span->channel, bytes);
    for (int64_t t = 0; t < span->length; t++) {
        if (scan->kept && t % scan->block == 0)
            memcpy(kept_at(scan, span, strip, t / scan->block), s->state, state_size * sizeof(float));
        expect(frame_at(scan, span, scan->x, span->channel, t + AHEAD), span->width);
        expect(frame_at(scan, span, scan->dt, span->channel, t + AHEAD), span->width);
        memcpy(s->x, frame_at(scan, span, scan->x, span->channel, t), bytes);
        memcpy(s->dt, frame_at(scan, span, scan->dt, span->channel, t), bytes);
        step(scan, s, maps_at(scan, span, scan->B, t), maps_at(scan, span, scan->C, t));
        memcpy(frame_at(scan, span, scan->y, span->channel, t), s->y, bytes);
    }
    write_strip(scan, span, s->state, state);
}

/* ``scratch``: cald_selective_scan_forward_scratch() bytes for each thread, at a cache line's beginning. */
void cald_selective_scan_forward(const Selective *scan, char *scratch) {
    const int64_t spans = span_count(scan), bytes = cald_selective_scan_forward_scratch(scan);
#pragma omp parallel num_threads(scan->threads)
    {
        Arena arena = {scratch + thread_number() * bytes, 0};
        const Scratch s = take_scratch(scan, &arena);
#pragma omp for schedule(dynamic)
        for (int64_t number = 0; number < spans; number++) {
            Span span = span_of(scan, number);
            for (int64_t strip = span.strip; strip < span.end; strip++) {
                choose_strip(scan, &span, strip);
                run_strip(scan, &span, &s, strip);
            }
        }
    }
}

/* For a test: whether both languages lay the arguments out alike. */
int64_t cald_selective_scan_arguments_size(void) { return sizeof(Selective); }
