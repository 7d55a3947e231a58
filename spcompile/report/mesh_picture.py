"""A picture of a mesh: its ranks, and which tokens, weights and entries each holds. HTML without anything remote."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from itertools import product

from spcompile.machine.mesh import MeshShape
from spcompile.machine.sequence import chunk_length, chunks_of, chunks_per_rank

MOST_DRAWN = 64  # ranks
_HUES = 360


def mesh_picture(mesh: MeshShape, order: str, length: int | None) -> str:
    """HTML of a table of ranks, the innermost axis across, above it the sequence in the colours of who holds it.

    length: of the sequence in tokens; None where it is none, or a symbol.
    """
    cp = mesh.size("cp")
    parts = ['<div class="mesh">']
    if cp > 1 and length is not None and chunks_per_rank(order) * cp <= 2 * MOST_DRAWN:
        parts.append(_sequence(cp, order, length))
    parts.append(_ranks(mesh, order, length))
    parts.append("</div>")
    return "".join(parts)


def _sequence(cp: int, order: str, length: int) -> str:
    """The sequence from its first token to its last, each chunk in the colour of its rank of cp."""
    owner = {chunk: rank for rank in range(cp) for chunk in chunks_of(rank, cp, order)}
    cells = [
        f'<span class="chunk" style="background:{_colour(owner[chunk], cp)}" '
        f'title="tokens {_range_text(chunk, cp, order, length)}">{owner[chunk]}</span>'
        for chunk in sorted(owner)
    ]
    return f'<div class="caption">{length:,} tokens, by rank of cp</div><div class="sequence">{"".join(cells)}</div>'


def _ranks(mesh: MeshShape, order: str, length: int | None) -> str:
    axes = list(mesh.axes)
    if not axes:
        return "<p>one rank holds everything</p>"
    *outer, (inner, width) = axes
    rows = []
    rank = 0
    for place in product(*(range(size) for _, size in outer)):
        cells = []
        for last in range(min(width, MOST_DRAWN - rank)):
            where = dict(zip((axis for axis, _ in axes), (*place, last), strict=True))
            cells.append(_rank_cell(rank, where, mesh, order, length))
            rank += 1
        rows.append(f"<tr>{''.join(cells)}</tr>")
        if rank >= MOST_DRAWN:
            break
    more = f'<div class="caption">and {mesh.world_size - rank} more</div>' if rank < mesh.world_size else ""
    names = " x ".join(f"{axis} = {size}" for axis, size in axes)
    caption = f'<div class="caption">{escape(names)}; {escape(inner)} goes across</div>'
    return f'{caption}<div class="scroll"><table class="ranks">{"".join(rows)}</table></div>{more}'


def _rank_cell(rank: int, where: dict[str, int], mesh: MeshShape, order: str, length: int | None) -> str:
    colour = _colour(where["cp"], mesh.size("cp")) if "cp" in where else "transparent"
    lines = [f"<b>rank {rank}</b>", ", ".join(f"{axis} {place}" for axis, place in where.items())]
    lines += _what_it_holds(where, mesh, order, length)
    return f'<td style="border-color:{colour}">{"<br>".join(lines)}</td>'


def _what_it_holds(where: dict[str, int], mesh: MeshShape, order: str, length: int | None) -> Iterator[str]:
    """What a rank has that others have not."""
    cp = mesh.size("cp")
    if cp > 1 and length is not None:
        ranges = [_range_text(chunk, cp, order, length) for chunk in chunks_of(where["cp"], cp, order)]
        yield f"tokens {' and '.join(ranges)}"
    if mesh.size("tp") > 1:
        yield f"part {where['tp'] + 1} of {mesh.size('tp')} of heads and features"
    if mesh.size("dp") > 1:
        yield f"part {where['dp'] + 1} of {mesh.size('dp')} of the batch"


def _range_text(chunk: int, cp: int, order: str, length: int) -> str:
    size = chunk_length(length, cp, order)
    first, last = chunk * size, min((chunk + 1) * size, length) - 1
    return f"{first:,}-{last:,}" if last >= first else "padding"


def _colour(rank: int, ranks: int) -> str:
    return f"hsl({_HUES * rank // max(1, ranks)} 60% 50% / .55)"
