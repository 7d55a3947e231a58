"""How fast ranks talk and compute: the table behind every decision that depends on time.

Decisions read this table and never a clock, so that all ranks, and `explain` on a laptop, decide the same. The figures
are round numbers of what is reached, not of data sheets. Their sources are in `hardware.json`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from spcompile.machine.curves import TimeCurve
from spcompile.machine.hardware import HARDWARE
from spcompile.machine.mesh import MeshShape, axis_part

RANKS_PER_NODE = 8


@dataclass(frozen=True)
class Link:
    """bytes_per_second: what one rank sends, one way. seconds_per_message: until the first byte arrives.

    reaches_memory: whether the GPUs read and write each other's memory, with no network between them.
    measured: collective -> bytes that a rank sends -> seconds, where they were measured.
    """

    name: str
    bytes_per_second: float
    seconds_per_message: float
    reaches_memory: bool = False
    measured: Mapping[str, TimeCurve] = field(default_factory=dict, hash=False)

    def seconds(self, sent: float, messages: int = 1, collective: str = "message") -> float:
        """Time for `sent` bytes of one rank in `messages` that wait for one another."""
        if collective in self.measured:
            return self.measured[collective].seconds(sent)
        return sent / self.bytes_per_second + messages * self.seconds_per_message


LINKS = {
    name: Link(
        name, row["reached"] * row["bytes_per_second_one_way"], row["seconds_per_message"], row["reaches_memory"]
    )
    for name, row in HARDWARE["links"].items()
}


def link_of(
    mesh: MeshShape,
    axis: str,
    chosen: Mapping[str, str],
    degree: int | None = None,
    own: Mapping[str, str] = MappingProxyType({}),
) -> Link:
    """The link of `axis` or a part of one: the user's word, else NVLink where its ranks fit into one node.

    chosen: axis -> name in LINKS. degree: of the innermost part of the axis, where only that communicates. own: what
        "nvlink" and "network" are beside an accelerator, `Accelerator.links`.
    """
    part = axis_part(axis)
    if part is not None:
        axis, degree = part.axis, part.size if part.is_inner else None
    if axis in chosen:
        return LINKS[own.get(chosen[axis], chosen[axis])]
    names = [name for name, _ in mesh.axes]
    further_in = mesh.axes[names.index(axis) + 1 :] if axis in names else ()
    span = math.prod(size for _, size in further_in) * (degree or mesh.size(axis))
    name = "nvlink" if span <= RANKS_PER_NODE else "network"
    return LINKS[own.get(name, name)]
