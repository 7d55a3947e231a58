"""The states I, R, S, P of every value of a per-rank graph, per mesh axis, and the laws between them.

Shapes do not show whether a varying value is a part (S) or a term of a sum (P), so a value is S until a pass has
written P into meta["sharding"][axis]; a collective on P takes S as well. A value without gradient knows no difference
between R and I.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
import torch.fx as fx

from spcompile.collectives import COLLECTIVES, Collective, call_arguments
from spcompile.diagnostics import InvalidGraph, source_of
from spcompile.graph.dtypes import takes_gradient
from spcompile.machine.mesh import MeshShape, whole_axis

OWN_PART = "spx_own_part"  # in meta["custom"]: axes on which ranks make their parts from what all of them hold
_FITS = {"I": "I", "R": "IR", "S": "S", "P": "PS"}
_aten = torch.ops.aten
_SHAPE_ONLY = {
    _aten.sym_size.int,
    _aten.sym_numel.default,
    _aten.sym_stride.int,
    _aten.zeros_like.default,
    _aten.ones_like.default,
    _aten.full_like.default,
    _aten.empty_like.default,
    _aten.new_zeros.default,
    _aten.new_ones.default,
    _aten.new_full.default,
    _aten.new_empty.default,
}
_AGREEMENTS = {"agree_on_hops"}  # compare what all ranks must have alike
_WITHOUT_GRADIENT = {_aten.detach.default, *_SHAPE_ONLY}


def check_states(
    graph: fx.Graph,
    mesh: MeshShape,
    *,
    sharded_outputs: bool = False,
    input_states: Mapping[str, Mapping[str, str]],
    trainable: Collection[str] | None = None,
) -> None:
    """Infer the states on every axis and check each op. The arguments are those of `verifier.verify_graph`.

    Raises:
        InvalidGraph: a collective whose operand is in another state; an invariant value that needs a gradient, used
            together with varying ones without `vary`; a partial value read as if it were complete; an output that is
            not complete.
    """
    for node in graph.nodes:
        axis = _axis_of(node)
        if axis is not None and whole_axis(axis) not in dict(mesh.axes):
            raise invalid(node, f"axis {axis!r} is not in the mesh {mesh}")
    gradient = needs_gradient(graph, trainable)
    outputs = "IS" if sharded_outputs else "I"
    for whole, _ in mesh.axes:
        for axis in _parts_of(whole, graph):
            infer_states(graph, axis, mesh, gradient, input_states, outputs=outputs if axis != "dp" else "IS")


def _parts_of(axis: str, graph: fx.Graph) -> list[str]:
    """The parts of an axis over which a graph communicates on their own: axes of a finer mesh. Else the axis."""
    names = {found for node in graph.nodes if (found := _axis_of(node)) is not None}
    return sorted(name for name in names if name != axis and whole_axis(name) == axis) or [axis]


def trainable_names(graph: fx.Graph) -> list[str]:
    """The placeholders that capture found to need a gradient; tracing drops the flag of their example values."""
    return [n.name for n in graph.find_nodes(op="placeholder") if n.meta.get("trainable")]


def needs_gradient(graph: fx.Graph, trainable: Collection[str] | None = None) -> set[fx.Node]:
    """Values that a placeholder which requires a gradient (or is named in `trainable`) flows into."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        val = node.meta.get("val")
        carries = any(takes_gradient(v) for v in (val if isinstance(val, (tuple, list)) else (val,)))
        if not carries or node.target in _WITHOUT_GRADIENT:
            continue
        if node.op == "placeholder":
            needs = val.requires_grad if trainable is None else node.name in trainable
        else:
            needs = any(operand in found for operand in node.all_input_nodes)
        if needs:
            found.add(node)
    return found


def infer_states(
    graph: fx.Graph,
    axis: str,
    mesh: MeshShape,
    gradient: set[fx.Node],
    input_states: Mapping[str, Mapping[str, str]],
    outputs: str,
) -> dict[fx.Node, str]:
    """The state of every value on one axis, or on a part of one: what communicates on an axis does so on its parts."""
    found: dict[fx.Node, str] = {}
    for node in graph.nodes:
        if node.op == "output":
            _check_outputs(node, found, axis, outputs)
            continue
        if node.op in ("placeholder", "get_attr"):
            state = input_states.get(node.name, {}).get(whole_axis(axis), "I")
        else:
            collective = COLLECTIVES.get(node.target) if _axis_of(node) in (axis, whole_axis(axis)) else None
            if collective is not None:
                state = _collective_state(node, collective, found, mesh)
            else:
                state = _op_state(node, found, gradient, axis)
        found[node] = "I" if state == "R" and node not in gradient else state
    return found


def _axis_of(node: fx.Node) -> str | None:
    """The axis on which an spx op communicates."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "spx":
        return None
    return call_arguments(target, node.args, node.kwargs)[1].get("axis")


def _collective_state(node: fx.Node, collective: Collective, found: Mapping[fx.Node, str], mesh: MeshShape) -> str:
    arguments = call_arguments(collective.op, node.args, node.kwargs)[1]
    src, dst = collective.signature(arguments)
    operand = node.all_input_nodes[0]
    if found[operand] not in _FITS[src] and not (src in "SP" and _is_constant(operand)):
        raise invalid(node, f"{collective.name} is {src} -> {dst}, but {operand.name} is {found[operand]}")
    degree = mesh.size(arguments["axis"])
    if arguments["degree"] != degree:
        raise invalid(node, f"degree {arguments['degree']} on axis {arguments['axis']} of size {degree}")
    return dst


def _is_constant(node: fx.Node) -> bool:
    """Whether a value is made of numbers and sizes alone: in the shape of a part it is one, its sum a term."""
    pending, seen = [node], set[fx.Node]()
    while pending:
        each = pending.pop()
        if isinstance(each.meta.get("val"), torch.SymInt):
            continue
        if each.op != "call_function":
            return False
        if each not in seen and each.target not in _SHAPE_ONLY:
            pending += each.all_input_nodes
        seen.add(each)
    return True


def _op_state(node: fx.Node, found: Mapping[fx.Node, str], gradient: set[fx.Node], axis: str) -> str:
    """I if all operands are; else S if one is (P if a pass says so); else R. S if lowering made it one rank's part."""
    operands = [] if node.target in _SHAPE_ONLY else node.all_input_nodes
    varying = [n for n in operands if found[n] != "I"]
    is_part = whole_axis(axis) in node.meta.get("custom", {}).get(OWN_PART, ())
    communicates = _axis_of(node) in (axis, whole_axis(axis))
    if communicates and not any(isinstance(n.meta.get("val"), torch.Tensor) for n in operands):
        return "S"  # made from the rank alone, as positions are
    if getattr(node.target, "_opname", None) in _AGREEMENTS and not varying:
        return "I"
    if communicates and all(found[n] != "S" for n in operands):
        raise invalid(node, f"communicates on {axis}, but none of its operands is S")
    if not varying:
        return "S" if is_part else "I"
    missing = next((n for n in operands if found[n] == "I" and n in gradient), None)
    if missing is not None and node in gradient:
        raise invalid(
            node,
            f"missing vary: the gradient of {missing.name} would lack a sum over {axis}; "
            f"it is invariant, {varying[0].name} is {found[varying[0]]}",
            legal=f"spx.vary({missing.name}, {axis!r}, ...), or spx.shard of it",
        )
    said = str((node.meta.get("sharding") or {}).get(whole_axis(axis), ""))
    if said.startswith("P"):
        return "P"
    partial = next((n for n in varying if found[n] == "P"), None)
    if partial is not None:
        raise invalid(node, f"reads {partial.name}, which is partial on {axis}, as if it were complete")
    return "S" if is_part or any(found[n] == "S" for n in varying) else "R"


def _check_outputs(output: fx.Node, found: Mapping[fx.Node, str], axis: str, legal: str) -> None:
    for value in output.all_input_nodes:
        if found[value] not in legal:
            kind = {"P": "partial", "R": "replicate", "S": "varying"}[found[value]]
            raise invalid(value, f"{kind} value reaches an output: {found[value]} on {axis}", legal=" or ".join(legal))


def invalid(node: fx.Node, found: str, legal: str | None = None) -> InvalidGraph:
    """The error that names a node and the user's line that made it."""
    return InvalidGraph(f"{node.name}: {found}", where=source_of(node), legal=legal)
