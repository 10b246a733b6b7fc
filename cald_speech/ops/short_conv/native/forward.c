/* The short convolution's forward pass: y_t = act(bias + sum_k taps_k x_{t-(K-1)+k}) in the order of the scan. */

#include "short_conv.h"
#include "pass.h"

typedef struct {
    const float **rows;   /* what the filter sees of a tile */
    float *zeros, *waste; /* a row of silence, and one for the frames that a tile has too many */
} Scratch;

static Scratch take_scratch(const Conv *conv, Arena *arena) {
    Scratch s;
    s.rows = take(arena, conv->taps - 1 + TILE_FRAMES, sizeof(float *));
    s.zeros = take_floats(arena, conv->strip);
    s.waste = take_floats(arena, conv->strip);
    return s;
}

INLINE void filter_vector(const Conv *conv, const int64_t taps, const float *taps_bias, const float *const *rows,
                          float *const *y, int64_t j, int64_t count) {
    vec sums[TILE_FRAMES], unused;
    convolve(conv, taps, taps_bias, rows, j, count, sums);
#pragma GCC unroll 4
    for (int i = 0; i < TILE_FRAMES; i++) {
        if (conv->silu) sums[i] *= sigmoid_of(sums[i], &unused);
        store_first(y[i] + j, sums[i], count);
    }
}

INLINE void filter_tile(const Conv *conv, const Task *task, const int64_t taps, const float *const *rows,
                        float *const *y) {
    const float *taps_bias = conv->taps_bias + task->channel;
    int64_t j = 0;
    for (; j + LANES <= task->width; j += LANES) filter_vector(conv, taps, taps_bias, rows, y, j, LANES);
    if (j < task->width) filter_vector(conv, taps, taps_bias, rows, y, j, task->width - j);
}

static void run_task(const Conv *conv, Task task, const Scratch *s) {
    const int64_t end = valid_end(&task), past = conv->taps - 1;
    for (int64_t position = task.start; position < end; position += TILE_FRAMES) {
        float *y[TILE_FRAMES];
        find_inputs(conv, &task, position, s->zeros, s->rows);
        for (int i = 0; i < TILE_FRAMES; i++)
            y[i] = position + i < end ? frame_at(conv, &task, conv->y, position + i) : s->waste;
        if (conv->taps == USUAL_TAPS)
            filter_tile(conv, &task, USUAL_TAPS, s->rows, y);
        else
            filter_tile(conv, &task, conv->taps, s->rows, y);
    }
    clear_padding(&task, conv->y);
    if (task.block) return;
    find_inputs(conv, &task, task.length, s->zeros, s->rows);
    for (int64_t i = 0; i < past; i++)
        memcpy(state_at(conv, &task, conv->state, i), s->rows[i], task.width * sizeof(float));
}

EXPORT_PASS(cald_short_conv_forward, nothing_more)

EXPORT_FIELDS(cald_short_conv, Conv, CONV_FIELDS)
