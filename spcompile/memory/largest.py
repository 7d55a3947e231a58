"""The largest values of the final graphs: what to look at first where memory is short."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sympy
import torch
import torch.fx as fx

from spcompile.diagnostics import SourceLine, source_of
from spcompile.graph.sizes import expression, numel_hint
from spcompile.graph.storage import root_of


@dataclass(frozen=True)
class LargeTensor:
    """One of the largest values of a final graph."""

    name: str
    phase: str
    shape: tuple[sympy.Expr, ...]
    numel: sympy.Expr
    dtype: torch.dtype
    source: SourceLine | None


def largest_tensors(graphs: Mapping[str, fx.GraphModule], count: int) -> list[LargeTensor]:
    """The `count` largest values of the final graphs, each storage once, by its largest view."""
    largest: dict[tuple[str, fx.Node], tuple[int, fx.Node]] = {}
    for phase, gm in graphs.items():
        for node in gm.graph.nodes:
            val = node.meta.get("val")
            if isinstance(val, torch.Tensor):
                key = (phase, root_of(node))
                numel = numel_hint(val)
                if key not in largest or numel > largest[key][0]:
                    largest[key] = (numel, node)
    rows = sorted(((numel, phase, node) for (phase, _), (numel, node) in largest.items()), key=lambda r: -r[0])
    return [_large(phase, node) for _, phase, node in rows[:count]]


def _large(phase: str, node: fx.Node) -> LargeTensor:
    val = node.meta["val"]
    shape = tuple(expression(size) for size in val.shape)
    return LargeTensor(node.name, phase, shape, sympy.Mul(*shape), val.dtype, source_of(node))
