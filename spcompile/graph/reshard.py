"""`reshard(x, axis, src, dst)`: an explicit change of a value's state on one mesh axis, in GLOBAL graphs.

States: "I" invariant (replicated, its gradient too), "R" replicated (its gradient is a pending sum), "P" pending sum,
"S(d)" split over dim d, "S(d.k)" split over the k-th factor of dim d. In a global graph it means the identity, so the
graph still runs on one device; `lower` turns it into a collective.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
import torch.fx as fx

_SPLIT = re.compile(r"S\((\d+)(?:\.(\d+))?\)")


@dataclass(frozen=True)
class Place:
    """Where a value is split: factor number `part` (major first) of tensor dim `dim`."""

    dim: int
    part: int = 0

    def __str__(self) -> str:
        return f"S({self.dim})" if self.part == 0 else f"S({self.dim}.{self.part})"


def reshard(x: torch.Tensor, axis: str, src: str, dst: str) -> torch.Tensor:
    """The identity on the global value; a state change `src` -> `dst` on mesh axis `axis`."""
    return x


def parse_place(state: str) -> Place | None:
    """The place of a state "S(d.k)"; None for I, R and P."""
    match = _SPLIT.fullmatch(state)
    return Place(int(match[1]), int(match[2] or 0)) if match else None


@dataclass(frozen=True)
class Reshard:
    """What a reshard node says: its arguments by their names."""

    x: fx.Node
    axis: str
    src: str
    dst: str

    @staticmethod
    def of(node: fx.Node) -> Reshard:
        """Of a node for which `is_reshard` holds."""
        assert is_reshard(node)
        return Reshard(*node.args)  # type: ignore[arg-type]

    @property
    def kinds(self) -> tuple[str, str]:
        """The letters of both states, without where a value is split."""
        return self.src[0], self.dst[0]


def is_reshard(node: fx.Node, axis: str | None = None) -> bool:
    """Whether a node is a reshard, on this axis if one is given."""
    is_one = node.op == "call_function" and node.target is reshard
    return is_one and (axis is None or Reshard.of(node).axis == axis)
