"""Two smaller kernels of the backward: what it needs of rows, and the gradient of a dense bias."""

from __future__ import annotations

import triton
import triton.language as tl

from spcompile.attention.kernels.triton.backward import load_row, weights_of
from spcompile.attention.kernels.triton.scores import (
    LOG2E,
    bias_places,
    capped,
    complete,
    dropout_factors,
    load_places,
    load_tile,
)


@triton.jit
def row_numbers_kernel(
    out, grad_out, lse, grad_lse, delta, lse_in_log2, length,
    V_SIZE: tl.constexpr, V_WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """`RowTensors` of one tile of rows of one head; grid (tiles of rows, N, B).

    Here they are computed once for each row; in the loops of the other kernels it would be once for each score.
    """
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    start = tl.program_id(0) * BLOCK_M
    index = start + tl.arange(0, BLOCK_M)
    at = (batch * tl.num_programs(1) + head) * length + index
    out_tile = load_tile(out, batch, head, start, length, BLOCK_M, V_SIZE, V_WIDTH, True)
    grad_tile = load_tile(grad_out, batch, head, start, length, BLOCK_M, V_SIZE, V_WIDTH, True)
    value = tl.sum(out_tile.to(tl.float32) * grad_tile.to(tl.float32), 1)
    if grad_lse is not None:
        value -= tl.load(grad_lse + at, mask=index < length, other=0.0)
    tl.store(delta + at, value, mask=index < length)
    power = tl.load(lse + at, mask=index < length, other=0.0) * LOG2E
    tl.store(lse_in_log2 + at, tl.where(power == float("-inf"), float("inf"), power), mask=index < length)


@triton.jit
def _grad_scores(
    batch, head, key_head, q, k, v, grad_out, lse, delta, start, k_start, q_places, k_places, q_length, k_length, heads,
    args, SIZE: tl.constexpr, WIDTH: tl.constexpr, V_SIZE: tl.constexpr, V_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradient of one tile of one head's biased scores, [BLOCK_M, BLOCK_N]."""
    rows = tl.arange(0, BLOCK_M)
    index, k_index = start + rows, k_start + tl.arange(0, BLOCK_N)
    first_row = (batch * heads + head) * q_length
    q_at, q_document = load_places(q_places, batch, index, q_length)
    k_at, k_document = load_places(k_places, batch, k_index, k_length)
    q_tile = load_tile(q, batch, head, start, q_length, BLOCK_M, SIZE, WIDTH, True)
    k_tile = load_tile(k, batch, key_head, k_start, k_length, BLOCK_N, SIZE, WIDTH, True)
    products = capped(tl.dot(q_tile, k_tile.T, input_precision=PRECISION), args)
    scores, unit = complete(
        products, batch, head, start, rows[:, None], q_at[:, None], k_at[None, :], q_document[:, None],
        k_document[None, :], args, True,
    )  # fmt: skip
    lse_tile = load_row(lse + first_row, index, q_length, float("inf"), True)
    weights = weights_of(scores, unit, lse_tile[:, None], args)
    grad_tile = load_tile(grad_out, batch, head, start, q_length, BLOCK_M, V_SIZE, V_WIDTH, True)
    v_tile = load_tile(v, batch, key_head, k_start, k_length, BLOCK_N, V_SIZE, V_WIDTH, True)
    grad_weights = tl.dot(grad_tile, v_tile.T, input_precision=PRECISION)
    if args.dropout.seed is not None:
        grad_weights *= dropout_factors(args.dropout, batch, head, q_at[:, None], k_at[None, :])
    delta_tile = load_row(delta + first_row, index, q_length, 0.0, True)
    return weights * (grad_weights - delta_tile[:, None])


@triton.jit
def bias_kernel(
    q, k, v, grad_out, lse, delta, grad_bias, columns, q_places, k_places, kinds, kinds_step, args,
    q_length, k_length, heads, tiles_each, batches_each, heads_each,
    GROUP: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, V_SIZE: tl.constexpr, V_WIDTH: tl.constexpr,
    ONE_ROW: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds to one tile of the bias's gradient what all batch entries, heads and tiles of rows that share it give.

    grad_bias: `BiasArgs` of a float32 tensor, which has one row with ONE_ROW. columns int32 [T]: positions of the keys,
    valid or not. kinds int8 [B|1, tiles of rows, tiles of keys]: 0 where a tile is empty. tiles_each, batches_each,
    heads_each: how many share. Grid (tiles of rows / tiles_each, tiles of keys, B * N / (batches_each * heads_each)).
    """
    own_row_tile, key_tile, own = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    own_batch, own_head = own // (heads // heads_each), own % (heads // heads_each)
    k_start = key_tile * BLOCK_N
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for entry in range(own_batch * batches_each, own_batch * batches_each + batches_each):
        batch = tl.cast(entry, tl.int64)
        for row_tile in range(own_row_tile * tiles_each, own_row_tile * tiles_each + tiles_each):
            kind = tl.load(kinds + (batch * kinds_step + row_tile) * tl.num_programs(1) + key_tile)
            if kind != 0:
                for number in range(own_head * heads_each, own_head * heads_each + heads_each):
                    head = tl.cast(number, tl.int64)
                    total += _grad_scores(
                        batch, head, head // GROUP, q, k, v, grad_out, lse, delta, row_tile * BLOCK_M, k_start,
                        q_places, k_places, q_length, k_length, heads, args, SIZE, WIDTH, V_SIZE, V_WIDTH, PRECISION,
                        BLOCK_M, BLOCK_N,
                    )  # fmt: skip

    keys = k_start + tl.arange(0, BLOCK_N)
    k_at = tl.load(columns + keys, mask=keys < k_length, other=-1)
    rows = tl.arange(0, BLOCK_M)
    start = own_row_tile * BLOCK_M
    own_batch, own_head = tl.cast(own_batch, tl.int64), tl.cast(own_head, tl.int64)
    if ONE_ROW:
        first, at = bias_places(grad_bias, own_batch, own_head, 0, 0, k_at)
        total, mask = tl.sum(total, 0), k_at >= 0
    else:
        first, at = bias_places(grad_bias, own_batch, own_head, start, rows[:, None], k_at[None, :])
        mask = (start + rows < q_length)[:, None] & (k_at >= 0)[None, :]
    at = grad_bias.added + first + at
    tl.store(at, tl.load(at, mask=mask, other=0.0) + total, mask=mask)
