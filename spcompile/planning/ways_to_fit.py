"""What would make a step fit that does not: tried, not guessed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from spcompile.machine.byte_sizes import bytes_text
from spcompile.machine.durations import ms_text
from spcompile.machine.mesh import MeshShape
from spcompile.options import Options
from spcompile.passes_api import Pass
from spcompile.planning.candidates import ORDER, Candidate, shards
from spcompile.planning.search import Depths, Result, evaluate

_DOUBLINGS = 6  # of the ranks on cp


def ways_to_fit(depths: Depths, mesh: MeshShape, options: Options, pipeline: Sequence[Pass]) -> list[str]:
    """Parameters split over all axes that hold equal ones, and more ranks: the first that fits, and what it takes."""
    tried = 0
    for one in _candidates(mesh, options):
        if one.size("cp") > depths.heads.tokens:
            break
        result = evaluate(depths, one, options, pipeline)
        tried = one.ranks
        if result.fits:
            return [_told(one, result, mesh)]
    return [f"more than {max(tried, mesh.world_size)} ranks, fewer tokens, or a lighter optimizer"]


def _candidates(mesh: MeshShape, options: Options) -> Iterator[Candidate]:
    sizes = {axis: mesh.size(axis) for axis in ORDER if mesh.size(axis) > 1}
    attention = tuple(options.attention.items()) if isinstance(options.attention, Mapping) else options.attention
    split = shards(sizes)[-1]
    if split:
        yield Candidate(tuple(sizes.items()), attention, True, split)
    for _ in range(_DOUBLINGS):
        sizes = {axis: sizes.get(axis, 1) for axis in ORDER if axis == "cp" or axis in sizes}
        sizes["cp"] *= 2
        # The factors of a hybrid are those of another number of ranks.
        free = attention if isinstance(attention, str) else "auto"
        yield Candidate(tuple(sizes.items()), free, True, shards(sizes)[-1])


def _told(one: Candidate, result: Result, mesh: MeshShape) -> str:
    assert result.figures is not None
    words = [] if one.ranks == mesh.world_size else [f"mesh {','.join(f'{axis}={size}' for axis, size in one.mesh)}"]
    words += [f"shard_parameters={list(one.shard)!r}"] if one.shard else []
    takes = f"{bytes_text(result.figures.total)}, {ms_text(result.figures.seconds)} ms a step"
    return f"{' with '.join(words)}: {takes}"
