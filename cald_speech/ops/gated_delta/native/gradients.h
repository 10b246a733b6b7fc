/* The gated delta rule's backward pass over one chunk of one head.

Every product of the forward pass has two of its shape here, and the system is solved once more, transposed, from the last
frame to the first. The log decay g_t of frame t takes part in whatever crosses into t from before: pairs (i, j) on either
side of that boundary within the chunk, what is asked and read of the state that came in, and what goes out into the next
chunk. These are summed as they are: a difference of running sums would cancel. */

#ifndef CALD_GATED_DELTA_GRADIENTS_H
#define CALD_GATED_DELTA_GRADIENTS_H

#include "gated_delta.h"

typedef struct { /* of one chunk, for all heads of the task: gradients of its maps */
    float *dq, *dk;   /* (chunk, d_state) */
    float *dqk, *dkk; /* (chunk, chunk), up to the diagonal; not where every channel has its decay */
} MapGradients;

typedef struct {
    Maps *maps; /* for each chunk of a block */
    MapGradients *sums;
    Own *own;
    float **states;                  /* before each chunk, transposed: (head_dim, d_state) */
    float *state;                    /* as it moves on, (d_state, head_dim) */
    float *dy, *derror;              /* (chunk, head_dim) */
    float *update_by_feature;        /* (head_dim, chunk) */
    float *danswers, *dcorrects;     /* (chunk, chunk) */
    float *dasks, *dreads, *dwrites; /* (chunk, d_state) */
    float *dstates;                  /* of every head of the task, (d_state, head_dim) */
    float *dstate_by_feature;        /* one of them, transposed */
    float *dbeta;                    /* (chunk) */
    float *dg;                       /* (chunk), or (chunk, d_state) */
    float *went_through;             /* (d_state): what every g of the chunk has by way of the state that goes through it */
    float *passed;                   /* (chunk): see sum_pairs() */
    float *faded, *returned;         /* (chunk, chunk, LANES) and (chunk, LANES): see sum_pairs_by_channel() */
} Scratch;

static Scratch take_scratch(const Delta *delta, Arena *arena) {
    const int64_t chunk = delta->chunk, width = padded(delta->head_dim), d_state = padded(delta->d_state);
    const int64_t most_heads = delta->heads / delta->groups / delta->parts + 1;
    float *faded = delta->per_channel ? take_floats(arena, d_state * chunk) : NULL;
    Scratch s = {0};
    s.maps = take(arena, delta->block, sizeof(Maps));
    s.sums = take(arena, delta->block, sizeof(MapGradients));
    s.own = take(arena, delta->block, sizeof(Own));
    s.states = take(arena, delta->block, sizeof(float *));
    for (int64_t c = 0; c < delta->block; c++) {
        const Maps maps = take_maps(delta, arena);
        const Own own = take_own(delta, arena, faded);
        MapGradients sums = {take_floats(arena, chunk * d_state), take_floats(arena, chunk * d_state), NULL, NULL};
        if (!delta->per_channel) {
            sums.dqk = take_floats(arena, chunk * chunk);
            sums.dkk = take_floats(arena, chunk * chunk);
        }
        float *state = take_floats(arena, width * d_state);
        if (!arena->base) continue;
        s.maps[c] = maps;
        s.own[c] = own;
        s.sums[c] = sums;
        s.states[c] = state;
    }
    float **of_values[] = {&s.dy, &s.derror, &s.update_by_feature}, **of_pairs[] = {&s.danswers, &s.dcorrects};
    float **of_keys[] = {&s.dasks, &s.dreads, &s.dwrites}, **of_states[] = {&s.state, &s.dstate_by_feature};
    for (int i = 0; i < 3; i++) *of_values[i] = take_floats(arena, chunk * width);
    for (int i = 0; i < 2; i++) *of_pairs[i] = take_floats(arena, chunk * chunk);
    for (int i = 0; i < 3; i++) *of_keys[i] = take_floats(arena, chunk * d_state);
    for (int i = 0; i < 2; i++) *of_states[i] = take_floats(arena, d_state * width);
    s.dstates = take_floats(arena, most_heads * d_state * width);
    s.dbeta = take_floats(arena, chunk);
    s.dg = take_floats(arena, delta->per_channel ? chunk * d_state : chunk);
    s.went_through = take_floats(arena, d_state);
    s.passed = take_floats(arena, chunk);
    if (delta->per_channel) {
        s.faded = take_floats(arena, chunk * chunk * LANES);
        s.returned = take_floats(arena, chunk * LANES);
    }
    return s;
}

/* Rows i to i + TILE_ROWS of the transposed system, in place: from the gradients of the updates by other ways to those of
the errors, beta times the updates'. */
INLINE void solve_rows_back(const int vectors, const Scratch *s, const Own *o, int64_t chunk, int64_t i, int64_t row,
                            int64_t column) {
    float *derror = s->derror + column;
    const float *error = o->error + column;
    const Left corrects = {o->corrects + i, 1, chunk}; /* transposed */
    Sums sum;
#pragma GCC unroll 8
    for (int r = 0; r < TILE_ROWS; r++)
#pragma GCC unroll 2
        for (int j = 0; j < vectors; j++) sum[r][j] = load(derror + (i + r) * row + j * LANES);
    for (int64_t k = i + TILE_ROWS; k < chunk; k++) add_column(vectors, sum, 0, TILE_ROWS, corrects, derror, row, k);
#pragma GCC unroll 8
    for (int d = TILE_ROWS - 1; d >= 0; d--)
#pragma GCC unroll 2
        for (int j = 0; j < vectors; j++) {
            const int64_t entry = (i + d) * row + j * LANES;
            const vec of_error = o->beta[i + d] * sum[d][j];
            s->dbeta[i + d] += sum_of(sum[d][j] * load(error + entry));
            store(derror + entry, of_error);
#pragma GCC unroll 8
            for (int r = 0; r < d; r++) sum[r][j] += corrects.at[r + (i + d) * chunk] * of_error;
        }
}

static void solve_back(const Delta *delta, const Scratch *s, const Own *o) {
    const int64_t chunk = delta->chunk, width = padded(delta->head_dim);
    const int64_t wide = LANES == 8 ? 1 : 2; /* as in product() */
    memset(s->dbeta, 0, chunk * sizeof(float));
    for (int64_t i = chunk - TILE_ROWS; i >= 0; i -= TILE_ROWS) {
        int64_t j = 0;
        for (; wide == 2 && j + 2 * LANES <= width; j += 2 * LANES) solve_rows_back(2, s, o, chunk, i, width, j);
        for (; j < width; j += LANES) solve_rows_back(1, s, o, chunk, i, width, j);
    }
}

/* All that is elementwise in the pairs of frames i, j <= i, row by row from the last: adds to the gradients of q k^T and
k k^T, and puts into ``dg`` the sum over i >= t, j < t of the pairs' shares. */
static void sum_pairs(const Delta *delta, const Scratch *s, const MapGradients *sums, const Own *o) {
    const int64_t chunk = delta->chunk;
    memset(s->passed, 0, chunk * sizeof(float));
    for (int64_t i = chunk - 1; i >= 0; i--) {
        vec crossing = {0};
        for (int64_t j = 0; j < padded(i + 1); j += LANES) {
            const int64_t pair = i * chunk + j;
            ivec frame;
            for (int lane = 0; lane < LANES; lane++) frame[lane] = (int32_t)j + lane;
            const vec between = load(o->between + pair);
            const vec danswer = where(frame <= (int32_t)i, load(s->danswers + pair));
            const vec dcorrect = where(frame < (int32_t)i, load(s->dcorrects + pair));
            const vec share = danswer * load(o->answers + pair) + dcorrect * load(o->corrects + pair);
            store(sums->dqk + pair, load(sums->dqk + pair) + between * danswer);
            store(sums->dkk + pair, load(sums->dkk + pair) - between * dcorrect);
            const vec passed = load(s->passed + j) + where(frame < (int32_t)i, share);
            store(s->passed + j, passed);
            crossing += where(frame < (int32_t)i, passed);
        }
        s->dg[i] = sum_of(crossing);
    }
}

/* The rest of a frame's: what came in to frames from it on, what goes out of frames before it, what goes through. */
static void sum_frames(const Delta *delta, const Scratch *s, const MapGradients *sums, const Own *o) {
    const int64_t chunk = delta->chunk, d_state = padded(delta->d_state);
    double sum = 0, through = 0;
    for (int64_t n = 0; n < d_state; n++) through += s->went_through[n];
    for (int64_t i = chunk - 1; i >= 0; i--) {
        const int64_t row = i * d_state;
        sum += dot(o->asks + row, s->dasks + row, d_state) + dot(o->reads + row, s->dreads + row, d_state);
        s->dg[i] += sum + through;
    }
    sum = 0;
    for (int64_t i = 0; i < chunk; i++) {
        const int64_t row = i * d_state;
        s->dg[i] += sum;
        sum += dot(o->writes + row, s->dwrites + row, d_state);
        for (int64_t n = row; n < row + d_state; n += LANES) {
            store(sums->dq + n, load(sums->dq + n) + o->into[i] * load(s->dreads + n));
            store(sums->dk + n, load(sums->dk + n) - o->into[i] * load(s->dasks + n) + o->out[i] * load(s->dwrites + n));
        }
    }
}

/* Both where every channel has its decay, for channels n to n + LANES. First forwards: how every key j fades on the way to
every frame i, which gives the rows' gradients. Then backwards: what comes back to every key from the frames i behind it,
which fades the same way and gives the columns'; at each frame the two meet in what crosses its boundary. */
static void sum_pairs_by_channel(const Delta *delta, const Scratch *s, const Maps *m, const MapGradients *sums,
                                 const Own *o, int64_t n) {
    const int64_t chunk = delta->chunk, d_state = padded(delta->d_state);
    for (int64_t i = 0; i < chunk; i++) {
        const int64_t entry = i * d_state + n;
        const float *danswers = s->danswers + i * chunk, *dcorrects = s->dcorrects + i * chunk;
        float *faded = s->faded + i * chunk * LANES;
        const float *before = faded - chunk * LANES;
        const vec decay = load(o->decay + entry), k = load(m->k + entry);
        vec dq = load(o->into + entry) * load(s->dreads + entry) + danswers[i] * k;
        vec dk = load(o->out + entry) * load(s->dwrites + entry) - load(o->into + entry) * load(s->dasks + entry);
        for (int64_t j = 0; j < i; j++) {
            const vec key = decay * load(before + j * LANES);
            store(faded + j * LANES, key);
            dq += danswers[j] * key;
            dk -= dcorrects[j] * key;
        }
        store(faded + i * LANES, k);
        store(sums->dq + entry, load(sums->dq + entry) + dq);
        store(sums->dk + entry, load(sums->dk + entry) + dk);
    }
    memset(s->returned, 0, chunk * LANES * sizeof(float));
    vec came_in = load(s->went_through + n);
    for (int64_t i = chunk - 1; i >= 0; i--) {
        const int64_t entry = i * d_state + n;
        const float *danswers = s->danswers + i * chunk, *dcorrects = s->dcorrects + i * chunk;
        const float *faded = s->faded + i * chunk * LANES;
        const vec decay = load(o->decay + entry), k = load(m->k + entry), q = load(m->q + entry);
        vec crossing = {0};
        for (int64_t j = 0; j < i; j++) {
            const vec returned = load(s->returned + j * LANES) + danswers[j] * q - dcorrects[j] * k;
            crossing += returned * load(faded + j * LANES);
            store(s->returned + j * LANES, returned * decay);
        }
        store(sums->dk + entry, load(sums->dk + entry) + load(s->returned + i * LANES) + danswers[i] * q);
        came_in += load(o->asks + entry) * load(s->dasks + entry) + load(o->reads + entry) * load(s->dreads + entry);
        store(s->dg + entry, crossing + came_in);
    }
    vec goes_out = {0};
    for (int64_t i = 0; i < chunk; i++) {
        const int64_t entry = i * d_state + n;
        store(s->dg + entry, load(s->dg + entry) + goes_out);
        goes_out += load(o->writes + entry) * load(s->dwrites + entry);
    }
}

/* One chunk of one head: adds to the shared sums, leaves derror (which is dv), dbeta and dg, and moves the state's gradient
to before the chunk. ``state`` : before the chunk, transposed. */
static void differentiate(const Delta *delta, const Scratch *s, const Maps *m, const MapGradients *sums, const Own *o,
                          const float *state, float *dstate) {
    static const float one = 1;
    const int64_t chunk = delta->chunk, width = padded(delta->head_dim), d_state = padded(delta->d_state);
    const Left dy = {s->dy, width, 1}, derror = {s->derror, width, 1}, update = {o->update, width, 1};
    transpose(dstate, d_state, width, s->dstate_by_feature);
    transpose(o->update, chunk, width, s->update_by_feature);
    /* The updates': by way of the state after the chunk, of the outputs, and of the frames that are told of them. */
    product(chunk, width, d_state, (Left){o->writes, d_state, 1}, dstate, width, NULL, 0, s->derror, width, WHOLE);
    product(chunk, width, chunk, (Left){o->answers, 1, chunk}, s->dy, width, &one, 0, s->derror, width, LEFT_UPPER);
    solve_back(delta, s, o);
    /* By way of the states, before and after. */
    product(chunk, d_state, width, derror, state, d_state, NULL, 0, s->dasks, d_state, WHOLE);
    product(chunk, d_state, width, dy, state, d_state, NULL, 0, s->dreads, d_state, WHOLE);
    product(chunk, d_state, width, update, s->dstate_by_feature, d_state, NULL, 0, s->dwrites, d_state, WHOLE);
    for (int64_t n = 0; n < d_state; n += LANES) {
        vec sum = {0};
        for (int64_t p = 0; p < width; p++) sum += load(state + p * d_state + n) * load(s->dstate_by_feature + p * d_state + n);
        store(s->went_through + n, sum * load(o->through + n));
    }
    product(d_state, width, chunk, (Left){o->asks, 1, d_state}, s->derror, width, o->through, 1, dstate, width, WHOLE);
    product(d_state, width, chunk, (Left){o->reads, 1, d_state}, s->dy, width, &one, 0, dstate, width, WHOLE);
    /* Within the chunk. */
    product(chunk, chunk, width, dy, s->update_by_feature, chunk, NULL, 0, s->danswers, chunk, OUT_LOWER);
    product(chunk, chunk, width, derror, s->update_by_feature, chunk, NULL, 0, s->dcorrects, chunk, OUT_LOWER);
    if (delta->per_channel) {
        for (int64_t n = 0; n < d_state; n += LANES) sum_pairs_by_channel(delta, s, m, sums, o, n);
    } else {
        sum_pairs(delta, s, sums, o);
        sum_frames(delta, s, sums, o);
    }
}

#endif
