"""What is tried: meshes, ways to spread attention, Megatron sequence parallelism, parameters whole or split."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from spcompile.attention.strategy import Strategy
from spcompile.diagnostics import IllegalMesh
from spcompile.machine.links import RANKS_PER_NODE
from spcompile.machine.mesh import AXES

ORDER = ("dp", "cp", "tp")  # outermost first: what sends most stays inside a node
MEGATRON = "split-all-reduce"  # the pass without which tp is plain Megatron


@dataclass(frozen=True)
class Heads:
    """What the model's attentions and inputs allow. heads: query heads of each attention. entries: of the batch."""

    heads: tuple[int, ...]
    tokens: int
    entries: int


@dataclass(frozen=True)
class Candidate:
    """One way to run a model. mesh: axes of more than one rank, outermost first; shard: axes of ZeRO-3."""

    mesh: tuple[tuple[str, int], ...]
    attention: str | tuple[tuple[str, int], ...] = "auto"
    megatron_sp: bool = True
    shard: tuple[str, ...] = ()

    def size(self, axis: str) -> int:
        """Ranks along an axis."""
        return dict(self.mesh).get(axis, 1)

    @property
    def ranks(self) -> int:
        """Of the whole mesh."""
        return math.prod(size for _, size in self.mesh)

    def with_more_ranks(self) -> Candidate:
        """With cp twice as large, as a ring, parameters split as far as can be."""
        sizes = dict(self.mesh) | {"cp": 2 * self.size("cp")}
        mesh = tuple((axis, sizes[axis]) for axis in ORDER if axis in sizes)
        return Candidate(mesh, "ring", True, shards(sizes)[-1])

    @property
    def options(self) -> dict[str, Any]:
        """Those of the backend in which candidates differ."""
        found: dict[str, Any] = {}
        if self.size("cp") > 1:
            found["attention"] = self.attention if isinstance(self.attention, str) else dict(self.attention)
        if self.size("tp") > 1 and not self.megatron_sp:
            found["passes"] = {MEGATRON: False}
        return found

    @property
    def attention_text(self) -> str:
        """As people write it: `ulysses 4 x ring 2`."""
        if self.size("cp") == 1:
            return ""
        return self.attention if isinstance(self.attention, str) else " x ".join(f"{n} {k}" for n, k in self.attention)

    @property
    def name(self) -> str:
        """`tp=2 cp=4, ulysses`."""
        mesh = " ".join(f"{axis}={size}" for axis, size in self.mesh) or "one rank"
        return ", ".join(filter(None, (mesh, self.attention_text, "" if self.megatron_sp else "plain Megatron")))


def meshes(world: int, axes: Collection[str], found: Heads) -> list[tuple[tuple[str, int], ...]]:
    """All meshes of `world` ranks, of which none has idle ranks.

    tp stays inside a node and divides the query heads; dp divides the batch; cp takes the rest, at most a rank a token.

    Raises:
        IllegalMesh: there is none.
    """
    shapes: list[tuple[tuple[str, int], ...]] = []
    for tp in _divisors(world) if "tp" in axes else [1]:
        if tp > RANKS_PER_NODE or any(heads % tp for heads in found.heads):
            continue
        for dp in _divisors(world // tp) if "dp" in axes else [1]:
            cp = world // tp // dp
            if found.entries % dp or cp > found.tokens or (cp > 1 and "cp" not in axes):
                continue
            sizes = {"dp": dp, "cp": cp, "tp": tp}
            shapes.append(tuple((axis, sizes[axis]) for axis in ORDER if sizes[axis] > 1))
    if not shapes:
        legal = f"tp divides {' and '.join(map(str, sorted(set(found.heads))))} heads and is at most {RANKS_PER_NODE}"
        legal += f", dp divides {found.entries} entries of the batch, cp is at most {found.tokens}"
        raise IllegalMesh(f"{world} ranks on axes {', '.join(axes)}: no mesh has that many", legal=legal)
    return shapes


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def attentions(mesh: Mapping[str, int], found: Heads) -> list[str | tuple[tuple[str, int], ...]]:
    """Ways to spread attention over cp: a ring, Ulysses where heads are enough, both, Ulysses inside a node."""
    cp, tp = mesh.get("cp", 1), mesh.get("tp", 1)
    if cp == 1:
        return ["auto"]

    def divides(degree: int) -> bool:
        return all(heads // tp % degree == 0 for heads in found.heads)

    hybrids = [s for s in Strategy.hybrids(cp) if divides(s.inner) and s.inner * tp <= RANKS_PER_NODE]
    factors = [(("ulysses", s.inner), ("ring", s.outer)) for s in hybrids]
    return ["ring", *(["ulysses"] if divides(cp) else []), *factors]


def shards(mesh: Mapping[str, int]) -> list[tuple[str, ...]]:
    """Over which axes parameters may be split besides tp: none, or all that hold equal ones."""
    axes = tuple(axis for axis in ("dp", "cp") if mesh.get(axis, 1) > 1)
    return [(), axes] if axes else [()]


def first_round(shapes: Iterable[tuple[tuple[str, int], ...]], found: Heads) -> list[Candidate]:
    """Every mesh with every attention, parameters split as far as can be."""
    return [
        Candidate(mesh, attention, True, shards(dict(mesh))[-1])
        for mesh in shapes
        for attention in attentions(dict(mesh), found)
    ]


def second_round(best: Iterable[Candidate]) -> Iterator[Candidate]:
    """Of the best candidate of each mesh: parameters whole, and Megatron without sequence parallelism."""
    for one in best:
        if one.shard:
            yield Candidate(one.mesh, one.attention, True, ())
        if one.size("tp") > 1:
            yield Candidate(one.mesh, one.attention, False, one.shard)


def compared_strategies(worlds: Iterable[int], found: Heads) -> list[Candidate]:
    """Of each number of ranks: tp without and with sequence parallelism, cp alone, and cp beside the largest tp.

    Raises:
        IllegalMesh: for one of them there is none.
    """
    wanted: list[Candidate] = []
    for world in worlds:
        shapes = [mesh for mesh in meshes(world, ("tp", "cp"), found) if dict(mesh).get("dp", 1) == 1]
        widest = max(dict(mesh).get("tp", 1) for mesh in shapes)
        for mesh in shapes:
            tp, cp = (dict(mesh).get(axis, 1) for axis in ("tp", "cp"))
            if tp not in (1, widest) or world == 1:
                continue
            ways = attentions(dict(mesh), found)
            wanted_ways: list[str | tuple[tuple[str, int], ...]] = [way for way in ways if isinstance(way, str)]
            if "ulysses" not in ways:
                wanted_ways += [way for way in ways if not isinstance(way, str)][-1:]  # the widest that heads allow
            for attention in wanted_ways:
                if cp == 1:
                    wanted.append(Candidate(mesh, attention, False))
                wanted.append(Candidate(mesh, attention, True, shards(dict(mesh))[-1]))
    return wanted


def require_known_axes(axes: Collection[str]) -> None:
    """Raises IllegalMesh for axes that there are not."""
    unknown = [axis for axis in axes if axis not in AXES]
    if unknown or not axes:
        raise IllegalMesh(f"axes {', '.join(axes) or 'none'}", legal=f"out of {', '.join(AXES)}")
