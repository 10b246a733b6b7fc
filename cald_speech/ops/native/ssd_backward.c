/* The SSD's backward pass: block by block against the scan, everything but each block's first state computed again.

The gradients of x, B and C are products of the forward pass's shapes. The log decay dt_t A of frame t takes part in
whatever crosses into t from before: pairs (i, j) on either side of that boundary within the chunk, the state that came
in, and what goes out into the next chunk. These are summed as they are: the shorter formula, the running sum of
y dy - x dx, cancels, and loses four digits. */

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

/* Bytes that one thread needs. */
int64_t cald_ssd_backward_scratch(const Scan *scan) {
    Arena counted = {0};
    take_scratch(scan, &counted);
    return counted.used;
}

static void open_chunk(const Scan *scan, const Task *task, const Shared *c, int64_t start, int64_t count) {
    const int64_t chunk = scan->chunk, d_state = padded(scan->d_state);
    pack(scan, task, scan->B, task->group, start, count, scan->d_state, c->B, d_state);
    pack(scan, task, scan->C, task->group, start, count, scan->d_state, c->C, d_state);
    transpose(c->B, chunk, d_state, c->B_by_frame);
    product(chunk, chunk, d_state, (Left){c->C, d_state, 1}, c->B_by_frame, chunk, NULL, 0, c->products, chunk, OUT_LOWER);
    float *sums[] = {c->dB, c->dC};
    for (int i = 0; i < 2; i++) memset(sums[i], 0, chunk * d_state * sizeof(float));
    memset(c->dproducts, 0, chunk * chunk * sizeof(float));
}

/* Once all heads have added to them: dC += dproducts B, dB += dproducts^T C, and out. */
static void close_chunk(const Scan *scan, const Task *task, const Shared *c, int64_t start, int64_t count) {
    static const float one = 1;
    const int64_t chunk = scan->chunk, d_state = padded(scan->d_state);
    product(chunk, d_state, chunk, (Left){c->dproducts, chunk, 1}, c->B, d_state, &one, 0, c->dC, d_state, LEFT_LOWER);
    product(chunk, d_state, chunk, (Left){c->dproducts, 1, chunk}, c->C, d_state, &one, 0, c->dB, d_state, LEFT_UPPER);
    Task part = *task;
    part.b += task->part * scan->batch;
    for (int64_t i = 0; i < count; i++) {
        memcpy(at(scan, &part, scan->dB, task->group, start + i), c->dB + i * d_state, scan->d_state * sizeof(float));
        memcpy(at(scan, &part, scan->dC, task->group, start + i), c->dC + i * d_state, scan->d_state * sizeof(float));
    }
}

/* x, the decays and the state before each chunk of a block, of one head; ``kept`` is the state before the first. */
static void find_states(const Scan *scan, const Task *task, const Scratch *s, const float *kept, int64_t head,
                        int64_t first, int64_t end) {
    const int64_t chunk = scan->chunk, width = padded(scan->head_dim), d_state = padded(scan->d_state);
    transpose(kept, d_state, width, s->own[0].state);
    for (int64_t c = first; c < end; c++) {
        const Own *own = s->own + c - first;
        const int64_t start = c * chunk, left = task->length - start, count = left < chunk ? left : chunk;
        pack(scan, task, scan->x, head, start, count, scan->head_dim, own->x, width);
        find_decays(scan, task, head, start, count, own->decays);
        if (c + 1 == end) break;
        scale_rows(s->shared[c - first].B, own->decays.out_dt, chunk, d_state, s->scaled);
        memcpy(own[1].state, own->state, width * d_state * sizeof(float));
        product(width, d_state, chunk, (Left){own->x, 1, width}, s->scaled, d_state, own->decays.through, 0, own[1].state,
                d_state, WHOLE);
    }
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

/* The gradients of one head's x, dt, A and D at the frames of a chunk. */
static void put_out(const Scan *scan, const Task *task, const Scratch *s, const Own *own, int64_t head, int64_t start,
                    int64_t count) {
    const int64_t width = padded(scan->head_dim);
    const double A = scan->A[head] * 0.6931471805599453; /* ln 2 */
    const int64_t ahead = ahead_of(scan, task, scan->dx);
    const float D = scan->D ? scan->D[head] : 0;
    double dA = 0, dD = 0;
    for (int64_t i = 0; i < count; i++) {
        float *restrict to = at(scan, task, scan->dx, head, start + i);
        expect(to + ahead, scan->head_dim);
        const float *restrict dx = s->dx + i * width, *restrict dy = s->dy + i * width;
        if (scan->add)
            for (int64_t p = 0; p < scan->head_dim; p++) to[p] += dx[p] + D * dy[p];
        else
            for (int64_t p = 0; p < scan->head_dim; p++) to[p] = dx[p] + D * dy[p];
        *at(scan, task, scan->ddt, head, start + i) = s->direct[i] + A * s->dlog[i];
        dA += own->decays.dt[i] * s->dlog[i];
        if (scan->D) dD += dot(dy, own->x + i * width, width);
    }
    scan->dA[task->b * scan->heads + head] += dA;
    scan->dD[task->b * scan->heads + head] += dD;
}

static void run_block(const Scan *scan, const Task *task, const Scratch *s, int64_t first, int64_t end) {
    const int64_t chunk = scan->chunk, width = padded(scan->head_dim), state_size = padded(scan->d_state) * width;
    for (int64_t c = first; c < end; c++) {
        const int64_t left = task->length - c * chunk;
        open_chunk(scan, task, s->shared + c - first, c * chunk, left < chunk ? left : chunk);
    }
    for (int64_t head = task->head; head < task->end; head++) {
        const int64_t block = (task->b * scan->heads + head) * scan->kept_blocks + first / scan->block;
        find_states(scan, task, s, scan->kept + block * state_size, head, first, end);
        for (int64_t c = end - 1; c >= first; c--) {
            const int64_t left = task->length - c * chunk, count = left < chunk ? left : chunk;
            const Own *own = s->own + c - first;
            pack(scan, task, scan->y, head, c * chunk, count, scan->head_dim, s->dy, width);
            differentiate(scan, s, s->shared + c - first, own, s->dstates + (head - task->head) * state_size);
            put_out(scan, task, s, own, head, c * chunk, count);
        }
    }
    for (int64_t c = first; c < end; c++) {
        const int64_t left = task->length - c * chunk;
        close_chunk(scan, task, s->shared + c - first, c * chunk, left < chunk ? left : chunk);
    }
}

static void run_task(const Scan *scan, Task task, const Scratch *s) {
    const int64_t width = padded(scan->head_dim), state_size = padded(scan->d_state) * width;
    const int64_t callers = scan->head_dim * scan->d_state, chunks = (task.length + scan->chunk - 1) / scan->chunk;
    float *callers_state = scan->state + (task.b * scan->heads + task.head) * callers;
    Task part = task;
    part.b += task.part * scan->batch;
    clear_padding(scan, &part, scan->dB, task.group, scan->d_state);
    clear_padding(scan, &part, scan->dC, task.group, scan->d_state);
    for (int64_t head = task.head; head < task.end; head++) {
        read_state(scan, callers_state + (head - task.head) * callers, s->dstates + (head - task.head) * state_size, width);
        if (!scan->add) clear_padding(scan, &task, scan->dx, head, scan->head_dim);
        clear_padding(scan, &task, scan->ddt, head, 1);
    }
    for (int64_t first = (chunks - 1) / scan->block * scan->block; first >= 0 && chunks; first -= scan->block)
        run_block(scan, &task, s, first, first + scan->block < chunks ? first + scan->block : chunks);
    for (int64_t head = task.head; head < task.end; head++)
        write_state(scan, s->dstates + (head - task.head) * state_size, width, callers_state + (head - task.head) * callers);
}

/* ``scratch``: cald_ssd_backward_scratch() bytes of zeros for each thread, at a cache line's beginning. */
void cald_ssd_backward(const Scan *scan, char *scratch) {
    const int64_t tasks = task_count(scan), bytes = cald_ssd_backward_scratch(scan);
#pragma omp parallel num_threads(scan->threads)
    {
        Arena arena = {scratch + thread_number() * bytes, 0};
        const Scratch s = take_scratch(scan, &arena);
#pragma omp for schedule(dynamic)
        for (int64_t number = 0; number < tasks; number++) run_task(scan, task_of(scan, number), &s);
    }
}
