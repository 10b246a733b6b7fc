/* The gated delta rule's forward pass, chunk by chunk and head by head in the caches. */

#include "gated_delta.h"
#include "pass.h"

typedef struct {
    Maps maps;
    Own own;
    float *y;      /* (chunk, head_dim) */
    float *states; /* of every head of the task, (d_state, head_dim) */
} Scratch;

static Scratch take_scratch(const Delta *delta, Arena *arena) {
    const int64_t width = padded(delta->head_dim), d_state = padded(delta->d_state);
    const int64_t most_heads = delta->heads / delta->groups / delta->parts + 1;
    float *faded = delta->per_channel ? take_floats(arena, d_state * delta->chunk) : NULL;
    Scratch s = {take_maps(delta, arena), take_own(delta, arena, faded), NULL, NULL};
    s.y = take_floats(arena, delta->chunk * width);
    s.states = take_floats(arena, most_heads * d_state * width);
    return s;
}

static void scan_chunk(const Delta *delta, const Task *task, const Scratch *s, float *state, int64_t head, int64_t start,
                       int64_t count) {
    static const float one = 1;
    const int64_t chunk = delta->chunk, width = padded(delta->head_dim), d_state = padded(delta->d_state);
    const Own *o = &s->own;
    open_own(delta, task, &s->maps, o, head, start, count);
    product(chunk, width, d_state, (Left){o->reads, d_state, 1}, state, width, NULL, 0, s->y, width, WHOLE);
    solve(delta, o, state);
    product(chunk, width, chunk, (Left){o->answers, chunk, 1}, o->update, width, &one, 0, s->y, width, LEFT_LOWER);
    const int64_t ahead = ahead_of(delta, task, delta->y);
    for (int64_t i = 0; i < count; i++) {
        float *to = at(delta, task, delta->y, head, start + i);
        expect(to + ahead, delta->head_dim);
        memcpy(to, s->y + i * width, delta->head_dim * sizeof(float));
    }
    move_on(delta, o, state);
}

static void run_task(const Delta *delta, Task task, const Scratch *s) {
    const int64_t chunk = delta->chunk, width = padded(delta->head_dim), d_state = padded(delta->d_state);
    const int64_t state_size = d_state * width, callers = delta->head_dim * delta->d_state;
    float *callers_state = delta->state + (task.b * delta->heads + task.head) * callers;
    for (int64_t head = task.head; head < task.end; head++) {
        read_state(delta, callers_state + (head - task.head) * callers, s->states + (head - task.head) * state_size, width);
        clear_padding(delta, &task, delta->y, head, delta->head_dim);
    }
    for (int64_t start = 0, c = 0; start < task.length; start += chunk, c++) {
        const int64_t count = task.length - start < chunk ? task.length - start : chunk;
        open_maps(delta, &task, &s->maps, start, count);
        for (int64_t head = task.head; head < task.end; head++) {
            float *state = s->states + (head - task.head) * state_size;
            if (delta->kept && c % delta->block == 0) {
                const int64_t block = (task.b * delta->heads + head) * delta->kept_blocks + c / delta->block;
                memcpy(delta->kept + block * state_size, state, state_size * sizeof(float));
            }
            scan_chunk(delta, &task, s, state, head, start, count);
        }
    }
    for (int64_t head = task.head; head < task.end; head++)
        write_state(delta, s->states + (head - task.head) * state_size, width, callers_state + (head - task.head) * callers);
}

EXPORT_PASS(cald_gated_delta_forward, nothing_more)

EXPORT_FIELDS(cald_gated_delta, Delta, DELTA_FIELDS)
