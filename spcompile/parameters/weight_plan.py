"""Where every parameter is split: on `tp` as the compiler splits it, on one more axis wherever it divides.

A parameter is stored split only where what a rank holds is exactly what its program takes of the whole one: an even
split of a whole tensor dim. Everything else is held whole, and said so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch.fx as fx
from torch import nn

from spcompile.graph.reshard import Reshard, is_reshard, parse_place
from spcompile.graph.sizes import divides, same
from spcompile.sharding.global_view import Part, nested
from spcompile.sharding.layout import layout_of
from spcompile.sharding.propagate import space_at

PLANNED = "insert-tensor-reshards"  # behind this pass the graph says how tp splits each parameter


@dataclass
class WeightPlan:
    """What a rank holds of each parameter, by name. parts: innermost view first. whole: why tp does not split it."""

    parts: dict[str, tuple[Part, ...]] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)

    def bytes_per_rank(self, model: nn.Module) -> int:
        """Bytes of parameters on one rank; tied ones count once."""
        total = 0
        for name, parameter in model.named_parameters():
            ranks = 1
            for part in self.parts[name]:
                ranks *= part.degree
            total += parameter.numel() * parameter.element_size() // ranks
        return total


def weight_plan(
    model: nn.Module, split: Mapping[str, int | str], degrees: Mapping[str, int], axes: Sequence[str] = ()
) -> WeightPlan:
    """The plan of all parameters.

    split: name -> the dim that tp splits, or why it splits none; parameters that the graph does not read are absent.
    degrees: ranks of each mesh axis. axes: those over which parameters are split besides, wherever a dim divides
        (ZeRO-3). `tp` among them splits the matrices that the program does not read in the parts that would be stored.
    """
    plan = WeightPlan()
    for name, parameter in model.named_parameters():
        found = split.get(name, "the traced graph does not read it")
        plan.parts[name] = parts_of_parameter(parameter.shape, found, degrees, axes)
        if degrees.get("tp", 1) > 1 and not any(part.axis == "tp" for part in plan.parts[name]):
            plan.whole[name] = str(found)
    return plan


def parts_of_parameter(
    shape: Sequence[int], found: int | str, degrees: Mapping[str, int], axes: Sequence[str]
) -> tuple[Part, ...]:
    """How a parameter of this shape is split. found: the dim that tp splits, or why it splits none."""
    parts = []
    if degrees.get("tp", 1) > 1 and isinstance(found, int):
        parts.append(Part(found, "tp", degrees["tp"]))
    for axis in sorted(axes, key=lambda axis: axis != "tp"):
        if axis == "tp" and (parts or len(shape) < 2):
            continue
        degree, taken = degrees.get(axis, 1), {part.dim for part in parts}
        free = (d for d, n in enumerate(shape) if n and n % degree == 0 and d not in taken)
        dim = next(free, None)
        if degree > 1 and dim is not None:
            parts.append(Part(dim, axis, degree))
    return nested(parts)


def split_over_tp(graph: fx.Graph, degree: int) -> list[int | str]:
    """For each placeholder of a graph after insert-tensor-reshards: the dim that tp splits, or why it splits none."""
    return [_split_dim(node, degree) for node in graph.find_nodes(op="placeholder")]


def _split_dim(node: fx.Node, degree: int) -> int | str:
    states = {Reshard.of(user).dst if is_reshard(user, "tp") else "I" for user in node.users}
    layout = layout_of(node)
    if len(states) != 1 or layout is None:
        return "it is read in several ways: " + ", ".join(sorted(states)) if states else "nothing reads it"
    (state,) = states
    place = parse_place(state)
    if place is None:
        return "no call reads it, as it is stored, in parts of tp"  # norms; fused weights, whose slices are split
    space = space_at(layout.dims[0], place)
    if place.part > 0:
        return f"tp splits factor {place.part} inside its dim {place.dim}"
    if not divides(degree, space.find().size) or not same(space.family().size, space.find().size):
        return f"the {space.find().size} indices that tp splits in its dim {place.dim} do not divide by {degree}"
    return place.dim
