/* Small matrix products in registers: 8 rows by one or two vectors at a time, operands in the first caches. */

#ifndef CALD_PRODUCT_H
#define CALD_PRODUCT_H

#include "vectors.h"

/* Which part of a product is there: all of it, or one triangle of chunk frames by chunk frames. What does not count
is left out and not multiplied by zero, which would not make 0 of a NaN. */
enum Part {
    WHOLE,
    LEFT_LOWER, /* left(i, k) counts for k <= i */
    LEFT_UPPER, /* left(i, k) counts for k >= i */
    OUT_LOWER   /* out(i, j) is wanted for j <= i */
};

typedef struct { /* element (i, k) at ``at[i * row + k * step]``: a matrix or its transpose */
    const float *at;
    int64_t row, step;
} Left;

typedef vec Sums[TILE_ROWS][2];

/* Column k of the left adds to rows [first, end) of a tile. */
INLINE void add_column(const int vectors, Sums sum, const int first, const int end, Left left, const float *right,
                       int64_t right_row, int64_t k) {
    vec row[2];
#pragma GCC unroll 2
    for (int j = 0; j < vectors; j++) row[j] = load(right + k * right_row + j * LANES);
#pragma GCC unroll 8
    for (int i = first; i < end; i++)
#pragma GCC unroll 2
        for (int j = 0; j < vectors; j++) sum[i][j] += left.at[i * left.row + k * left.step] * row[j];
}

/* Columns [first, end) of the left; of a triangle the diagonal's are the last TILE_ROWS of them, or the first. */
INLINE void tile(const int vectors, const enum Part part, Left left, const float *right, int64_t right_row,
                 int64_t first, int64_t end, const float *keep, int64_t keep_step, float *out, int64_t out_row) {
    Sums sum;
#pragma GCC unroll 8
    for (int i = 0; i < TILE_ROWS; i++)
#pragma GCC unroll 2
        for (int j = 0; j < vectors; j++) {
            sum[i][j] = (vec){0};
            if (keep) sum[i][j] = keep[i * keep_step] * load(out + i * out_row + j * LANES);
        }
    if (part == LEFT_UPPER) {
#pragma GCC unroll 8
        for (int d = 0; d < TILE_ROWS; d++) add_column(vectors, sum, 0, d + 1, left, right, right_row, first + d);
        first += TILE_ROWS;
    }
    const int64_t whole = part == LEFT_LOWER ? end - TILE_ROWS : end;
    for (int64_t k = first; k < whole; k++) add_column(vectors, sum, 0, TILE_ROWS, left, right, right_row, k);
    if (part == LEFT_LOWER)
#pragma GCC unroll 8
        for (int d = 0; d < TILE_ROWS; d++) add_column(vectors, sum, d, TILE_ROWS, left, right, right_row, whole + d);
#pragma GCC unroll 8
    for (int i = 0; i < TILE_ROWS; i++)
#pragma GCC unroll 2
        for (int j = 0; j < vectors; j++) store(out + i * out_row + j * LANES, sum[i][j]);
}

/* out (rows, columns) = keep_i out + left right, with ``inner`` terms each; ``keep`` NULL: out is not read.

rows a multiple of TILE_ROWS, columns of LANES, and a triangle has as many columns as rows; ``keep_step`` 0 gives all
rows the same factor, 1 each its own. Inline: each call has a loop made for its part. */
INLINE void product(int64_t rows, int64_t columns, int64_t inner, Left left, const float *right, int64_t right_row,
                    const float *keep, int64_t keep_step, float *out, int64_t out_row, const enum Part part) {
    /* Two vectors a row need 16 registers for the sums alone, which only AVX-512 and NEON have to spare. */
    const int64_t wide = LANES == 8 ? 1 : 2;
    for (int64_t i = 0; i < rows; i += TILE_ROWS) {
        const int64_t after = i + TILE_ROWS;
        const int64_t first = part == LEFT_UPPER ? i : 0;
        const int64_t end = part == LEFT_LOWER ? after : inner;
        const int64_t wanted = part == OUT_LOWER && padded(after) < columns ? padded(after) : columns;
        const Left of_rows = {left.at + i * left.row, left.row, left.step};
        const float *factor = keep ? keep + i * keep_step : NULL;
        float *to = out + i * out_row;
        int64_t j = 0;
        for (; wide == 2 && j + 2 * LANES <= wanted; j += 2 * LANES)
            tile(2, part, of_rows, right + j, right_row, first, end, factor, keep_step, to + j, out_row);
        for (; j < wanted; j += LANES)
            tile(1, part, of_rows, right + j, right_row, first, end, factor, keep_step, to + j, out_row);
    }
}

#endif
