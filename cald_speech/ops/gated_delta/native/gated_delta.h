/* What the gated delta rule's forward and backward passes share: the call's arguments, and one chunk of one head.

With S the state before a chunk (its rows are the channels of the keys), frame i is told what the state answers to its key
already, those that were written before it in the chunk included, and writes what is missing:

    error_i = v_i - into_i k_i S - sum_{j<i} (decay_ij k_i . k_j) update_j,   update_i = beta_i error_i
    y_i     = into_i q_i S + sum_{j<=i} (decay_ij q_i . k_j) update_j
    S      <- through S + sum_j out_j k_j update_j

which is a triangular system, solved frame by frame. ``decay_ij``, from frame j to frame i, is a product of the frames' own
decays and never of a power that could overflow. */

#ifndef CALD_GATED_DELTA_H
#define CALD_GATED_DELTA_H

#include <float.h>
#include <math.h>

#include "product.h"

#define DELTA_FIELDS(FIELD) /* as in __init__.py */                                                             \
    FIELD(int64_t, batch) FIELD(int64_t, frames) FIELD(int64_t, heads) FIELD(int64_t, head_dim)                 \
    FIELD(int64_t, groups) FIELD(int64_t, d_state)                                                              \
    FIELD(int64_t, chunk) /* frames of a chunk, a multiple of PAD */                                            \
    FIELD(int64_t, block) /* chunks from one kept state to the next */                                          \
    FIELD(int64_t, kept_blocks) /* kept states of a sequence */                                                 \
    FIELD(int64_t, parts) /* tasks that share a group's heads */                                                \
    FIELD(int64_t, threads)                                                                                     \
    FIELD(int64_t, reverse) /* from the last valid frame to the first */                                        \
    FIELD(int64_t, per_channel) /* every channel of the keys has its decay */                                   \
    FIELD(const int64_t *, lengths) /* (batch), or NULL: every frame is valid */                                \
    FIELD(float *, state) /* (batch, heads, head_dim, d_state): in, the initial state; out, the final */        \
    FIELD(float *, kept) /* (batch, heads, kept_blocks, d_state, head_dim), padded; or NULL */                  \
    FIELD(Tensor, q) FIELD(Tensor, k) FIELD(Tensor, v) FIELD(Tensor, beta) FIELD(Tensor, g) FIELD(Tensor, y)    \
    FIELD(Tensor, dq) FIELD(Tensor, dk) /* (parts * batch, frame, group, features). From here on the backward */ \
    FIELD(Tensor, dv) FIELD(Tensor, dbeta) FIELD(Tensor, dg) /* pass alone, for which y is its gradient, and */ \
    /* state the final and then the initial one's */

typedef struct {
    DELTA_FIELDS(DECLARED)
} Delta;
typedef Delta Arguments;

#include "heads.h"

#define LOG2_E 1.4426950408889634
#define STRONGEST -150 /* 2^-150 is 0 in float: a stronger decay is no different, and an infinite one is this one */

typedef struct { /* of one chunk, for all heads of the task */
    float *q, *k;      /* (chunk, d_state) */
    float *k_by_frame; /* k transposed */
    float *qk, *kk;    /* q k^T and k k^T, (chunk, chunk); not where every channel has its decay */
} Maps;

typedef struct { /* of one chunk of one head */
    float *beta;                    /* (chunk) */
    float *decay, *into, *out;      /* (chunk), or (chunk, d_state): into a frame; from the state before; to that after */
    float *through;                 /* (d_state): from the state before the chunk to the one after it */
    float *between;                 /* (chunk, chunk): from frame to frame; not where every channel has its own */
    float *asks, *reads, *writes;   /* (chunk, d_state): -into k, into q, out k */
    float *corrects, *answers;      /* (chunk, chunk), below the diagonal: -between kk, between qk */
    float *error, *update;          /* (chunk, head_dim) */
    float *faded;                   /* (d_state, chunk): keys as they decay; where every channel has its decay */
} Own;

static Maps take_maps(const Delta *delta, Arena *arena) {
    const int64_t chunk = delta->chunk, size = chunk * padded(delta->d_state);
    Maps maps = {take_floats(arena, size), take_floats(arena, size), take_floats(arena, size), NULL, NULL};
    if (delta->per_channel) return maps;
    maps.qk = take_floats(arena, chunk * chunk);
    maps.kk = take_floats(arena, chunk * chunk);
    return maps;
}

/* ``faded`` : where keys may decay, which chunks can share. */
static Own take_own(const Delta *delta, Arena *arena, float *faded) {
    const int64_t chunk = delta->chunk, width = padded(delta->head_dim), d_state = padded(delta->d_state);
    const int64_t decays = delta->per_channel ? chunk * d_state : chunk;
    Own o = {.faded = faded};
    o.beta = take_floats(arena, chunk);
    float **of_decays[] = {&o.decay, &o.into, &o.out}, **of_keys[] = {&o.asks, &o.reads, &o.writes};
    for (int i = 0; i < 3; i++) *of_decays[i] = take_floats(arena, decays);
    o.through = take_floats(arena, d_state);
    if (!delta->per_channel) o.between = take_floats(arena, chunk * chunk);
    for (int i = 0; i < 3; i++) *of_keys[i] = take_floats(arena, chunk * d_state);
    o.corrects = take_floats(arena, chunk * chunk);
    o.answers = take_floats(arena, chunk * chunk);
    o.error = take_floats(arena, chunk * width);
    o.update = take_floats(arena, chunk * width);
    return o;
}

static void open_maps(const Delta *delta, const Task *task, const Maps *m, int64_t start, int64_t count) {
    const int64_t chunk = delta->chunk, d_state = padded(delta->d_state);
    pack(delta, task, delta->k, task->group, start, count, delta->d_state, m->k, d_state);
    pack(delta, task, delta->q, task->group, start, count, delta->d_state, m->q, d_state);
    transpose(m->k, chunk, d_state, m->k_by_frame);
    if (delta->per_channel) return;
    product(chunk, chunk, d_state, (Left){m->k, d_state, 1}, m->k_by_frame, chunk, NULL, 0, m->kk, chunk, OUT_LOWER);
    product(chunk, chunk, d_state, (Left){m->q, d_state, 1}, m->k_by_frame, chunk, NULL, 0, m->qk, chunk, OUT_LOWER);
}

INLINE vec all(float v) { return (vec){0} + v; }

/* log2 of a frame's decay. What is no decay, NaN or +inf, stays visible: exp2_of() alone would make 1 of the latter. */
INLINE float exponent_of(float g) { return g > FLT_MAX ? NAN : g * LOG2_E < STRONGEST ? STRONGEST : g * (float)LOG2_E; }

static void find_decays(const Delta *delta, const Task *task, int64_t head, int64_t start, int64_t count, const Own *o) {
    const int64_t chunk = delta->chunk, d_state = padded(delta->d_state);
    double sum = 0;
    for (int64_t i = 0; i < chunk; i++) {
        o->decay[i] = i < count ? exponent_of(*at(delta, task, delta->g, head, start + i)) : 0;
        o->into[i] = sum += o->decay[i];
    }
    sum = 0;
    for (int64_t i = chunk - 1; i >= 0; i--) {
        o->out[i] = sum;
        sum += o->decay[i];
    }
    float *each[] = {o->decay, o->into, o->out};
    for (int k = 0; k < 3; k++)
        for (int64_t i = 0; i < chunk; i += LANES) store(each[k] + i, exp2_of(load(each[k] + i)));
    for (int64_t n = 0; n < d_state; n++) o->through[n] = o->into[chunk - 1];
}

/* The same for every channel: products within the chunk, the whole chunk's from the sum, since only that adds up. */
static void find_decays_by_channel(const Delta *delta, const Task *task, int64_t head, int64_t start, int64_t count,
                                   const Own *o) {
    const int64_t chunk = delta->chunk, d_state = padded(delta->d_state);
    pack(delta, task, delta->g, head, start, count, delta->d_state, o->out, d_state);
    for (int64_t n = 0; n < d_state; n += LANES) {
        vec sum = {0}, into = all(1);
        for (int64_t i = 0; i < chunk; i++) {
            vec g = load(o->out + i * d_state + n);
            const ivec unbounded = g > FLT_MAX, total = g * (float)LOG2_E < (float)STRONGEST;
            g = where(~total, g * (float)LOG2_E) + where(total, all(STRONGEST));
            const vec decay = exp2_of(g) + where(unbounded, all(NAN));
            sum += g;
            into *= decay;
            store(o->decay + i * d_state + n, decay);
            store(o->into + i * d_state + n, into);
        }
        store(o->through + n, exp2_of(sum) + (into - into));
        vec out = all(1);
        for (int64_t i = chunk - 1; i >= 0; i--) {
            store(o->out + i * d_state + n, out);
            out *= load(o->decay + i * d_state + n);
        }
    }
}

static void find_weights(const Delta *delta, const Maps *m, const Own *o) {
    const int64_t chunk = delta->chunk;
    for (int64_t i = 0; i < chunk; i++)
        for (int64_t j = 0; j < padded(i + 1); j += LANES) {
            ivec frame;
            for (int lane = 0; lane < LANES; lane++) frame[lane] = (int32_t)j + lane;
            vec between = where(frame == (int32_t)i, all(1));
            if (i) between += where(frame < (int32_t)i, load(o->between + (i - 1) * chunk + j) * o->decay[i]);
            store(o->between + i * chunk + j, between);
            store(o->corrects + i * chunk + j, -between * load(m->kk + i * chunk + j));
            store(o->answers + i * chunk + j, between * load(m->qk + i * chunk + j));
        }
}

/* Rows i to i + TILE_ROWS of both, for frames j to j + LANES, whose keys decay on from row to row. ``diagonal`` : some of
them are not before i. What stands behind the diagonal is nothing that counts. */
INLINE void rows_by_channel(const int diagonal, const Delta *delta, const Maps *m, const Own *o, int64_t i, int64_t j) {
    const int64_t chunk = delta->chunk, d_state = padded(delta->d_state);
    vec of_keys[TILE_ROWS], of_queries[TILE_ROWS];
    ivec frame;
    for (int lane = 0; lane < LANES; lane++) frame[lane] = (int32_t)j + lane;
#pragma GCC unroll 8
    for (int r = 0; r < TILE_ROWS; r++) of_keys[r] = of_queries[r] = (vec){0};
    for (int64_t n = 0; n < d_state; n++) {
        vec key = load(o->faded + n * chunk + j);
#pragma GCC unroll 8
        for (int r = 0; r < TILE_ROWS; r++) {
            const int64_t entry = (i + r) * d_state + n;
            const vec faded = key * o->decay[entry];
            const ivec before = frame < (int32_t)(i + r);
            key = diagonal ? (vec)(((ivec)faded & before) | ((ivec)key & ~before)) : faded;
            of_keys[r] += m->k[entry] * key;
            of_queries[r] += m->q[entry] * key;
        }
        store(o->faded + n * chunk + j, key);
    }
#pragma GCC unroll 8
    for (int r = 0; r < TILE_ROWS; r++) {
        store(o->corrects + (i + r) * chunk + j, -of_keys[r]);
        store(o->answers + (i + r) * chunk + j, of_queries[r]);
    }
}

static void find_weights_by_channel(const Delta *delta, const Maps *m, const Own *o) {
    const int64_t chunk = delta->chunk;
    memcpy(o->faded, m->k_by_frame, padded(delta->d_state) * chunk * sizeof(float));
    for (int64_t i = 0; i < chunk; i += TILE_ROWS)
        for (int64_t j = 0; j < padded(i + TILE_ROWS); j += LANES)
            if (j + LANES <= i)
                rows_by_channel(0, delta, m, o, i, j);
            else
                rows_by_channel(1, delta, m, o, i, j);
}

/* All that does not depend on the state. */
static void open_own(const Delta *delta, const Task *task, const Maps *m, const Own *o, int64_t head, int64_t start,
                     int64_t count) {
    const int64_t chunk = delta->chunk, d_state = padded(delta->d_state), width = padded(delta->head_dim);
    for (int64_t i = 0; i < chunk; i++) o->beta[i] = i < count ? *at(delta, task, delta->beta, head, start + i) : 0;
    if (width != delta->head_dim) memset(o->error, 0, chunk * width * sizeof(float));
    pack(delta, task, delta->v, head, start, count, delta->head_dim, o->error, width);
    if (delta->per_channel) {
        find_decays_by_channel(delta, task, head, start, count, o);
        find_weights_by_channel(delta, m, o);
    } else {
        find_decays(delta, task, head, start, count, o);
        find_weights(delta, m, o);
    }
    for (int64_t i = 0; i < chunk; i++)
        for (int64_t n = 0; n < d_state; n += LANES) {
            const int64_t entry = i * d_state + n;
            const vec k = load(m->k + entry);
            const vec into = delta->per_channel ? load(o->into + entry) : all(o->into[i]);
            const vec out = delta->per_channel ? load(o->out + entry) : all(o->out[i]);
            store(o->asks + entry, -into * k);
            store(o->reads + entry, into * load(m->q + entry));
            store(o->writes + entry, out * k);
        }
}

/* Rows i to i + TILE_ROWS of the system, from ``error``, which has v and what the state answers. */
INLINE void solve_rows(const int vectors, const Own *o, int64_t chunk, int64_t i, int64_t row, int64_t column) {
    float *error = o->error + i * row + column, *update = o->update + column;
    const Left corrects = {o->corrects + i * chunk, chunk, 1};
    Sums sum;
#pragma GCC unroll 8
    for (int r = 0; r < TILE_ROWS; r++)
#pragma GCC unroll 2
        for (int j = 0; j < vectors; j++) sum[r][j] = load(error + r * row + j * LANES);
    for (int64_t k = 0; k < i; k++) add_column(vectors, sum, 0, TILE_ROWS, corrects, update, row, k);
#pragma GCC unroll 8
    for (int d = 0; d < TILE_ROWS; d++)
#pragma GCC unroll 2
        for (int j = 0; j < vectors; j++) {
            const vec written = o->beta[i + d] * sum[d][j];
            store(error + d * row + j * LANES, sum[d][j]);
            store(update + (i + d) * row + j * LANES, written);
#pragma GCC unroll 8
            for (int r = d + 1; r < TILE_ROWS; r++) sum[r][j] += corrects.at[r * chunk + i + d] * written;
        }
}

/* The errors and updates of a chunk, given the state before it. */
static void solve(const Delta *delta, const Own *o, const float *state) {
    static const float one = 1;
    const int64_t chunk = delta->chunk, width = padded(delta->head_dim), d_state = padded(delta->d_state);
    const int64_t wide = LANES == 8 ? 1 : 2; /* as in product() */
    product(chunk, width, d_state, (Left){o->asks, d_state, 1}, state, width, &one, 0, o->error, width, WHOLE);
    for (int64_t i = 0; i < chunk; i += TILE_ROWS) {
        int64_t j = 0;
        for (; wide == 2 && j + 2 * LANES <= width; j += 2 * LANES) solve_rows(2, o, chunk, i, width, j);
        for (; j < width; j += LANES) solve_rows(1, o, chunk, i, width, j);
    }
}

/* The state after the chunk in the place of the one before it. */
static void move_on(const Delta *delta, const Own *o, float *state) {
    const int64_t chunk = delta->chunk, width = padded(delta->head_dim), d_state = padded(delta->d_state);
    product(d_state, width, chunk, (Left){o->writes, 1, d_state}, o->update, width, o->through, 1, state, width, WHOLE);
}

#endif
