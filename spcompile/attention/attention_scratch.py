"""Bytes that the attention ops hold while they run, besides operands and results.

Two families of kernels differ. The *fused* ones (Triton) write results where they belong, and carry a state between the
hops of a ring. The *blocks* (CPUs, and what Triton does not do) give each block of scores results of its own, which are
added to a state. Of what a kernel holds inside, which does not grow with the sequence, only a tile on one CPU core is
counted. What data decides, as which documents meet, counts as if all did. All ranks have the same figures: the most
that any of them holds.

B batch, N query heads, G key heads, S query rows, T keys, H head size of q and k, V of v.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import sympy
import torch.fx as fx

from spcompile.attention.kernels.naive import accumulation_dtype
from spcompile.attention.ring.ring_call import RingCall, attention_of
from spcompile.attention.scores.attention_call import Attention, AttentionCall, GradientCall
from spcompile.attention.scores.mask import AttentionMask
from spcompile.graph.sizes import Size, expression
from spcompile.graph.typed_call import value_of


def attention_scratch(node: fx.Node, fused: bool, of: Callable[[Size], Size] = expression) -> sympy.Expr:
    """Of a node; 0 for any op but attention, forward and backward.

    fused: whether Triton's kernels run where they can. of: what a size counts as; `hint` for a number.
    """
    call = attention_of(node)
    if call is None:
        return sympy.Integer(0)
    stops = call.most_hops + 1 if isinstance(call, RingCall) else 1
    sizes = _Sizes.of(call, of)
    fused = fused and sizes.wide == 4
    if isinstance(call, GradientCall):
        return _fused_backward(sizes, stops) if fused else _blocks_backward(sizes, call, stops)
    return _fused_forward(sizes, stops) if fused else _blocks_forward(sizes, call, stops)


# Rows, by the least rows of a call, and keys of a tile of PyTorch's kernel (torch 2.13: FlashAttentionKernel.cpp).
_TILE_ROWS, _TILE_KEYS = ((768, 256), (192, 64), (0, 32)), 512


@dataclass(frozen=True)
class _Sizes:
    """Numbers in q, in the output, in keys and values together, in rows, in one tile of scores, and in its results.

    narrow, wide: bytes of a number, and of one in sums.
    """

    q: sympy.Expr
    out: sympy.Expr
    kv: sympy.Expr
    rows: sympy.Expr
    tile: int
    tile_results: int
    narrow: int
    wide: int

    @classmethod
    def of(cls, call: Attention, of: Callable[[Size], Size]) -> _Sizes:
        B, N, G, S, T, H, V = map(of, call.sizes)
        dtype = value_of(call.q).dtype
        rows = B * N * S
        known = call.sizes.hints()
        tile_rows = next(min(size, known.q_rows) for least, size in _TILE_ROWS if known.q_rows >= least)
        tile, results = tile_rows * min(_TILE_KEYS, known.k_rows), tile_rows * (2 + known.v_size)
        wide = accumulation_dtype(dtype).itemsize
        return cls(rows * H, rows * V, B * G * T * (H + V), rows, tile, results, dtype.itemsize, wide)

    @property
    def casts(self) -> int:
        """1 where sums are wider than operands, else 0: a factor, which sympy does not take a bool for."""
        return int(self.wide != self.narrow)

    @property
    def messages(self) -> sympy.Expr:
        """Keys and values that a hop works on, and those that arrive meanwhile."""
        return 2 * self.kv * self.narrow

    @property
    def results(self) -> sympy.Expr:
        """Of the backward."""
        return (self.q + self.kv) * self.narrow


def _fused_forward(n: _Sizes, stops: int) -> sympy.Expr:
    """Between hops the sums, and each row's peak and mass."""
    return sympy.Integer(0) if stops == 1 else n.messages + (n.out + 2 * n.rows) * n.wide


def _fused_backward(n: _Sizes, stops: int) -> sympy.Expr:
    """Two numbers a row, lse and delta.

    In a ring also the sums of dq, those of dk and dv of a hop, the same as a message, one sent and one received.
    """
    if stops == 1:
        return 2 * n.rows * n.wide
    first = n.messages + 2 * n.kv * n.wide
    later = (n.messages if stops > 2 else n.messages / 2) + 4 * n.kv * n.wide
    # The gradients of keys and values get their own memory behind the last hop.
    return (2 * n.rows + n.q) * n.wide + sympy.Max(first, later) - n.kv * n.narrow


def _blocks_forward(n: _Sizes, call: Attention, stops: int) -> sympy.Expr:
    """The sums, and a block's result beside them; of one block only what its tiles were put together in."""
    tile = sympy.Integer((n.tile + n.tile_results) * n.wide)
    if stops == 1 and _is_one_block(call):
        return tile if _is_direct(call) else sympy.Max(tile, n.out * n.narrow)
    state = (n.out + n.rows) * n.wide
    block = state + (n.q + n.kv) * n.wide * n.casts + tile
    messages = n.messages if stops > 1 else sympy.Integer(0)
    at_the_end = state + n.out * n.narrow * n.casts
    return sympy.Max(state + block + messages - n.out * n.narrow - n.rows * n.wide, at_the_end)


def _blocks_backward(n: _Sizes, call: Attention, stops: int) -> sympy.Expr:
    """The sums of dq; a hop's of dk and dv, a block's result beside them, and in a ring those sent and received."""
    operands = (n.q + n.kv + 2 * n.out) * n.wide
    inside = n.rows * n.wide + 2 * n.tile * n.wide  # and the gradient of a tile beside it
    if stops == 1 and _is_one_block(call):
        if _is_direct(call):
            return sympy.Max(inside, n.results)  # what the kernel leaves in another order of memory is copied
        sums, of_tile = (n.q + n.kv) * n.wide * n.casts, n.kv * n.wide
        return sums + of_tile + inside
    sums, block = (n.q + n.kv) * n.wide, (n.q + n.kv) * n.wide + inside + operands * n.casts
    if stops == 1:
        return sums + block - n.results * n.casts
    # Behind the first hop a block of a zigzag order has half of the rows or half of the keys.
    halves = isinstance(call, RingCall) and call.order == "zigzag"
    half = sympy.Min(n.q, n.kv) + sympy.Min(n.q + 2 * n.out, n.kv) * n.casts
    smaller = half * n.wide / 2 if halves else sympy.Integer(0)
    later = (n.messages if stops > 2 else n.messages / 2) + 2 * n.kv * n.wide - smaller
    return sums + block + sympy.Max(n.messages, later) - n.results


def _is_one_block(call: Attention) -> bool:
    """Whether all rows see their keys in one call of a kernel."""
    in_order = not isinstance(call, AttentionCall) or (call.q_positions is None and call.k_positions is None)
    return in_order and call.sinks is None


def _is_direct(call: Attention) -> bool:
    """Whether PyTorch's own kernel gives the whole result, with no tiles to put together."""
    more = (call.bias, call.alibi_slopes, call.dropout_seed)
    plain = call.attention_mask in (AttentionMask(), AttentionMask(causal=True)) and not call.has_softcap
    return plain and all(x is None for x in more)
