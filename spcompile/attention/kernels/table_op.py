"""`spx::tile_tables`: what documents and key padding say about every tile of scores, once for all layers.

One op for each mask and layout, like `spx::ring_hops`. The kernels of every hop of every layer, forward and backward,
read its result (`kernels/triton/shared_tables.py`); other kernels do not look at it. It knows no rank: rows say where
they are by `q_positions`, and keys of all ranks come in the order of ranks.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from spcompile.attention.kernels.triton.configs import HEAD_SIZES, device_configs, smallest
from spcompile.attention.kernels.triton.shared_tables import TableLayout, make_tables
from spcompile.attention.kernels.triton.tile_tables import Places, document_numbers
from spcompile.attention.scores.mask import AttentionMask
from spcompile.graph.sizes import Size
from spcompile.graph.typed_call import Operand, TypedCall
from spcompile.machine import sequence

if TYPE_CHECKING:
    from torch import Tensor

MOST_HEAD = HEAD_SIZES[-1]
_LIBRARY = torch.library.Library("spx", "FRAGMENT")
_LIBRARY.define(
    "tile_tables(Tensor? q_positions, Tensor? k_positions, Tensor? q_documents, Tensor? k_documents, "
    "Tensor? key_valid, str mask, SymInt q_length, SymInt k_length, int degree, str order, int inner, int element, "
    "int head_size, int v_size, str variant) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@dataclass(frozen=True, kw_only=True)
class TileTablesCall(TypedCall):
    """spx.tile_tables. Some tensor must be given.

    q_positions int32 [S]: of local rows, past q_length where they are padding; None where they count from 0.
    k_positions int32 [T]: of keys that are not laid out over ranks; None where they count from 0.
    degree, order, inner: of `Ring`, over which the keys are laid out; 1 where one device has all.
    element: bytes of a number of q, k and v. head_size, v_size: of q and k, and of v. variant: see `variant_of`.
    """

    NAME: ClassVar[str] = "tile_tables"

    q_positions: Operand
    k_positions: Operand
    q_documents: Operand
    k_documents: Operand
    key_valid: Operand
    mask: str
    q_length: Size
    k_length: Size
    degree: int
    order: str
    inner: int
    element: int
    head_size: int
    v_size: int
    variant: str

    @property
    def layout(self) -> TableLayout:
        """Of the result, whose operands are values here."""
        batch = 1
        for data in (self.q_documents, self.k_documents, self.key_valid):
            if data is not None and batch == 1:
                batch = data.shape[0]
        rows = self.q_length if self.q_positions is None else self.q_positions.shape[0]
        keys = self.inner * sequence.local_length(self.k_length, self.inner * self.degree, self.order)
        least = smallest(self.element, self.head_size, self.v_size, self.variant)
        return TableLayout(batch, rows, keys, self.q_documents is not None, least)

    @property
    def device(self) -> torch.device:
        """Of the operands."""
        given = (self.q_positions, self.k_positions, self.q_documents, self.k_documents, self.key_valid)
        found: torch.device = next(x.device for x in given if x is not None)
        return found


@functools.lru_cache(maxsize=64)
def _every_position(length: int, degree: int, order: str, inner: int, device: torch.device) -> Tensor:
    """int32 [degree, keys of a part]: where the keys of every rank are, -1 for padding."""
    chunk = inner * sequence.chunk_length(length, inner * degree, order)
    offsets = torch.arange(chunk, dtype=torch.int32, device=device)
    starts = torch.tensor([sequence.chunks_of(rank, degree, order) for rank in range(degree)], dtype=torch.int32)
    positions = (starts.to(device)[:, :, None] * chunk + offsets).flatten(1)
    return torch.where(positions < length, positions, -1)


def _tile_tables(*args: Any) -> Tensor:
    call = TileTablesCall.bind(*args)
    layout, device = call.layout, call.device
    q_positions, columns = call.q_positions, call.k_positions
    if q_positions is None:
        q_positions = torch.arange(layout.rows, dtype=torch.int32, device=device)
    q_positions = torch.where(q_positions < call.q_length, q_positions.to(torch.int32), -1)
    if columns is None:
        columns = _every_position(call.k_length, call.degree, call.order, call.inner, device)
    columns = columns.to(torch.int32).view(call.degree, -1)
    k_positions = columns[None]
    if call.key_valid is not None:
        k_positions = torch.where(_ids_at(call.key_valid, columns), columns, -1)
    q_ids = k_ids = None
    if call.q_documents is not None:
        q_numbers, k_numbers = document_numbers(call.q_documents, call.k_documents)
        q_ids, k_ids = _ids_at(q_numbers, q_positions), _ids_at(k_numbers, columns)
    configs = device_configs(device, call.element, call.head_size, call.v_size, call.variant)
    mask = AttentionMask.parse(call.mask)
    return make_tables(layout, configs, mask, Places(q_positions, q_ids), Places(k_positions, k_ids), columns)


def _ids_at(x: Tensor, positions: Tensor) -> Tensor:
    """Columns of [B|1, length] at positions of any shape; those of padding are the first or last."""
    found = x.index_select(1, positions.flatten().clamp(0, x.shape[1] - 1))
    return found.view(x.shape[0], *positions.shape)


def _fake_tile_tables(*args: Any) -> Tensor:
    call = TileTablesCall.bind(*args)
    return torch.empty(call.layout.numbers(call.degree), dtype=torch.int32, device=call.device)


_LIBRARY.impl("tile_tables", _tile_tables, "CompositeExplicitAutograd")
torch.library.register_fake("spx::tile_tables", _fake_tile_tables, lib=_LIBRARY)
