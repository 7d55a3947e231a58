"""How the heads of a query, key or value tensor are laid out: repeated, or folded into the batch.

Read from the graph by following one symbolic element through the ops that only move elements.
B batch, N query heads, G key heads, T positions, H head size.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
import torch.fx as fx

from spcompile.recognition.masks.index_maps import IndexSpace, Indices, sizes_of, step
from spcompile.recognition.masks.values import Int, Unreadable

aten = torch.ops.aten
CASTS = (
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
)


def before_repeat(node: fx.Node, repeats_allowed: bool = True) -> fx.Node:
    """The [B, G, T, H] tensor that `node` [B, N, T, H] repeats: head n of `node` is its head n // (N / G).

    `node` itself if its heads are not repeated, or in another order. Where `node` only re-lays another tensor and holds
    the same elements at the same indices, that tensor (the only case where repeats are not allowed).
    """
    B, N, T, H = sizes_of(node)
    space = IndexSpace()
    b, n, t, h = (space.add(name, size) for name, size in zip("bnth", (B, N, T, H), strict=True))
    same = node
    for source, indices in _origins(node, (b, n, t, h), space):
        sizes = sizes_of(source)
        if len(sizes) != 4 or (sizes[0], sizes[2], sizes[3]) != (B, T, H) or not (sizes[1].is_Integer and N.is_Integer):
            continue
        repeats, remainder = divmod(int(N), int(sizes[1]))
        if remainder == 0 and indices == (b, space.div(n, repeats), t, h):
            if repeats > 1 and repeats_allowed:
                return source
            same = source if repeats == 1 else same
    return same


def heads_in_batch(node: fx.Node) -> int:
    """N of a [B * N, S, H] tensor that was folded from a [B, N, S, H] one; 1 where it was not."""
    X, S, H = sizes_of(node)
    space = IndexSpace()
    x, s, h = (space.add(name, size) for name, size in zip("xsh", (X, S, H), strict=True))
    for source, indices in _origins(node, (x, s, h), space):
        sizes = sizes_of(source)
        if len(sizes) == 4 and sizes[2:] == (S, H) and sizes[1].is_Integer:
            heads = int(sizes[1])
            if indices == (space.div(x, heads), space.mod(x, heads), s, h):
                return heads
    return 1


def by_head(node: fx.Node, heads: Int) -> fx.Node | None:
    """The tensor with one number for each head, all other dims 1, that `node` [B, N, S, 1] repeats; None if none."""
    sizes = sizes_of(node)
    if len(sizes) != 4 or sizes[1] != heads:
        return None
    space = IndexSpace()
    indices = tuple(space.add(name, size) for name, size in zip("bnsk", sizes, strict=True))
    n = indices[1]
    for source, place in ((node, indices), *_origins(node, indices, space, through=CASTS)):
        used = [index for index, size in zip(place, sizes_of(source), strict=True) if size != 1]
        if used == [n]:
            return source
    return None


def _origins(
    node: fx.Node, indices: Indices, space: IndexSpace, through: Collection[Any] = ()
) -> Iterator[tuple[fx.Node, Indices]]:
    """The tensors whose elements `node` only moves, nearest first, each with the place of its element.

    through: elementwise calls that are passed as well.
    """
    while True:
        try:
            if node.target in through:
                source: Any = node.args[0]
                moved: tuple[fx.Node, Indices] | None = (source, indices)
            else:
                moved = step(node, indices, space)
        except Unreadable:
            return
        if moved is None:
            return
        node, indices = moved
        yield node, indices
