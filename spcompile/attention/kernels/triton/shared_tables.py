"""The tables of tiles of all parts of the keys in one tensor, so that layers, hops and kernels share them.

Where documents or key padding decide, tables are data. They depend on the mask, on the layout of rows and keys and on
the sizes of tiles, and on nothing that differs between layers. So `spx::tile_tables` makes them once, in as many
launches for one part as for all, and a kernel of any hop reads its own.

The tensor is int32 [numbers]. First come the places of rows; then, part by part, the places of the part's keys and for
each kernel the segments of each of its lines. Its size depends on sizes alone, not on the GPU: there is room for the
smallest tiles of any architecture.

B batch (1 where all have the same data), S query rows, P parts of the keys, T keys of a part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn.functional import pad

from spcompile.attention.kernels.triton.configs import Configs
from spcompile.attention.kernels.triton.tile_tables import Places, Segments, cut_short, segments, tile_kinds

if TYPE_CHECKING:
    from torch import Tensor

    from spcompile.attention.scores.mask import AttentionMask

SEGMENTS = 16  # of a line: rows of packed documents have two or three
MOST_TILES = 1 << 24  # looked at together, a few bytes each
Kernel = Literal["forward", "rows", "keys"]
KERNELS: tuple[Kernel, ...] = ("forward", "rows", "keys")
Size = Any  # int or SymInt


@dataclass(frozen=True)
class TableLayout:
    """Where each table is. least: `configs.smallest`."""

    batch: Size
    rows: Size
    keys: Size
    has_documents: bool
    least: Configs

    def before(self) -> dict[str, Size]:
        """Numbers of what is there once, by name."""
        documents = self.batch * self.rows if self.has_documents else 0
        return {"positions": _rounded_up(self.rows), "documents": _rounded_up(documents)}

    def of_part(self) -> dict[str, Size]:
        """Numbers of what is there for each part, by name."""
        keys = self.batch * self.keys
        found = {"columns": self.keys, "positions": keys, "documents": keys if self.has_documents else 0}
        for kernel in KERNELS:
            lines = self.batch * tiles_along(self.rows, self.keys, self.least, kernel)[0]
            for kind in ("full", "partial"):
                found[f"{kernel} {kind}"] = lines * SEGMENTS * 2
                found[f"{kernel} {kind} count"] = lines
        return {name: _rounded_up(count) for name, count in found.items()}

    def numbers(self, parts: int) -> Size:
        """Of the whole tensor."""
        return sum(self.before().values()) + parts * sum(self.of_part().values())


def _rounded_up(count: Size) -> Size:
    """Tables begin at multiples of 16 bytes, so that kernels are compiled once for all of them."""
    return (count + 3) // 4 * 4


def tiles_along(rows: Size, keys: Size, configs: Configs, kernel: Kernel) -> tuple[Size, Size]:
    """(lines, tiles of a line) of a kernel; those of the kernel "keys" are keys by rows."""
    config = getattr(configs, kernel)
    found = (rows + config.block_m - 1) // config.block_m, (keys + config.block_n - 1) // config.block_n
    return found[::-1] if kernel == "keys" else found


def make_tables(
    layout: TableLayout, configs: Configs, mask: AttentionMask, q: Places, k: Places, columns: Tensor
) -> Tensor:
    """The tensor.

    q: of rows, positions [S]. k: of all keys, [B, P, T]; columns int32 [P, T]: where keys are, valid or not.
    """
    parts = columns.shape[0]
    tables = torch.zeros(layout.numbers(parts), dtype=torch.int32, device=columns.device)
    first = sum(layout.before().values())
    _put(tables[None, :first], layout.before(), "positions", q.positions[None])
    if q.documents is not None:
        documents = q.documents.expand(layout.batch, -1)
        _put(tables[None, :first], layout.before(), "documents", documents.reshape(1, -1))
    records, place = tables[first:].view(parts, -1), layout.of_part()
    _put(records, place, "columns", columns)
    _put(records, place, "positions", k.positions.expand(layout.batch, -1, -1).transpose(0, 1).flatten(1))
    if k.documents is not None:
        _put(records, place, "documents", k.documents.expand(layout.batch, -1, -1).transpose(0, 1).flatten(1))
    q_places = Places(q.positions[None], q.documents)
    for kernel in KERNELS:
        for some in _some_parts(layout, configs, kernel, parts):
            full, partial = _kinds_of_parts(mask, q_places, k, some, configs, kernel)
            found = segments(*cut_short(full, partial, SEGMENTS), SEGMENTS)
            for name, table in zip(("full", "full count", "partial", "partial count"), found, strict=True):
                _put(records[some], place, f"{kernel} {name}", table.flatten(1))
    return tables


def _put(records: Tensor, place: dict[str, int], name: str, value: Tensor) -> None:
    """Into every record the values of a field."""
    start = sum(count for other, count in _fields_before(place, name))
    records[:, start : start + value.shape[1]] = value


def _fields_before(place: dict[str, int], name: str) -> Iterator[tuple[str, int]]:
    for other, count in place.items():
        if other == name:
            return
        yield other, count


def _some_parts(layout: TableLayout, configs: Configs, kernel: Kernel, parts: int) -> Iterator[slice]:
    """All parts, in as few slices as memory allows."""
    tiles = layout.batch * math.prod(tiles_along(layout.rows, layout.keys, configs, kernel))
    step = max(1, MOST_TILES // max(1, tiles))
    for start in range(0, parts, step):
        yield slice(start, min(start + step, parts))


def _kinds_of_parts(
    mask: AttentionMask, q: Places, k: Places, some: slice, configs: Configs, kernel: Kernel
) -> tuple[Tensor, Tensor]:
    """`tile_kinds` of some parts, [parts, B, lines, tiles of a line]."""
    config = getattr(configs, kernel)
    positions = k.positions[:, some]
    parts, missing = positions.shape[1], -positions.shape[2] % config.block_n
    documents = None if k.documents is None else k.documents[:, some]
    if missing:
        positions = pad(positions, (0, missing), value=-1)
        if documents is not None:  # a copy of the last id changes no extreme
            documents = torch.cat([documents, documents[..., -1:].expand(-1, -1, missing)], -1)
    keys = Places(positions.flatten(1), None if documents is None else documents.flatten(1))
    kinds = tile_kinds(mask, q, keys, config.block_m, config.block_n)
    full, partial = (x.unflatten(2, (parts, -1)).movedim(2, 0) for x in kinds)
    return (full.mT, partial.mT) if kernel == "keys" else (full, partial)


@dataclass(frozen=True, eq=False)
class SharedTables:
    """The tables of one part, as kernels take them. configs: those that `make_tables` had."""

    tables: Tensor
    layout: TableLayout
    configs: Configs
    part: int

    def places(self) -> tuple[Places, Places]:
        """Of rows, and of the part's keys."""
        B, S, T = self.layout.batch, self.layout.rows, self.layout.keys
        q, k = self._before("positions", S).view(1, S), self._of_part("positions", B * T).view(B, T)
        if not self.layout.has_documents:
            return Places(q, None), Places(k, None)
        q_documents = self._before("documents", B * S).view(B, S)
        return Places(q, q_documents), Places(k, self._of_part("documents", B * T).view(B, T))

    def columns(self) -> Tensor:
        """int32 [T]: positions of the keys, valid or not."""
        return self._of_part("columns", self.layout.keys)

    def segments(self, kernel: Kernel) -> Segments:
        """Of a kernel's lines."""
        B = self.layout.batch
        lines, _ = tiles_along(self.layout.rows, self.layout.keys, self.configs, kernel)
        found = []
        for kind in ("full", "partial"):
            found.append(self._of_part(f"{kernel} {kind}", B * lines * SEGMENTS * 2).view(B, lines, SEGMENTS, 2))
            found.append(self._of_part(f"{kernel} {kind} count", B * lines).view(B, lines))
        return Segments(*found)

    def _before(self, name: str, count: int) -> Tensor:
        start = sum(numbers for _, numbers in _fields_before(self.layout.before(), name))
        return self.tables[start : start + count]

    def _of_part(self, name: str, count: int) -> Tensor:
        place = self.layout.of_part()
        start = sum(self.layout.before().values()) + self.part * sum(place.values())
        start += sum(numbers for _, numbers in _fields_before(place, name))
        return self.tables[start : start + count]
