"""Writes at the true places of a mask, written out as a lookup and a `where`, which every axis can split.

As they stand, the gradient of `x[mask] = values` has a size that only data tells, and `masked_scatter` of whole rows,
as of pictures into text, reads the places of all rows at once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from spcompile.graph.splice import splice

aten = torch.ops.aten
_PUTS = (aten.index_put.default, aten._unsafe_index_put.default)
_REPEATS = (aten.expand.default, aten.expand_as.default)
_CONVERSIONS = (aten.to.device, aten.to.dtype, aten.to.dtype_layout, aten.to.other)


def write_out_bool_writes(gm: fx.GraphModule) -> None:
    """Replace every `index_put` whose one index is a mask of bools over leading dims, and scatters of whole rows."""
    for node in list(gm.graph.nodes):
        if node.target is aten.masked_scatter.default:
            _write_out_scatter(gm.graph, node)
        if node.target not in _PUTS:
            continue
        x, indices, values, *accumulate = node.args
        if len(indices) != 1 or not isinstance(indices[0], fx.Node) or indices[0].meta["val"].dtype is not torch.bool:
            continue
        written = splice(_written, (x, indices[0], values, bool(accumulate and accumulate[0])), like=node)
        node.replace_all_uses_with(written)
        gm.graph.erase_node(node)


def _write_out_scatter(graph: fx.Graph, node: fx.Node) -> None:
    """Where the mask repeats, or broadcasts, a bool for each element of a row, and the source holds whole rows."""
    x, mask, source = node.args
    assert isinstance(x, fx.Node)
    assert isinstance(source, fx.Node)
    marked = _without_conversions(mask)
    marked = marked.all_input_nodes[0] if marked.target in _REPEATS else marked
    shape, sizes = x.meta["val"].shape, marked.meta["val"].shape
    rows, width = source.meta["val"].numel(), shape[-1]
    is_of_rows = len(sizes) == len(shape) > 1 and sizes[-1] == 1 and sizes[:-1] == shape[:-1]
    if not is_of_rows or not isinstance(rows, int) or not isinstance(width, int) or rows % width or not rows:
        return
    node.replace_all_uses_with(splice(_with_rows_of, (x, marked, source), like=node))
    graph.erase_node(node)


def _without_conversions(mask: Any) -> fx.Node:
    """What a mask of bools was converted from, to where or what it is already."""
    while mask.target in _CONVERSIONS and mask.args[0].meta["val"].dtype is torch.bool:
        mask = mask.args[0]
    found: fx.Node = mask
    return found


def _with_rows_of(x: Tensor, marked: Tensor, source: Tensor) -> Tensor:
    """The rows of x [*M, D] where marked [*M, 1] is true become those of source, in their order; others of it are left.

    Where too few are there the plain model fails when it runs; here floating results are NaN.
    """
    rows = source.reshape(-1, x.shape[-1])
    number = marked.flatten().cumsum(0)
    found = rows.index_select(0, (number - 1).clamp(0, rows.shape[0] - 1))
    if x.is_floating_point():
        found = torch.where(number[-1] <= rows.shape[0], found, torch.nan)
    return torch.where(marked, found.reshape(x.shape), x)


def _written(x: Tensor, mask: Tensor, values: Tensor, accumulate: bool) -> Tensor:
    """X [*M, *R] with values [n, *R], or what broadcasts to it, at the n true places of mask [*M], in their order.

    Where n is another number than the values' rows the plain model fails when it runs; here floating results are NaN.
    """
    rest = x.shape[mask.ndim :]
    marked = mask.reshape(*mask.shape, *(1,) * len(rest))
    if values.ndim == len(rest) + 1 and values.shape[0] != 1:
        number = mask.flatten().cumsum(0)
        rows = values.expand(values.shape[0], *rest).index_select(0, (number - 1).clamp(0, values.shape[0] - 1))
        if x.is_floating_point():
            rows = torch.where(number[-1] == values.shape[0], rows, torch.nan)
        values = rows.reshape(x.shape)
    return torch.where(marked, x + values if accumulate else values, x)
