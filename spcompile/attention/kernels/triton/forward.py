"""The forward kernel: one launch lets a tile of query rows see every key of one hop, starting from what it saw before.

A row's state (acc, m, l) stays in float32 from the first hop to the last: acc is the sum of weights * v and l, here
`mass`, that of the weights, both relative to 2^m, here `peak`. So a ring of n hops rounds as one kernel over all keys
does. The online softmax is that of FlashAttention-2 (arXiv 2307.08691).
"""

from __future__ import annotations

import triton
import triton.language as tl

from spcompile.attention.kernels.triton.scores import (
    LOG2E,
    capped,
    complete,
    dropout_factors,
    load_places,
    load_tile,
    store_tile,
)


@triton.jit
def _see(
    acc, peak, mass, q_tile, q_at, q_document, q_start, k, v, k_places, first, stop, batch, head, key_head, k_length,
    args,
    BLOCK_N: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, V_SIZE: tl.constexpr, V_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """The state after the tiles first .. stop - 1 of keys."""
    rows = tl.arange(0, q_at.shape[0])
    for tile in range(first, stop):
        start = tile * BLOCK_N
        k_tile = load_tile(k, batch, key_head, start, k_length, BLOCK_N, SIZE, WIDTH, PARTIAL)
        k_at, k_document = load_places(k_places, batch, start + tl.arange(0, BLOCK_N), k_length)
        products = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)
        scores, unit = complete(
            capped(products, args), batch, head, q_start, rows[:, None], q_at[:, None], k_at[None, :],
            q_document[:, None], k_document[None, :], args, PARTIAL,
        )  # fmt: skip
        next_peak = tl.maximum(peak, tl.max(scores, 1) * unit)
        finite = next_peak
        if PARTIAL or args.bias.added is not None or args.bias.kept is not None:
            finite = tl.where(next_peak == float("-inf"), 0.0, next_peak)
        weights = tl.exp2(scores * unit - finite[:, None])
        shrink = tl.exp2(peak - finite)
        mass = mass * shrink + tl.sum(weights, 1)
        if args.dropout.seed is not None:
            weights *= dropout_factors(args.dropout, batch, head, q_at[:, None], k_at[None, :])
        v_tile = load_tile(v, batch, key_head, start, k_length, BLOCK_N, V_SIZE, V_WIDTH, PARTIAL)
        acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision=PRECISION)
        peak = next_peak
    return acc, peak, mass


@triton.jit
def forward_kernel(
    q, k, v, out, lse, acc_state, peak_state, mass_state, sinks, q_places, k_places, segments, args, q_length, k_length,
    GROUP: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, V_SIZE: tl.constexpr, V_WIDTH: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of rows of one head; grid (tiles of rows, N, B).

    FIRST: there is no state yet; a sink is like a key that was seen, with a value of 0. LAST: out and lse are written
    instead of the state. GROUP: query heads per key head.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # under a causal mask the last rows have the most work
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    line = batch * segments.batch_step + tile
    full_count, partial_count = tl.load(segments.full_count + line), tl.load(segments.partial_count + line)
    if not FIRST and not LAST and full_count + partial_count == 0:
        return

    start = tile * BLOCK_M
    index = start + tl.arange(0, BLOCK_M)
    q_tile = load_tile(q, batch, head, start, q_length, BLOCK_M, SIZE, WIDTH, True)
    q_at, q_document = load_places(q_places, batch, index, q_length)
    acc = tl.zeros([BLOCK_M, V_WIDTH], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    if FIRST and sinks is not None:
        peak = tl.zeros([BLOCK_M], tl.float32) + tl.load(sinks + head).to(tl.float32) * LOG2E
        mass += 1.0

    table = line * segments.most * 2
    for segment in range(full_count):
        first = tl.load(segments.full + table + segment * 2)
        stop = tl.load(segments.full + table + segment * 2 + 1)
        acc, peak, mass = _see(
            acc, peak, mass, q_tile, q_at, q_document, start, k, v, k_places, first, stop, batch, head, head // GROUP,
            k_length, args, BLOCK_N, SIZE, WIDTH, V_SIZE, V_WIDTH, PRECISION, False,
        )  # fmt: skip
    for segment in range(partial_count):
        first = tl.load(segments.partial + table + segment * 2)
        stop = tl.load(segments.partial + table + segment * 2 + 1)
        acc, peak, mass = _see(
            acc, peak, mass, q_tile, q_at, q_document, start, k, v, k_places, first, stop, batch, head, head // GROUP,
            k_length, args, BLOCK_N, SIZE, WIDTH, V_SIZE, V_WIDTH, PRECISION, True,
        )  # fmt: skip

    row_state = (batch * tl.num_programs(1) + head) * q_length + index
    if not FIRST:  # here and not at the start, where the loops need the registers
        old_peak = tl.load(peak_state + row_state, mask=index < q_length, other=float("-inf"))
        old_mass = tl.load(mass_state + row_state, mask=index < q_length, other=0.0)
        old_acc = load_tile(acc_state, batch, head, start, q_length, BLOCK_M, V_SIZE, V_WIDTH, True)
        top = tl.maximum(peak, old_peak)
        finite = tl.where(top == float("-inf"), 0.0, top)
        shrink, old_shrink = tl.exp2(peak - finite), tl.exp2(old_peak - finite)
        acc = acc * shrink[:, None] + old_acc * old_shrink[:, None]
        peak, mass = top, mass * shrink + old_mass * old_shrink

    if LAST:
        total = tl.where(mass == 0, 1.0, mass)
        store_tile(out, acc / total[:, None], batch, head, start, q_length, BLOCK_M, V_SIZE, V_WIDTH)
        tl.store(
            lse + row_state, tl.where(mass == 0, float("-inf"), (peak + tl.log2(total)) / LOG2E), mask=index < q_length
        )
    else:
        store_tile(acc_state, acc, batch, head, start, q_length, BLOCK_M, V_SIZE, V_WIDTH)
        tl.store(peak_state + row_state, peak, mask=index < q_length)
        tl.store(mass_state + row_state, mass, mask=index < q_length)
