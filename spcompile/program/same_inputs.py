"""What callers pass to a graph: names and shapes on all ranks, values on those of cp and tp, which get one batch."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch.distributed.tensor import DTensor

from spcompile.capture.retrace import is_state
from spcompile.machine.mesh import AXES
from spcompile.program.checksum import can_be_summed, checksums
from spcompile.program.facts import Fact

_STEP = re.compile(r"\._(?:modules|parameters|buffers)(?=\[)|\['([^']+)'\]")
_SAME_BATCH = (
    "all ranks of cp and tp pass the same batch; a DistributedSampler gets num_replicas= the size of dp and rank= the "
    "place on it (1 and 0 without dp); what is sampled, as in generate, comes from torch.manual_seed with one seed. "
    "compare_inputs=False does not look"
)


def names_of(gm: fx.GraphModule) -> list[str]:
    """What people call each input of a Dynamo graph: `ids_BS`, `layers.0.weight`."""
    return [_name(node) for node in gm.graph.find_nodes(op="placeholder")]


def places_of_state(gm: fx.GraphModule) -> list[int]:
    """Which inputs of a Dynamo graph are a module's own: parameters, buffers and other tensors of it."""
    return [i for i, node in enumerate(gm.graph.find_nodes(op="placeholder")) if is_state(node)]


def shape_text(value: Any) -> str:
    """`int64(2, 16)` of a tensor; the text of anything else."""
    if not isinstance(value, torch.Tensor):
        return str(value)
    return f"{value.dtype}{tuple(value.shape)}".replace("torch.", "")


def split_axes(value: Any) -> tuple[str, ...]:
    """The axes over which the parts of a DTensor differ by right."""
    if not isinstance(value, DTensor):
        return ()
    named = zip(value.device_mesh.mesh_dim_names or (), value.placements, strict=False)
    return tuple(axis for axis, placement in named if not placement.is_replicate() and axis in AXES)


def facts_of_inputs(names: Sequence[str], values: Sequence[Any], with_values: bool) -> Callable[[], list[Fact]]:
    """The facts of what one call is given, once the device has them."""
    shapes = [Fact(f"input {name}", shape_text(value)) for name, value in zip(names, values, strict=True)]
    summed = [i for i, value in enumerate(values) if with_values and can_be_summed(value)]
    numbers = checksums([values[i] for i in summed])

    def found() -> list[Fact]:
        sums = [
            Fact(f"values of input {names[i]}", _sum_text(number), ("dp", *split_axes(values[i])), _SAME_BATCH)
            for i, number in zip(summed, numbers(), strict=True)
        ]
        return [*shapes, *sums]

    return found


def _sum_text(number: int) -> str:
    return f"checksum {number % 2**64:016x}"


def _name(node: fx.Node) -> str:
    source = getattr(node.meta.get("grapharg"), "source", None)
    if source is None:
        return node.name
    name = source.name() if callable(source.name) else source.name
    path = _STEP.sub(lambda found: f".{found[1]}" if found[1] else "", name.removeprefix("L"))
    return re.sub(r"^\.(self|fn)\.", ".", path).removeprefix(".") or node.name
