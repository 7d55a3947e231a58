"""`x[mask] = values` with a mask of bools, written out: as it stands, its gradient has a size that only data tells."""

from __future__ import annotations

import torch
import torch.fx as fx
from torch import Tensor

from spcompile.graph.splice import splice

_PUTS = (torch.ops.aten.index_put.default, torch.ops.aten._unsafe_index_put.default)


def write_out_bool_writes(gm: fx.GraphModule) -> None:
    """Replace every `index_put` whose one index is a mask of bools over the leading dims."""
    for node in list(gm.graph.nodes):
        if node.target not in _PUTS:
            continue
        x, indices, values, *accumulate = node.args
        if len(indices) != 1 or not isinstance(indices[0], fx.Node) or indices[0].meta["val"].dtype is not torch.bool:
            continue
        written = splice(_written, (x, indices[0], values, bool(accumulate and accumulate[0])), like=node)
        node.replace_all_uses_with(written)
        gm.graph.erase_node(node)


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
