"""Bytes that one rank holds: saved for backward, parameters, gradients, the peak, and which tensors are largest.

Read off the final graphs. A view counts as its base: that is the storage that stays alive.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
import torch.fx as fx
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from spcompile.diagnostics import SourceLine, source_of
from spcompile.graph.sizes import expression, hint, numel_hint
from spcompile.losses.scratch import scratch_bytes

_c10d = torch.ops._c10d_functional


@dataclass(frozen=True)
class LargeTensor:
    """One of the largest values of a final graph."""

    name: str
    phase: str
    shape: tuple[sympy.Expr, ...]
    numel: sympy.Expr
    dtype: torch.dtype
    source: SourceLine | None


@dataclass(frozen=True)
class Memory:
    """Bytes per rank.

    saved_activation_bytes: kept from forward to backward, inputs and parameters not counted.
    saved_activation_bytes_one_device: the same for the unsharded model, with the same attention ops and partitioner.
    peak_bytes: parameters, gradients and the most that is alive at once, if nothing is fused: an upper estimate.
    """

    saved_activation_bytes: sympy.Expr
    saved_activation_bytes_one_device: sympy.Expr
    parameter_bytes: sympy.Expr
    gradient_bytes: sympy.Expr
    peak_bytes: sympy.Expr


def memory_of(
    sharded: Mapping[str, fx.GraphModule], single: Mapping[str, fx.GraphModule], parameters: Iterable[torch.Tensor]
) -> Memory:
    """From the final graphs of one rank and of one device, by phase."""
    parameters = list(parameters)
    held = sum(map(_held, parameters))
    gradients = sum(_held(p) for p in parameters if p.requires_grad and "backward" in sharded)
    return Memory(
        saved_bytes(sharded),
        saved_bytes(single),
        sympy.Integer(held),
        sympy.Integer(gradients),
        held + max((_peak(gm.graph) for gm in sharded.values()), key=lambda peak: peak[0])[1],
    )


def _held(parameter: torch.Tensor) -> int:
    """Bytes of what this rank has of a parameter."""
    local: Any = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return local.numel() * local.element_size()


def saved_bytes(graphs: Mapping[str, fx.GraphModule]) -> sympy.Expr:
    """Bytes of the distinct storages that "forward" returns for "backward"."""
    if "forward" not in graphs or "backward" not in graphs:
        return sympy.Integer(0)
    kept = {root_of(node) for node in saved_values(graphs["forward"].graph, graphs["backward"].graph)}
    return sum((_result_bytes(node) for node in kept if node.op == "call_function"), sympy.Integer(0))


def saved_values(forward: fx.Graph, backward: fx.Graph) -> list[fx.Node]:
    """The outputs of `forward` that `backward` takes: its last ones, as many as backward has inputs but tangents."""
    taken = [n for n in backward.nodes if n.op == "placeholder" and "tangents" not in str(n.target)]
    outputs = _outputs(forward)
    return [n for n in outputs[len(outputs) - len(taken) :] if isinstance(n, fx.Node)]


def root_of(node: fx.Node) -> fx.Node:
    """The node that made the storage of a value."""
    while node.op == "call_function" and (base := _base(node)) is not None:
        node = base
    return node


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


def _base(node: fx.Node) -> fx.Node | None:
    """The operand whose storage the value of this call shares."""
    if node.target is operator.getitem:
        source = node.args[0]
        return source if isinstance(source, fx.Node) and _base(source) is not None else None
    if node.target in (torch.ops.aten._unsafe_view.default, _c10d.wait_tensor.default):
        return node.args[0]  # type: ignore[return-value]
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.returns or schema.returns[0].alias_info is None:
        return None
    for argument, value in zip(schema.arguments, node.args, strict=False):
        if argument.alias_info is not None and isinstance(value, fx.Node):
            return value
    return None


def _outputs(graph: fx.Graph) -> list[Any]:
    output = next(n for n in reversed(graph.nodes) if n.op == "output")
    return list(pytree.tree_leaves(output.args[0]))


def _result_bytes(node: fx.Node) -> sympy.Expr:
    vals = [v for v in pytree.tree_leaves(node.meta.get("val")) if isinstance(v, torch.Tensor)]
    return sum((expression(v.numel()) * v.element_size() for v in vals), sympy.Integer(0))


def _peak(graph: fx.Graph) -> tuple[int, sympy.Expr]:
    """(estimate, expression) of the most bytes alive at once, parameters aside, if values die with their last use."""
    order = {node: at for at, node in enumerate(graph.nodes)}
    dies = dict(order)
    for node, at in order.items():
        dies.update((root_of(operand), at) for operand in node.all_input_nodes)
    values = [n for n in order if n.op in ("placeholder", "call_function") and root_of(n) is n and not _is_parameter(n)]
    change = [0] * (len(order) + 1)
    for node in values:
        size = _size_hint(node)
        change[order[node]] += size
        change[dies[node] + 1] -= size
    inside = [int(scratch_bytes(node, hint)) for node in order]
    alive = [held + more for held, more in zip(itertools.accumulate(change[:-1]), inside, strict=True)]
    at = alive.index(max(alive))
    busy = next(node for node, place in order.items() if place == at)
    return alive[at], sum((_result_bytes(n) for n in values if order[n] <= at <= dies[n]), scratch_bytes(busy))


def _is_parameter(node: fx.Node) -> bool:
    """Inputs of the whole program, of which nearly all bytes are parameters: they are counted once, on their own."""
    return node.op == "placeholder" and "primals" in str(node.target)


def _size_hint(node: fx.Node) -> int:
    vals = [v for v in pytree.tree_leaves(node.meta.get("val")) if isinstance(v, torch.Tensor)]
    return sum(numel_hint(v) * v.element_size() for v in vals)
