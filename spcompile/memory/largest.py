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
    """One of the largest values of the final graphs, and how many there are like it.

    name: of the first. phase: "forward", "backward" or both, as "forward, backward". count: values of this shape, dtype
        and line; what a phase hands to the next counts in each. op: of their nodes, as torch.fx names it.
    """

    name: str
    phase: str
    shape: tuple[sympy.Expr, ...]
    numel: sympy.Expr
    dtype: torch.dtype
    source: SourceLine | None
    count: int = 1
    op: str = "call_function"


def largest_tensors(graphs: Mapping[str, fx.GraphModule], count: int | None) -> list[LargeTensor]:
    """The `count` largest kinds of values of the final graphs, or all; each storage once, by its largest view."""
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
    kinds: dict[object, list[tuple[str, fx.Node]]] = {}
    for _, phase, node in rows:
        val, source = node.meta["val"], source_of(node)
        kind = (source.file, source.line) if source is not None else node.op
        kinds.setdefault((tuple(map(expression, val.shape)), val.dtype, kind), []).append((phase, node))
    return [_large(found) for found in list(kinds.values())[:count]]


def _large(alike: list[tuple[str, fx.Node]]) -> LargeTensor:
    node = alike[0][1]
    val = node.meta["val"]
    shape = tuple(expression(size) for size in val.shape)
    phases = ", ".join(dict.fromkeys(phase for phase, _ in alike))
    return LargeTensor(node.name, phases, shape, sympy.Mul(*shape), val.dtype, source_of(node), len(alike), node.op)
