"""Who sends how much: one row per kind of collective in the final graphs of one rank.

Counted on the graphs that run, after all passes, so that padding and fused messages are in it. `n` is the degree of
the axis. The formulas are those of ring algorithms, which send the least (Thakur et al. 2005, as in `Collective.sent`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
import torch.fx as fx
from torch.utils import _pytree as pytree

import spcompile.attention.op  # noqa: F401  (defines the ops)
from spcompile.attention.ring.ring import backward_bytes, forward_bytes, message_numbers
from spcompile.attention.ring.ring_call import RingCall, ring_of
from spcompile.attention.scores.attention_call import GradientCall
from spcompile.collectives import COLLECTIVES, call_arguments
from spcompile.collectives.pipelined_matmuls import PIPELINED, all_gather_matmul
from spcompile.diagnostics import SourceLine, source_of
from spcompile.graph.axes import axis_argument
from spcompile.graph.sizes import expression
from spcompile.graph.typed_call import value_of
from spcompile.machine.mesh import MeshShape

# What knows its rank and sends nothing, and what compares a few bytes once a step, as ranks do when they compile.
_COUNT_NOTHING = ("positions", "agree_on_hops")

# c10d op -> (name of the row, bytes sent from bytes handed in and degree).
_SENT: dict[str, tuple[str, Callable[[sympy.Expr, int], sympy.Expr]]] = {
    "all_gather_into_tensor": ("all_gather", lambda local, n: (n - 1) * local),
    "all_gather_into_tensor_coalesced": ("all_gather", lambda local, n: (n - 1) * local),
    "reduce_scatter_tensor": ("reduce_scatter", lambda full, n: full * (n - 1) / n),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter", lambda full, n: full * (n - 1) / n),
    "all_reduce": ("all_reduce", lambda full, n: 2 * full * (n - 1) / n),
    "all_reduce_coalesced": ("all_reduce", lambda full, n: 2 * full * (n - 1) / n),
    "all_to_all_single": ("all_to_all", lambda full, n: full * (n - 1) / n),
}


@dataclass(frozen=True)
class Row:
    """Collectives of one kind.

    bytes: sent by each rank in all `count` of them together. layer: module path, `*` for any layer number.
    at_most: documents decide at run time which of its hops are made; all are counted here.
    origin: "attention" (a ring), "activation", "activation again" (one that is not saved, recomputed in the backward),
    "parameter" (a sharded one, gathered for its use), "parameter gradient".
    """

    op: str
    axis: str
    phase: str
    count: int
    bytes: sympy.Expr
    layer: str
    source: SourceLine | None
    origin: str
    at_most: bool = False


@dataclass(frozen=True)
class Send:
    """One collective of a final graph, as the node that makes it. bytes: sent by each rank."""

    node: str
    op: str
    axis: str
    bytes: sympy.Expr
    layer: str
    source: SourceLine | None


def sends_of(gm: fx.GraphModule, mesh: MeshShape) -> list[Send]:
    """Every collective of a final graph, in order."""
    found = ((node, sent_by(node, mesh)) for node in gm.graph.nodes)
    return [Send(node.name, *sent, layer_of(node), source_of(node)) for node, sent in found if sent is not None]


def communication(phase: str, gm: fx.GraphModule, mesh: MeshShape, trained: Sequence[bool]) -> list[Row]:
    """The rows of a final graph, in order of first use.

    trained: for every input of the program, and so for every output of a backward graph, whether it is a parameter, or
        the gradient of one.
    """
    gradients = _gradients_of_parameters(gm.graph, trained) if phase == "backward" else set()
    gradient_path = depend_on_tangents(gm.graph)
    found: dict[tuple[Any, ...], tuple[int, sympy.Expr]] = {}
    for node in gm.graph.nodes:
        sent = sent_by(node, mesh)
        if sent is None:
            continue
        op, axis, amount = sent
        why = _sent_for(node, phase, trained, node in gradient_path)
        origin = "parameter gradient" if node in gradients else why
        key = (op, axis, phase, layer_of(node), source_of(node), origin, _asks_for_hops(node))
        count, total = found.get(key, (0, sympy.Integer(0)))
        found[key] = (count + 1, total + amount)
    return [
        Row(op, axis, phase, n, b, layer, src, why, at_most)
        for (op, axis, phase, layer, src, why, at_most), (n, b) in found.items()
    ]


def _sent_for(node: fx.Node, phase: str, trained: Sequence[bool], of_gradient: bool) -> str:
    if ring_of(node) is not None:
        return "attention"
    if _moves_a_parameter(node, trained):
        return "parameter"
    return "activation again" if phase == "backward" and not of_gradient else "activation"


def depend_on_tangents(graph: fx.Graph) -> set[fx.Node]:
    """Of a backward graph: gradients. All else is made from what the forward saved."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        is_tangent = node.op == "placeholder" and "tangents" in str(node.target)
        if is_tangent or any(read in found for read in node.all_input_nodes):
            found.add(node)
    return found


def _moves_a_parameter(node: fx.Node, trained: Sequence[bool]) -> bool:
    """Whether nothing is computed between parameters and a collective. A bucket lays them end to end."""
    pending = list(node.all_input_nodes)
    while pending:
        source = pending.pop()
        moves = len(source.all_input_nodes) == 1 or source.target is torch.ops.aten.cat.default
        if source.op == "call_function" and moves:
            pending += source.all_input_nodes
        elif not _is_trained(source, trained):
            return False
    return bool(node.all_input_nodes)


def _is_trained(node: fx.Node, trained: Sequence[bool]) -> bool:
    number = re.fullmatch(r"primals_(\d+)|arg(\d+)_1", node.name) if node.op == "placeholder" else None
    if number is None:
        return False
    place = int(number[1]) - 1 if number[1] else int(number[2])
    return place < len(trained) and trained[place]


def layer_of(node: fx.Node) -> str:
    """`module_path_of`, with `*` for every layer number."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", module_path_of(node))


def module_path_of(node: fx.Node) -> str:
    """The module that made a node, as `blocks.3.attention`; "" if unknown. Backward nodes name the forward's."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    path = re.sub(r"\['(\w+)'\]|\[(\d+)\]", r".\1\2", path).removeprefix("L.self").strip(".")
    return re.sub(r"(^|\.)(_modules|_orig_mod)(?=\.|$)", "", path).strip(".")


def sent_by(node: fx.Node, mesh: MeshShape) -> tuple[str, str, sympy.Expr] | None:
    """(name, axis, bytes that one rank sends) of a node that communicates, else None."""
    target: Any = node.target
    if axis_argument(target) is None:
        return None
    operand, named = call_arguments(target, node.args, node.kwargs)
    if (ring := ring_of(node)) is not None:
        return target._opname, ring.axis, _ring_bytes(ring)
    if target in PIPELINED:
        part = operand if target is all_gather_matmul else node
        return target._opname, named["axis"], (named["degree"] - 1) * _operand_bytes(part)
    if target in COLLECTIVES:
        values = fx.node.map_arg((operand, named), lambda n: n.meta["val"])
        amount = expression(COLLECTIVES[target].sent(values[0], **values[1]))
        return None if amount == 0 else (COLLECTIVES[target].name, named["axis"], amount)
    if target.namespace == "_c10d_functional":
        name, formula = _SENT[target._opname]
        axis = node.meta.get("axis") or named["group_name"]
        return name, axis, formula(_operand_bytes(operand), mesh.size(axis))
    assert target._opname in _COUNT_NOTHING, f"no formula for the bytes of {target}"
    return None


def _operand_bytes(operand: Any) -> sympy.Expr:
    vals = [n.meta["val"] for n in pytree.tree_leaves(operand)]
    return sum((expression(v.numel()) * v.element_size() for v in vals), sympy.Integer(0))


def _ring_bytes(ring: RingCall) -> sympy.Expr:
    """Bytes of a ring. How far keys travel is computed for the traced length."""
    k, v = value_of(ring.k), value_of(ring.v)
    B, G, T, H = (expression(size) for size in k.shape)
    numbers = message_numbers(B, G, T, H, expression(v.shape[3]))
    formula = backward_bytes if isinstance(ring, GradientCall) else forward_bytes
    return sympy.sympify(formula(numbers, ring.most_hops, k.element_size()))


def _asks_for_hops(node: fx.Node) -> bool:
    ring = ring_of(node)
    return ring is not None and ring.hops is not None


def _gradients_of_parameters(graph: fx.Graph, trained: Sequence[bool]) -> set[fx.Node]:
    """The collectives that complete gradients of parameters: behind them elements are only moved, or parts added."""
    output = next(n for n in reversed(graph.nodes) if n.op == "output")
    outputs = pytree.tree_leaves(output.args[0])
    flags = trained if len(trained) == len(outputs) else [False] * len(outputs)
    pending = [n for n, is_parameter in zip(outputs, flags, strict=True) if is_parameter and isinstance(n, fx.Node)]
    seen: set[fx.Node] = set()
    found: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if axis_argument(node.target) is not None:
            found.add(node)
        elif len(node.all_input_nodes) == 1 or node.target is torch.ops.aten.add.Tensor:
            pending += node.all_input_nodes
    return found
