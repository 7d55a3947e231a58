"""Global views: how a graph reads a parameter of which every rank of an axis holds a part.

    weight = spx.all_gather(part, dim, length, axis, degree, "contiguous", "I")

A graph as captured is about whole tensors, so it reads a sharded parameter through all-gathers, one per axis: what it
says is true at every stage. When an axis is placed, the view on it stands for a value that is split already: it is
lowered to its operand, and gathered only for calls that do not want it split so. The view on the axis that is lowered
first stands outermost, so that no gather has to pass another view.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spcompile.collectives.typed_calls import AllGatherCall
from spcompile.graph.reshard import Place

if TYPE_CHECKING:
    import torch.fx as fx
    from torch import Tensor


LOWERED = ("dp", "cp", "tp")  # the order in which the pipeline lowers the axes


@dataclass(frozen=True)
class Part:
    """Tensor dim `dim` of a parameter is split evenly and contiguously over the `degree` ranks of `axis`."""

    dim: int
    axis: str
    degree: int


def nested(parts: Iterable[Part]) -> tuple[Part, ...]:
    """In the order of the views, innermost first: the axis that is lowered last."""
    return tuple(sorted(parts, key=lambda part: -LOWERED.index(part.axis)))


def global_view(part: Tensor, parts: Sequence[Part]) -> Tensor:
    """The whole tensor of which this rank holds `part`, split as `nested` parts say.

    Under Dynamo; in a process it would look for a group with the name of the axis.
    """
    import torch

    for p in parts:
        length = part.shape[p.dim] * p.degree
        part = torch.ops.spx.all_gather(part, p.dim, length, p.axis, p.degree, "contiguous", "I")
    return part


def is_view(node: fx.Node, axis: str) -> bool:
    """Whether a node is a view on `axis`, in a graph where collectives of that axis are not yet made."""
    return AllGatherCall.is_call(node) and AllGatherCall.of(node).axis == axis


def part_of_view(node: fx.Node) -> Part:
    """How the operand of a view is split."""
    view = AllGatherCall.of(node)
    return Part(view.dim, view.axis, view.degree)


def place_of_view(node: fx.Node) -> Place:
    """The place at which the result of a view counts as split."""
    return Place(part_of_view(node).dim)


def views(graph: fx.Graph, axis: str) -> list[fx.Node]:
    """All views on one axis."""
    return [node for node in graph.nodes if node.op == "call_function" and is_view(node, axis)]


def mark_parts(graph: fx.Graph) -> None:
    """Write into meta["parts"] of every placeholder on which axes its ranks hold different parts: {"tp": "S"}."""
    for node in graph.nodes:
        if node.op != "call_function" or not any(is_view(node, axis) for axis in LOWERED):
            continue
        view = AllGatherCall.of(node)
        source = view.x
        while any(is_view(source, axis) for axis in LOWERED):
            source = AllGatherCall.of(source).x
        if source.op == "placeholder":
            source.meta.setdefault("parts", {})[view.axis] = "S"


def states_of_inputs(graph: fx.Graph) -> dict[str, dict[str, str]]:
    """Placeholder name -> axis -> "S", for the parameters and entries of the batch of which ranks hold parts."""
    return {n.name: n.meta["parts"] for n in graph.find_nodes(op="placeholder") if n.meta.get("parts")}
