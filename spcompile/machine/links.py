"""How fast ranks talk and compute: the table behind every decision that depends on time.

Decisions read this table and never a clock, so that all ranks, and `explain` on a laptop, decide the same. The figures
are round numbers of what is reached, not of data sheets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from spcompile.machine.mesh import MeshShape, axis_part

RANKS_PER_NODE = 8


@dataclass(frozen=True)
class Link:
    """bytes_per_second: what one rank sends, one way. seconds_per_message: until the first byte arrives."""

    name: str
    bytes_per_second: float
    seconds_per_message: float

    def seconds(self, sent: float, messages: int = 1) -> float:
        """Time for `sent` bytes of one rank in `messages` that wait for one another."""
        return sent / self.bytes_per_second + messages * self.seconds_per_message


LINKS = {
    "nvlink": Link("nvlink", 400e9, 3e-6),  # NVLink 4: 450 GB/s one way; NCCL reaches about 400
    "network": Link("network", 50e9, 10e-6),  # one 400 Gb/s adapter for each GPU
    "loopback": Link("loopback", 1.5e9, 200e-6),  # gloo between processes of one machine
}


def link_of(mesh: MeshShape, axis: str, chosen: Mapping[str, str], degree: int | None = None) -> Link:
    """The link of `axis` or a part of one: the user's word, else NVLink where its ranks fit into one node.

    chosen: axis -> name in LINKS. degree: of the innermost part of the axis, where only that communicates.
    """
    part = axis_part(axis)
    if part is not None:
        axis, degree = part.axis, part.size if part.is_inner else None
    if axis in chosen:
        return LINKS[chosen[axis]]
    names = [name for name, _ in mesh.axes]
    further_in = mesh.axes[names.index(axis) + 1 :] if axis in names else ()
    span = math.prod(size for _, size in further_in) * (degree or mesh.size(axis))
    return LINKS["nvlink" if span <= RANKS_PER_NODE else "network"]
