"""What the Triton kernels share: from products q k^T to scores in units of log 2, mask, dropout, and their arguments.

All functions here work on one tile. Whoever calls them has brought places, rows and keys to shapes that broadcast to
the tile's, so one text serves tiles of rows by keys and tiles of keys by rows. A field of an argument tuple that is
None is known when the kernel is compiled, and costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import triton
import triton.language as tl

from spcompile.attention.scores import mask as masks

if TYPE_CHECKING:
    from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
WITHOUT_KEYS = tl.constexpr(masks.WITHOUT_KEYS)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # of float32


class PlaceArgs(NamedTuple):
    """`Places` with the steps from one batch entry to the next."""

    positions: Tensor
    position_step: int
    documents: Tensor | None
    document_step: int | None


class MaskArgs(NamedTuple):
    """The numbers of an `AttentionMask`; documents is 1 where they have a say."""

    documents: int | None
    causal_offset: int | None
    prefix: int | None
    window: int | None
    window_right: int | None
    chunk: int | None


class BiasArgs(NamedTuple):
    """A dense bias [B|1, N|1, S|1, Tg], columns dense: `added` or, as uint8, `kept` where it is not 0."""

    added: Tensor | None
    kept: Tensor | None
    batch_step: int | None
    head_step: int | None
    row_step: int | None


class DropoutArgs(NamedTuple):
    """`Dropout`: weights whose word is below the threshold fall, others grow by `factor`."""

    seed: Tensor | None
    batch_step: int | None
    threshold: int | None
    factor: float | None


class ScoreArgs(NamedTuple):
    """`Scores` as a kernel takes it.

    unit: scale * log2(e). cap: softcap * log2(e); to_cap: scale / softcap. slopes float32 [N], times log2(e).
    rounded_by, fill: as `AttentionMask` has them.
    """

    unit: float
    cap: float | None
    to_cap: float | None
    slopes: Tensor | None
    rounded_by: float | None
    fill: float | None
    mask: MaskArgs
    bias: BiasArgs
    dropout: DropoutArgs


class Operand(NamedTuple):
    """A tensor [B, N, S, H] with dense rows, as address and steps."""

    data: Tensor
    batch_step: int
    head_step: int
    row_step: int


class SegmentArgs(NamedTuple):
    """`Segments`, the lines from one batch entry to the next (0 where all have the same), and the most of a line."""

    full: Tensor
    full_count: Tensor
    partial: Tensor
    partial_count: Tensor
    batch_step: int
    most: int


@triton.jit
def load_tile(
    x, batch, head, start, length, ROWS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, CUT: tl.constexpr
):
    """Rows start .. start + ROWS - 1 of one head, [ROWS, WIDTH]; 0 past SIZE, and with CUT past the length.

    x: an `Operand`, or a tensor descriptor, which needs no CUT.
    """
    if isinstance(x, tl.tensor_descriptor):
        tile = x.load([tl.cast(batch, tl.int32), tl.cast(head, tl.int32), tl.cast(start, tl.int32), 0])
        tile = tile.reshape(ROWS, WIDTH)
    else:
        rows, columns = tl.arange(0, ROWS), tl.arange(0, WIDTH)
        first = x.data + batch * x.batch_step + head * x.head_step + tl.cast(start, tl.int64) * x.row_step
        at = first + rows[:, None] * x.row_step + columns[None, :]
        if CUT:
            tile = tl.load(at, mask=(start + rows < length)[:, None] & (columns < SIZE)[None, :], other=0.0)
        elif SIZE < WIDTH:
            tile = tl.load(at, mask=(columns < SIZE)[None, :], other=0.0)
        else:
            tile = tl.load(at)
    return tile


@triton.jit
def store_tile(x, tile, batch, head, start, length, ROWS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """The inverse of `load_tile`, in the dtype of x."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    first = x.data + batch * x.batch_step + head * x.head_step + tl.cast(start, tl.int64) * x.row_step
    at = first + rows[:, None] * x.row_step + columns[None, :]
    mask = (start + rows < length)[:, None] & (columns < SIZE)[None, :]
    tl.store(at, tile.to(x.data.dtype.element_ty), mask=mask)


@triton.jit
def load_places(places, batch, index, length):
    """Positions and documents of some rows or keys; -1 past the end. Without documents the second is the first."""
    positions = tl.load(places.positions + batch * places.position_step + index, mask=index < length, other=-1)
    documents = positions
    if places.documents is not None:
        documents = tl.load(places.documents + batch * places.document_step + index, mask=index < length, other=0)
    return positions, documents


@triton.jit
def tanh(x):
    """Hyperbolic tangent to float32 precision: a series near 0, where the quotient would lose digits."""
    square = x * x
    series = 1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835))))
    quotient = 1.0 - 2.0 / (tl.exp2(x * (2 * LOG2E)) + 1.0)
    return tl.where(tl.abs(x) < 0.3, x * series, quotient)


@triton.jit
def capped(products, args):
    """tanh(scale * q k^T / softcap), or the products themselves without a softcap."""
    if args.cap is not None:
        products = tanh(products * args.to_cap)
    return products


@triton.jit
def bias_places(bias, batch, head, start, rows, columns):
    """Where the bias's elements of a tile are, counted from its first one: 32 bits for each within the tile's rows."""
    first = batch * bias.batch_step + head * bias.head_step + tl.cast(start, tl.int64) * bias.row_step
    return first, rows * bias.row_step + columns


@triton.jit
def complete(products, batch, head, start, rows, q_at, k_at, q_document, k_document, args, PARTIAL: tl.constexpr):
    """Scores out of what `capped` made: (scores, unit), where scores * unit is in units of log 2.

    start, rows: the first row of q, and the tile's rows counted from there. q_at, k_at: positions. PARTIAL: the mask
    has a say.
    """
    bias = args.bias
    scores, unit = products, args.unit
    if args.cap is not None:
        scores, unit = scores * args.cap, 1.0
    elif args.slopes is not None or bias.added is not None or args.rounded_by is not None or args.fill is not None:
        scores, unit = scores * args.unit, 1.0
    if args.slopes is not None:
        scores += tl.load(args.slopes + head) * (k_at - q_at)
    seen = (q_at >= 0) & (k_at >= 0)
    if bias.added is not None:
        first, at = bias_places(bias, batch, head, start, rows, k_at)
        added = tl.load(bias.added + first + at, mask=seen, other=0.0).to(tl.float32)
        # A mask in the form of the lowest number must not become -inf, which would leave rows without any key.
        scores += tl.where(added == float("-inf"), added, tl.maximum(added * LOG2E, LOWEST))
    if args.rounded_by is not None:
        scores = ((scores / LOG2E + args.rounded_by) - args.rounded_by) * LOG2E
    if args.fill is not None and PARTIAL:
        rounded = ((scores / LOG2E + args.fill) - args.fill) * LOG2E
        scores = tl.where(q_document == WITHOUT_KEYS, rounded, scores)
    if bias.kept is not None:
        first, at = bias_places(bias, batch, head, start, rows, k_at)
        seen = tl.load(bias.kept + first + at, mask=seen, other=0) != 0
    if PARTIAL:
        permitted = allowed(q_at, k_at, q_document, k_document, args.mask)
        if args.fill is not None:
            permitted = permitted | (q_document == WITHOUT_KEYS)
        seen = seen & permitted
    if PARTIAL or bias.kept is not None:
        scores = tl.where(seen, scores, float("-inf"))
    return scores, unit


@triton.jit
def allowed(q_at, k_at, q_document, k_document, mask):
    """`AttentionMask.allowed` for positions that are not padding."""
    seen = (q_at >= 0) & (k_at >= 0)
    if mask.causal_offset is not None:
        before = k_at <= q_at + mask.causal_offset
        if mask.prefix is not None:
            before = before | (k_at < mask.prefix)
        seen = seen & before
    if mask.window is not None:
        seen = seen & (q_at - k_at < mask.window)
    if mask.window_right is not None:
        seen = seen & (k_at - q_at < mask.window_right)
    if mask.chunk is not None:
        seen = seen & (q_at // mask.chunk == k_at // mask.chunk)
    if mask.documents is not None:
        seen = seen & (q_document == k_document)
    return seen


@triton.jit
def dropout_factors(dropout, batch, head, q_at, k_at):
    """`Dropout.factors` of one tile: Philox2x32-7 of the counter (k, q)."""
    key = tl.load(dropout.seed + batch * dropout.batch_step + head).to(tl.uint32)
    low, high = tl.broadcast(k_at.to(tl.uint32), q_at.to(tl.uint32))
    for _ in tl.static_range(7):
        product = tl.mul(low, 0xD256D193, sanitize_overflow=False)
        low, high = tl.umulhi(low, 0xD256D193) ^ key ^ high, product
        key = tl.add(key, 0x9E3779B9, sanitize_overflow=False)
    return tl.where(low < dropout.threshold, 0.0, dropout.factor)
