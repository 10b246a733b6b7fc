/* The short convolution's backward pass, each frame's sum computed again: only the inputs were kept.

With ds_t the gradient of frame t's sum, dx_t = sum_k taps_k ds_{t+(K-1)-k} and dtaps_k = sum_t ds_t x_{t-(K-1)+k}. A
tile finds the ds of its frames and then the dx of as many frames K-1 before them, whose last ds is then there. A block
runs on for K-1 frames into the next, for the dx of its own last frames: so blocks need nothing of each other. */

#include "short_conv.h"
#include "pass.h"

#define SUMMED_TOGETHER 256

typedef struct {                  /* the rows of a tile; all but ``dy`` begin K-1 frames before it */
    const float **x;              /* taps - 1 + TILE_FRAMES of them */
    float **ds;                   /* as many, in ``ring`` */
    const float *dy[TILE_FRAMES];
    float *dx[TILE_FRAMES];
    float *ring;                  /* (taps - 1 + TILE_FRAMES, strip): a new frame's ds replaces the oldest */
    float *zeros, *waste;         /* a row of silence, and one for what another block finds */
    float *waste_sums;            /* the same for sums: (taps + 1, padded channels) */
} Scratch;

static Scratch take_scratch(const Conv *conv, Arena *arena) {
    const int64_t rows = conv->taps - 1 + TILE_FRAMES;
    Scratch s;
    s.x = take(arena, rows, sizeof(float *));
    s.ds = take(arena, rows, sizeof(float *));
    s.ring = take_floats(arena, rows * conv->strip);
    s.zeros = take_floats(arena, conv->strip);
    s.waste = take_floats(arena, conv->strip);
    s.waste_sums = take_floats(arena, (conv->taps + 1) * padded(conv->channels));
    return s;
}

INLINE void differentiate_vector(const Conv *conv, const int64_t taps, const float *taps_bias, const Scratch *s,
                                 float *block_sums, int64_t j, int64_t count) {
    const int64_t row = padded(conv->channels);
    vec ds[TILE_FRAMES] = {{0}}, dx[TILE_FRAMES] = {{0}};
    if (conv->silu) convolve(conv, taps, taps_bias, s->x, j, count, ds);
#pragma GCC unroll 4
    for (int i = 0; i < TILE_FRAMES; i++) {
        const vec dy = load_first(s->dy[i] + j, count);
        vec complement;
        if (conv->silu) {
            const vec sigmoid = sigmoid_of(ds[i], &complement);
            ds[i] = dy * (sigmoid + ds[i] * sigmoid * complement);
        } else
            ds[i] = dy;
        store(s->ds[taps - 1 + i] + j, ds[i]);
    }
#pragma GCC unroll 4
    for (int64_t k = 0; k < taps; k++) {
        const vec tap = load(taps_bias + k * row + j);
        vec dtap = load(block_sums + k * row + j);
#pragma GCC unroll 4
        for (int i = 0; i < TILE_FRAMES; i++) {
            dx[i] += tap * load(s->ds[i + taps - 1 - k] + j);
            dtap += ds[i] * load_first(s->x[i + k] + j, count);
        }
        store(block_sums + k * row + j, dtap);
    }
    store(block_sums + taps * row + j, load(block_sums + taps * row + j) + (ds[0] + ds[1] + (ds[2] + ds[3])));
#pragma GCC unroll 4
    for (int i = 0; i < TILE_FRAMES; i++) store_first(s->dx[i] + j, dx[i], count);
}

INLINE void differentiate_tile(const Conv *conv, const Task *task, const int64_t taps, const Scratch *s, float *sums) {
    const float *taps_bias = conv->taps_bias + task->channel;
    int64_t j = 0;
    for (; j + LANES <= task->width; j += LANES) differentiate_vector(conv, taps, taps_bias, s, sums, j, LANES);
    if (j < task->width) differentiate_vector(conv, taps, taps_bias, s, sums, j, task->width - j);
}

/* Where the gradient of the input at ``position`` goes, or NULL: another block finds it, or it does not exist. */
static float *gradient_at(const Conv *conv, const Task *task, int64_t position) {
    if (position < 0 && !task->block) return state_at(conv, task, conv->dhistory, position + conv->taps - 1);
    if (position < task->start || position >= valid_end(task)) return NULL;
    return frame_at(conv, task, conv->dx, position);
}

static void find_rows(const Conv *conv, const Task *task, int64_t position, Scratch *s) {
    const int64_t past = conv->taps - 1, rows = past + TILE_FRAMES;
    find_inputs(conv, task, position, s->zeros, s->x);
    for (int64_t i = 0; i < rows; i++) s->ds[i] = s->ring + (position - task->start + i) % rows * conv->strip;
    for (int i = 0; i < TILE_FRAMES; i++) {
        s->dy[i] = position + i < task->length ? frame_at(conv, task, conv->y, position + i) : s->zeros;
        float *dx = gradient_at(conv, task, position - past + i);
        s->dx[i] = dx ? dx : s->waste;
    }
}

/* The final state holds the scan's last K-1 inputs: its gradient is a part of theirs. */
static void add_state(const Conv *conv, const Task *task) {
    const int64_t past = conv->taps - 1;
    for (int64_t i = 0; i < past; i++) {
        const float *from = state_at(conv, task, conv->state, i);
        float *dx = gradient_at(conv, task, task->length - past + i);
        for (int64_t j = 0; dx && j < task->width; j++) dx[j] += from[j];
    }
}

static void run_task(const Conv *conv, Task task, Scratch *s) {
    const int64_t end = valid_end(&task), past = conv->taps - 1, row = padded(conv->channels);
    float *sums = conv->block_sums + (task.b * conv->blocks + task.block) * (conv->taps + 1) * row + task.channel;
    for (int64_t k = 0; k <= conv->taps; k++) memset(sums + k * row, 0, padded(task.width) * sizeof(float));
    memset(s->ring, 0, (past + TILE_FRAMES) * conv->strip * sizeof(float));
    for (int64_t position = task.start; position - past < end; position += TILE_FRAMES) {
        find_rows(conv, &task, position, s);
        /* The next block's frames are not to be counted twice. Beyond the sequence's end there is nothing to count. */
        float *own = position < end ? sums : s->waste_sums;
        if (conv->taps == USUAL_TAPS)
            differentiate_tile(conv, &task, USUAL_TAPS, s, own);
        else
            differentiate_tile(conv, &task, conv->taps, s, own);
    }
    add_state(conv, &task);
    clear_padding(&task, conv->dx);
}

/* Over blocks, in double: a float32 sum over hours of frames would drift. */
static void sum_blocks(const Conv *conv, int64_t start) {
    const int64_t size = (conv->taps + 1) * padded(conv->channels);
    const int64_t count = size - start < SUMMED_TOGETHER ? size - start : SUMMED_TOGETHER;
    double sums[SUMMED_TOGETHER] = {0};
    for (int64_t block = 0; block < conv->batch * conv->blocks; block++)
        for (int64_t j = 0; j < count; j++) sums[j] += conv->block_sums[block * size + start + j];
    for (int64_t j = 0; j < count; j++) conv->dtaps_bias[start + j] = sums[j];
}

static void sum_all_blocks(const Conv *conv) {
#pragma omp for
    for (int64_t start = 0; start < (conv->taps + 1) * padded(conv->channels); start += SUMMED_TOGETHER)
        sum_blocks(conv, start);
}

EXPORT_PASS(cald_short_conv_backward, sum_all_blocks)
