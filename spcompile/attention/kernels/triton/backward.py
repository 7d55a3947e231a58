"""The backward kernels: dq by tiles of rows, dk and dv by tiles of keys. Each result has one writer, so no atomics.

Both compute the weights again from lse, as in FlashAttention-2 (arXiv 2307.08691); sums are float32. lse and delta come
over all keys of the row (see `Rows`), so that a block of keys gives its exact share.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spcompile.attention.kernels.triton.scores import (
    capped,
    complete,
    dropout_factors,
    load_places,
    load_tile,
    store_tile,
)


@triton.jit
def load_row(x, index, length, other, CUT: tl.constexpr):
    """Numbers of some rows; with CUT `other` past the end, which only tiles reach in which the mask has a say."""
    if CUT:
        return tl.load(x + index, mask=index < length, other=other)
    return tl.load(x + index)


@triton.jit
def weights_of(scores, unit, lse, args):
    """exp(score - lse); lse is in units of log 2, and +inf for rows without keys.

    Where a bias holds the lowest number, rounding alone would make more than 1 of it.
    """
    exponent = scores * unit - lse
    if args.bias.added is not None:
        exponent = tl.minimum(exponent, 0.0)
    return tl.exp2(exponent)


@triton.jit
def through_cap(grad_scores, products, args):
    """The gradient of scale * q k^T out of that of the scores; products are what `capped` returned."""
    if args.cap is not None:
        grad_scores *= 1.0 - products * products
    return grad_scores


@triton.jit
def _row_tiles(
    dq, q_tile, grad_tile, lse_tile, delta_tile, q_at, q_document, q_start, k, v, k_places, first, stop, batch, head,
    key_head, k_length, args,
    BLOCK_N: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, V_SIZE: tl.constexpr, V_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """The sum dq / scale after the tiles first .. stop - 1 of keys."""
    rows = tl.arange(0, q_at.shape[0])
    for tile in range(first, stop):
        start = tile * BLOCK_N
        k_tile = load_tile(k, batch, key_head, start, k_length, BLOCK_N, SIZE, WIDTH, PARTIAL)
        v_tile = load_tile(v, batch, key_head, start, k_length, BLOCK_N, V_SIZE, V_WIDTH, PARTIAL)
        k_at, k_document = load_places(k_places, batch, start + tl.arange(0, BLOCK_N), k_length)
        products = capped(tl.dot(q_tile, k_tile.T, input_precision=PRECISION), args)
        scores, unit = complete(
            products, batch, head, q_start, rows[:, None], q_at[:, None], k_at[None, :], q_document[:, None],
            k_document[None, :], args, PARTIAL,
        )  # fmt: skip
        weights = weights_of(scores, unit, lse_tile[:, None], args)
        grad_weights = tl.dot(grad_tile, v_tile.T, input_precision=PRECISION)
        if args.dropout.seed is not None:
            grad_weights *= dropout_factors(args.dropout, batch, head, q_at[:, None], k_at[None, :])
        grad_products = through_cap(weights * (grad_weights - delta_tile[:, None]), products, args)
        dq = tl.dot(grad_products.to(k_tile.dtype), k_tile, dq, input_precision=PRECISION)
    return dq


@triton.jit
def row_kernel(
    q, k, v, grad_out, lse, delta, dq_state, dq, q_places, k_places, segments, args, scale, q_length, k_length,
    GROUP: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, V_SIZE: tl.constexpr, V_WIDTH: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradient dq of one tile of rows of one head; grid (tiles of rows, N, B).

    FIRST: dq_state, float32, holds nothing yet. LAST: the sum goes to dq instead.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    line = batch * segments.batch_step + tile
    full_count, partial_count = tl.load(segments.full_count + line), tl.load(segments.partial_count + line)
    if not FIRST and not LAST and full_count + partial_count == 0:
        return

    start = tile * BLOCK_M
    index = start + tl.arange(0, BLOCK_M)
    first_row = (batch * tl.num_programs(1) + head) * q_length
    q_tile = load_tile(q, batch, head, start, q_length, BLOCK_M, SIZE, WIDTH, True)
    grad_tile = load_tile(grad_out, batch, head, start, q_length, BLOCK_M, V_SIZE, V_WIDTH, True)
    q_at, q_document = load_places(q_places, batch, index, q_length)
    lse_tile = load_row(lse + first_row, index, q_length, float("inf"), True)
    delta_tile = load_row(delta + first_row, index, q_length, 0.0, True)

    total = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    table = line * segments.most * 2
    for segment in range(full_count):
        first = tl.load(segments.full + table + segment * 2)
        stop = tl.load(segments.full + table + segment * 2 + 1)
        total = _row_tiles(
            total, q_tile, grad_tile, lse_tile, delta_tile, q_at, q_document, start, k, v, k_places, first, stop, batch,
            head, head // GROUP, k_length, args, BLOCK_N, SIZE, WIDTH, V_SIZE, V_WIDTH, PRECISION, False,
        )  # fmt: skip
    for segment in range(partial_count):
        first = tl.load(segments.partial + table + segment * 2)
        stop = tl.load(segments.partial + table + segment * 2 + 1)
        total = _row_tiles(
            total, q_tile, grad_tile, lse_tile, delta_tile, q_at, q_document, start, k, v, k_places, first, stop, batch,
            head, head // GROUP, k_length, args, BLOCK_N, SIZE, WIDTH, V_SIZE, V_WIDTH, PRECISION, True,
        )  # fmt: skip
    total *= scale
    if not FIRST:
        total += load_tile(dq_state, batch, head, start, q_length, BLOCK_M, SIZE, WIDTH, True)
    if LAST:
        store_tile(dq, total, batch, head, start, q_length, BLOCK_M, SIZE, WIDTH)
    else:
        store_tile(dq_state, total, batch, head, start, q_length, BLOCK_M, SIZE, WIDTH)


@triton.jit
def _key_tiles(
    dk, dv, k_tile, v_tile, k_at, k_document, q, grad_out, lse, delta, q_places, first, stop, batch, head, heads,
    q_length, args,
    BLOCK_M: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, V_SIZE: tl.constexpr, V_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """Dk / scale and dv after the tiles first .. stop - 1 of one head's rows; tiles here are keys by rows."""
    for tile in range(first, stop):
        start = tile * BLOCK_M
        rows = tl.arange(0, BLOCK_M)
        index = start + rows
        first_row = (batch * heads + head) * q_length
        q_tile = load_tile(q, batch, head, start, q_length, BLOCK_M, SIZE, WIDTH, PARTIAL)
        grad_tile = load_tile(grad_out, batch, head, start, q_length, BLOCK_M, V_SIZE, V_WIDTH, PARTIAL)
        q_at, q_document = load_places(q_places, batch, index, q_length)
        products = capped(tl.dot(k_tile, q_tile.T, input_precision=PRECISION), args)
        scores, unit = complete(
            products, batch, head, start, rows[None, :], q_at[None, :], k_at[:, None], q_document[None, :],
            k_document[:, None], args, PARTIAL,
        )  # fmt: skip
        lse_tile = load_row(lse + first_row, index, q_length, float("inf"), PARTIAL)
        weights = weights_of(scores, unit, lse_tile[None, :], args)
        grad_weights = tl.dot(v_tile, grad_tile.T, input_precision=PRECISION)
        used = weights
        if args.dropout.seed is not None:
            factors = dropout_factors(args.dropout, batch, head, q_at[None, :], k_at[:, None])
            used, grad_weights = weights * factors, grad_weights * factors
        dv = tl.dot(used.to(grad_tile.dtype), grad_tile, dv, input_precision=PRECISION)
        delta_tile = load_row(delta + first_row, index, q_length, 0.0, PARTIAL)
        grad_products = through_cap(weights * (grad_weights - delta_tile[None, :]), products, args)
        dk = tl.dot(grad_products.to(q_tile.dtype), q_tile, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def key_kernel(
    q, k, v, grad_out, lse, delta, dk, dv, q_places, k_places, segments, args, scale, q_length, k_length,
    GROUP: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, V_SIZE: tl.constexpr, V_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Dk and dv of one tile of keys of one key head, over all its query heads; grid (tiles of keys, G, B).

    The segments are those of `tile_kinds`'s transpose: tiles of rows for each tile of keys.
    """
    tile = tl.program_id(0)
    key_head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    line = batch * segments.batch_step + tile
    full_count, partial_count = tl.load(segments.full_count + line), tl.load(segments.partial_count + line)
    start = tile * BLOCK_N
    heads = tl.num_programs(1) * GROUP
    k_tile = load_tile(k, batch, key_head, start, k_length, BLOCK_N, SIZE, WIDTH, True)
    v_tile = load_tile(v, batch, key_head, start, k_length, BLOCK_N, V_SIZE, V_WIDTH, True)
    k_at, k_document = load_places(k_places, batch, start + tl.arange(0, BLOCK_N), k_length)

    dk_total = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    dv_total = tl.zeros([BLOCK_N, V_WIDTH], tl.float32)
    table = line * segments.most * 2
    for head in range(key_head * GROUP, key_head * GROUP + GROUP):
        for segment in range(full_count):
            first = tl.load(segments.full + table + segment * 2)
            stop = tl.load(segments.full + table + segment * 2 + 1)
            dk_total, dv_total = _key_tiles(
                dk_total, dv_total, k_tile, v_tile, k_at, k_document, q, grad_out, lse, delta, q_places, first, stop,
                batch, head, heads, q_length, args, BLOCK_M, SIZE, WIDTH, V_SIZE, V_WIDTH, PRECISION, False,
            )  # fmt: skip
        for segment in range(partial_count):
            first = tl.load(segments.partial + table + segment * 2)
            stop = tl.load(segments.partial + table + segment * 2 + 1)
            dk_total, dv_total = _key_tiles(
                dk_total, dv_total, k_tile, v_tile, k_at, k_document, q, grad_out, lse, delta, q_places, first, stop,
                batch, head, heads, q_length, args, BLOCK_M, SIZE, WIDTH, V_SIZE, V_WIDTH, PRECISION, True,
            )  # fmt: skip
    store_tile(dk, dk_total * scale, batch, key_head, start, k_length, BLOCK_N, SIZE, WIDTH)
    store_tile(dv, dv_total, batch, key_head, start, k_length, BLOCK_N, V_SIZE, V_WIDTH)
