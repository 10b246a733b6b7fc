/* The SSD's backward pass over one chunk of one head.

The gradients of x, B and C are products of the forward pass's shapes. The log decay dt_t A of frame t takes part in
whatever crosses into t from before: pairs (i, j) on either side of that boundary within the chunk, the state that came
in, and what goes out into the next chunk. These are summed as they are: the shorter formula, the running sum of
y dy - x dx, cancels, and loses four digits. */

#ifndef CALD_SSD_GRADIENTS_H
#define CALD_SSD_GRADIENTS_H

#include "ssd.h"

typedef struct { /* of one chunk, for all heads of the task */
    float *B, *C, *B_by_frame, *dB, *dC; /* (chunk, d_state) but for the transposed B */
    float *products, *dproducts;         /* C B^T and its gradient, (chunk, chunk) */
} Shared;

typedef struct { /* of one chunk, for one head */
    float *x;     /* (chunk, head_dim) */
    float *state; /* before the chunk, transposed: (head_dim, d_state) */
    Decays decays;
} Own;

typedef struct {
    Shared *shared; /* for each chunk of a block */
    Own *own;
    float *dy, *dx, *x_by_feature;        /* (chunk, head_dim), the last one transposed */
    float *weights, *pairs;               /* (chunk, chunk) */
    float *scaled, *dB, *dC;              /* (chunk, d_state): one head's */
    float *dstates;                       /* of every head of the task, (d_state, head_dim) */
    float *dstate_by_feature;             /* one of them, transposed */
    float *passed, *crossing, *direct;    /* (chunk): see sum_pairs() */
    double *dlog;                         /* (chunk): gradient of dt A */
} Scratch;

static Scratch take_scratch(const Scan *scan, Arena *arena) {
    const int64_t chunk = scan->chunk, width = padded(scan->head_dim), d_state = padded(scan->d_state);
    const int64_t most_heads = scan->heads / scan->groups / scan->parts + 1;
    Scratch s;
    s.shared = take(arena, scan->block, sizeof(Shared));
    s.own = take(arena, scan->block, sizeof(Own));
    for (int64_t c = 0; c < scan->block; c++) {
        Shared shared;
        float **of_state[] = {&shared.B, &shared.C, &shared.B_by_frame, &shared.dB, &shared.dC};
        for (int i = 0; i < 5; i++) *of_state[i] = take_floats(arena, chunk * d_state);
        shared.products = take_floats(arena, chunk * chunk);
        shared.dproducts = take_floats(arena, chunk * chunk);
        Own own = {take_floats(arena, chunk * width), take_floats(arena, width * d_state), take_decays(arena, chunk)};
        if (!arena->base) continue;
        s.shared[c] = shared;
        s.own[c] = own;
    }
    float **of_x[] = {&s.dy, &s.dx, &s.x_by_feature}, **of_pairs[] = {&s.weights, &s.pairs};
    float **of_state[] = {&s.scaled, &s.dB, &s.dC}, **of_frames[] = {&s.passed, &s.crossing, &s.direct};
    for (int i = 0; i < 3; i++) *of_x[i] = take_floats(arena, chunk * width);
    for (int i = 0; i < 2; i++) *of_pairs[i] = take_floats(arena, chunk * chunk);
    for (int i = 0; i < 3; i++) *of_state[i] = take_floats(arena, chunk * d_state);
    for (int i = 0; i < 3; i++) *of_frames[i] = take_floats(arena, chunk);
    s.dlog = take(arena, chunk, sizeof(double));
    s.dstates = take_floats(arena, most_heads * d_state * width);
    s.dstate_by_feature = take_floats(arena, width * d_state);
    return s;
}

/* All that is elementwise in the pairs of frames i, j <= i, row by row from the last.

From ``pairs``, dy_i x_j: adds to the gradient of C_i B_j, and puts the weights C_i B_j decay_ij dt_j in their place,
``direct_j`` sum over i of what dt_j weighs, and ``crossing_t`` the sum over i >= t, j < t of the pairs' shares. */
static void sum_pairs(const Scan *scan, const Scratch *s, const Shared *shared, const Own *own) {
    const int64_t chunk = scan->chunk;
    memset(s->passed, 0, chunk * sizeof(float));
    memset(s->direct, 0, chunk * sizeof(float));
    for (int64_t i = chunk - 1; i >= 0; i--) {
        vec crossing = {0};
        for (int64_t j = 0; j < padded(i + 1); j += LANES) {
            ivec frame;
            for (int lane = 0; lane < LANES; lane++) frame[lane] = (int32_t)j + lane;
            const vec decay = decay_between(&own->decays, i, j), dt = load(own->decays.dt + j);
            const vec product_ij = load(shared->products + i * chunk + j);
            const vec share = decay * load(s->pairs + i * chunk + j);
            float *dproduct = shared->dproducts + i * chunk + j;
            store(dproduct, load(dproduct) + share * dt);
            store(s->weights + i * chunk + j, product_ij * decay * dt);
            store(s->direct + j, load(s->direct + j) + share * product_ij);
            const vec passed = load(s->passed + j) + share * product_ij * dt;
            store(s->passed + j, passed);
            crossing += where(frame < (int32_t)i, passed);
        }
        s->crossing[i] = sum_of(crossing);
    }
}

/* One chunk of one head: adds to the shared sums, leaves dx, and moves the state's gradient to before the chunk. */
static void differentiate(const Scan *scan, const Scratch *s, const Shared *shared, const Own *own, float *dstate) {
    const int64_t chunk = scan->chunk, width = padded(scan->head_dim), d_state = padded(scan->d_state);
    const Decays *d = &own->decays;
    /* By way of the states: of what went out, then of what came in. */
    transpose(dstate, d_state, width, s->dstate_by_feature);
    product(chunk, d_state, width, (Left){own->x, width, 1}, s->dstate_by_feature, d_state, NULL, 0, s->dB, d_state, WHOLE);
    product(chunk, width, d_state, (Left){shared->B, d_state, 1}, dstate, width, NULL, 0, s->dx, width, WHOLE);
    product(chunk, d_state, width, (Left){s->dy, width, 1}, own->state, d_state, NULL, 0, s->dC, d_state, WHOLE);
    const float through = *d->through * dot(own->state, s->dstate_by_feature, width * d_state);
    scale_rows(shared->C, d->into, chunk, d_state, s->scaled);
    product(d_state, width, chunk, (Left){s->scaled, 1, d_state}, s->dy, width, d->through, 0, dstate, width, WHOLE);
    /* Within the chunk. */
    transpose(own->x, chunk, width, s->x_by_feature);
    product(chunk, chunk, width, (Left){s->dy, width, 1}, s->x_by_feature, chunk, NULL, 0, s->pairs, chunk, OUT_LOWER);
    sum_pairs(scan, s, shared, own);
    product(chunk, width, chunk, (Left){s->weights, 1, chunk}, s->dy, width, d->out_dt, 1, s->dx, width, LEFT_UPPER);
    /* A frame's log decay: pairs across it, what came in to frames from it on, what goes out of frames before it. */
    double sum = 0;
    for (int64_t i = chunk - 1; i >= 0; i--) {
        sum += d->into[i] * dot(shared->C + i * d_state, s->dC + i * d_state, d_state);
        s->dlog[i] = sum + s->crossing[i] + through;
    }
    sum = 0;
    for (int64_t i = 0; i < chunk; i++) {
        const float goes_out = dot(shared->B + i * d_state, s->dB + i * d_state, d_state);
        s->dlog[i] += sum;
        s->direct[i] += d->out[i] * goes_out;
        sum += d->out_dt[i] * goes_out;
    }
    for (int64_t i = 0; i < chunk; i++)
        for (int64_t j = i * d_state; j < (i + 1) * d_state; j += LANES) {
            store(shared->dB + j, load(shared->dB + j) + d->out_dt[i] * load(s->dB + j));
            store(shared->dC + j, load(shared->dC + j) + d->into[i] * load(s->dC + j));
        }
}

#endif
