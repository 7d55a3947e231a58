"""recognize-mask: masks over data, which are key padding and documents, with numerics of the whole graph."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from mask_graphs import (
    DOCUMENTS,
    LEFT,
    LENGTH,
    LENGTHS,
    POSITIONS,
    STARTS,
    VALID,
    attend,
    indices,
    lowest_unless,
    packed,
)
from recognition import qkv, rewrite
from torch import Tensor

from spcompile import verify

INF = math.inf
KEYS: dict[str, tuple[Callable[..., Tensor], Tensor]] = {
    "bool mask": (lambda m, q: m[:, None, None, :], VALID),
    "bool mask, left": (lambda m, q: m[:, None, None, :], LEFT),
    "int mask": (lambda m, q: m[:, None, None, :].bool(), VALID.long()),
    "int mask, expanded": (lambda m, q: (m[:, None, None, :] != 0).expand(2, 1, LENGTH, LENGTH), LEFT.int()),
    "lengths": (lambda m, q: (torch.arange(LENGTH) < m[:, None])[:, None, None, :], LENGTHS),
    "transposed": (lambda m, q: m.t()[:, None, None, :], VALID.t().contiguous()),
    "longer mask": (lambda m, q: m[:, None, None, :LENGTH], torch.cat([LEFT, LEFT], 1)),
    "two masks": (lambda m, q: (m & (torch.arange(LENGTH) != 3))[:, None, None, :], VALID),
    "padding id": (lambda m, q: m.ne(0).unsqueeze(1).unsqueeze(2), VALID * torch.arange(5, 17)),
    "additive": (lambda m, q: torch.zeros(2, 1, 1, LENGTH, dtype=q.dtype).masked_fill(~m[:, None, None], -INF), LEFT),
    "by index": (lambda m, q: m[torch.arange(2)[:, None, None, None], torch.arange(LENGTH)[None, None, None]], VALID),
    "4-D": (lambda m, q: m, VALID[:, None, None]),
}


@pytest.mark.thinned(10)
@pytest.mark.parametrize("name", KEYS)
@pytest.mark.parametrize("causal", [False, True])
def test_key_padding(name: str, causal: bool) -> None:
    build, data = KEYS[name]

    def model(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        mask = build(m, q)
        if not causal:
            return attend(q, k, v, mask)
        i, j = indices(q, k)
        return attend(q, k, v, (j <= i) & mask if mask.dtype == torch.bool else torch.where(j <= i, mask, -INF))

    found = rewrite(model, (*qkv(), data))
    assert str(found.mask) == ("causal key_padding" if causal else "key_padding")
    assert found.attentions[0].args[7].meta["val"].shape == (2, LENGTH)  # type: ignore[union-attr]
    assert (LENGTH, LENGTH) not in {size[-2:] for size in found.sizes()}


IDS: dict[str, Callable[[Tensor], Tensor]] = {
    "end belongs to its document": lambda ends: ends.long().cumsum(1) - ends.long(),
    "padding has none": lambda ends: torch.where(ends.roll(1, 1), -1, ends.cumsum(1)),
}


@pytest.mark.parametrize("name", IDS)
def test_documents_whose_ids_are_a_choice(name: str) -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, ends: Tensor) -> Tensor:
        i, j = indices(q, k)
        ids = IDS[name](ends)
        return attend(q, k, v, ((ids[:, :, None] == ids[:, None, :]) & (j <= i))[:, None])

    found = rewrite(model, (*qkv(), torch.rand(2, LENGTH) < 0.3))
    assert found.masks == ["causal documents"]
    assert not found.remarks.rows


def test_integers_that_a_large_number_is_multiplied_with_are_taken_for_bits() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        return attend(q, k, v, ((1.0 - m[:, None, None, :].to(q.dtype)) * -1e9).expand(-1, 1, LENGTH, -1))

    found = rewrite(model, (*qkv(), VALID.long()))
    assert found.masks == ["documents fill=-1000000000.0"]
    assert found.codes == ["SPR207"]


def test_finite_fills_average_the_values_of_rows_without_keys() -> None:
    """The gradients are those of the formula; the flash kernel has others, since its log-sum-exp loses log(T)."""

    def model(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        i, j = indices(q, k)
        mask = (j <= i) & m[:, None, None, :]
        return attend(q, k, v, lowest_unless(mask))

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        found = rewrite(model, (*qkv(), LEFT))
    assert str(found.mask) == "causal key_padding"
    assert not found.remarks.rows
    assert (LENGTH, LENGTH) not in {size[-2:] for size in found.sizes()}


def test_finite_fill_with_documents_has_a_key_in_every_row() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, d: Tensor) -> Tensor:
        i, j = indices(q, k)
        mask = (j <= i) & (d[:, None, :, None] == d[:, None, None, :])
        return attend(q, k, v, lowest_unless(mask))

    assert str(rewrite(model, (*qkv(), DOCUMENTS)).mask) == "causal documents"


@pytest.mark.thinned(3)
@pytest.mark.parametrize("written_out", [False, True])
def test_a_mask_of_the_caller(written_out: bool) -> None:
    """It is an input, so no line of the model made it."""

    class Masked(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = torch.nn.Linear(4, 24, dtype=torch.float64)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            q, k, v = self.heads(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            scores = torch.where(mask, q @ k.mT / 2, -INF)
            return scores.softmax(-1) @ v if written_out else attend(q, k, v, mask)

    x = torch.randn(2, LENGTH, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    report = verify(Masked(), {"x": x, "mask": VALID[:, None, None, :]}, mesh={"cp": 2})
    assert report.ok, str(report)
    assert "SPR201" not in {remark.code for remark in report.remarks}


def test_documents() -> None:
    found = rewrite(lambda q, k, v, d: attend(q, k, v, d[:, None, :, None] == d[:, None, None, :]), (*qkv(), DOCUMENTS))
    assert str(found.mask) == "documents"
    assert found.attentions[0].args[5] is found.attentions[0].args[6]


@pytest.mark.thinned(2)
def test_two_kinds_of_documents_are_paired() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, d: Tensor, e: Tensor) -> Tensor:
        same = (d[:, None, :, None] == d[:, None, None, :]) & (e[:, None, :, None] == e[:, None, None, :])
        return attend(q, k, v, same)

    found = rewrite(model, (*qkv(), DOCUMENTS, -(torch.arange(LENGTH) // 3)[None].expand(2, -1).contiguous()))
    assert str(found.mask) == "documents"


@pytest.mark.thinned(3)
@pytest.mark.parametrize("starts", STARTS)
def test_packed_positions(starts: str) -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
        p_q, p_k, same = packed(p, STARTS[starts])
        return attend(q, k, v, (p_k <= p_q) & (p_q - p_k < 5) & same)

    assert str(rewrite(model, (*qkv(), POSITIONS)).mask) == "causal window=5 documents"


NOT_PACKED: dict[str, Callable[[Tensor], Tensor]] = {
    "falls only": lambda p: torch.diff(p, prepend=p[:, :1] - 1) < 0,
    "zero only": lambda p: p == 0,
    "and": lambda p: (torch.diff(p, prepend=p[:, :1] - 1) != 1) & (p == 0),
    "step of two": lambda p: torch.diff(p, prepend=p[:, :1] - 1) != 2,
    "signed": lambda p: torch.diff(p, prepend=p[:, :1] - 1) - 1,
}


@pytest.mark.thinned(3)
@pytest.mark.parametrize("starts", NOT_PACKED)
def test_positions_that_need_not_grow_by_one_are_not_indices(starts: str) -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
        p_q, p_k, same = packed(p, NOT_PACKED[starts])
        return attend(q, k, v, (p_k <= p_q) & same)

    found = rewrite(model, (*qkv(), POSITIONS))
    assert found.masks == ["documents + bias"]
    assert found.codes == ["SPR201"]


def test_positions_that_are_a_range_vanish() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        positions = (torch.arange(q.shape[2])[None] + 3).expand(2, -1)
        p_q, p_k, same = packed(positions, STARTS["diff, prepended"])
        return attend(q, k, v, (p_k <= p_q) & same)

    assert str(rewrite(model, qkv()).mask) == "causal"
