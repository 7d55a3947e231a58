"""recognize-mask: hand-written masks, with numerics of the whole graph."""

from __future__ import annotations

import math
from collections.abc import Callable

import expecttest
import pytest
import torch
import torch.nn.functional as F
from mask_graphs import DOCUMENTS, LENGTH, LENGTHS, POSITIONS, STARTS, VALID, attend, indices, lowest_unless, packed
from recognition import qkv, rewrite
from torch import Tensor

from spcompile import verify
from spcompile.passes.meaning.recognize_mask import EXAMPLES

INF = math.inf


class TestGoldenText(expecttest.TestCase):
    maxDiff = None

    def test_packed_window(self) -> None:
        self.assertExpectedInline(
            rewrite(EXAMPLES[0].function, EXAMPLES[0].inputs()).text,
            """\
l_positions_: "i64[2, 12]" = input
l_q_: "f64[2, 2, 12, 4]" = input
l_k_: "f64[2, 2, 12, 4]" = input
l_v_: "f64[2, 2, 12, 4]" = input
slice_1: "i64[2, 1]" = aten.slice(l_positions_, 1, 0, 1)
sub: "i64[2, 1]" = aten.sub(slice_1, 1)
diff: "i64[2, 12]" = aten.diff(l_positions_, 1, -1, sub)
ne: "b8[2, 12]" = aten.ne(diff, 1)
cumsum: "i64[2, 12]" = aten.cumsum(ne, -1)
attention_default: "(f64[2, 2, 12, 4], f64[2, 2, 12])" = spx.attention(l_q_, l_k_, l_v_, None, None, cumsum, cumsum, None, None, 'causal window=4 documents', 0.5)
getitem: "f64[2, 2, 12, 4]" = attention_default[0]
return (getitem,)
""",  # noqa: E501
        )

    def test_padded(self) -> None:
        self.assertExpectedInline(
            rewrite(EXAMPLES[1].function, EXAMPLES[1].inputs()).text,
            """\
l_q_: "f64[2, 2, 12, 4]" = input
l_k_: "f64[2, 2, 12, 4]" = input
l_attention_mask_: "i64[2, 12]" = input
l_v_: "f64[2, 2, 12, 4]" = input
ne_scalar: "b8[2, 12]" = aten.ne(l_attention_mask_, 0)
attention_default: "(f64[2, 2, 12, 4], f64[2, 2, 12])" = spx.attention(l_q_, l_k_, l_v_, None, None, None, None, ne_scalar, None, 'causal key_padding', 0.5)
getitem: "f64[2, 2, 12, 4]" = attention_default[0]
return (getitem,)
""",  # noqa: E501
        )

    def test_part_of_a_mask(self) -> None:
        def model(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
            i, j = indices(q, k)
            return attend(q, k, v, (j <= i) & allowed)

        self.assertExpectedInline(
            rewrite(model, (*qkv(), torch.rand(2, 1, LENGTH, LENGTH) < 0.7)).text,
            """\
l_q_: "f64[2, 4, 12, 6]" = input
l_k_: "f64[2, 4, 12, 6]" = input
l_allowed_: "b8[2, 1, 12, 12]" = input
l_v_: "f64[2, 4, 12, 6]" = input
attention_default: "(f64[2, 4, 12, 6], f64[2, 4, 12])" = spx.attention(l_q_, l_k_, l_v_, None, None, None, None, None, l_allowed_, 'causal', 0.4082482904638631)
getitem: "f64[2, 4, 12, 6]" = attention_default[0]
return (getitem,)
""",  # noqa: E501
        )


# Masks over positions alone: (name of the result, the mask from q and k).
POSITIONAL: list[tuple[str, Callable[[Tensor, Tensor], Tensor]]] = [
    ("full", lambda q, k: torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)),
    ("full", lambda q, k: torch.zeros(q.shape[2], k.shape[2], dtype=q.dtype)),
    ("causal", lambda q, k: torch.tril(torch.ones(q.shape[2], k.shape[2])).bool()),
    ("causal", lambda q, k: torch.tril(torch.ones(1, 1, q.shape[2], k.shape[2])) == 1),
    ("causal", lambda q, k: ~torch.triu(torch.ones(q.shape[2], k.shape[2], dtype=torch.bool), diagonal=1)),
    ("causal", lambda q, k: torch.triu(torch.full((q.shape[2], k.shape[2]), -INF, dtype=q.dtype), diagonal=1)),
    ("causal", lambda q, k: torch.full((q.shape[2], k.shape[2]), -1e9, dtype=q.dtype).triu(1)),
    ("causal", lambda q, k: torch.arange(k.shape[2])[None, :] <= torch.arange(q.shape[2])[:, None]),
    ("causal", lambda q, k: indices(q, k)[0] - indices(q, k)[1] >= 0),
    ("causal", lambda q, k: ~(indices(q, k)[1] > indices(q, k)[0])),
    ("causal", lambda q, k: indices(q, k)[1].lt(indices(q, k)[0] + 1)),
    ("causal", lambda q, k: (1 - (indices(q, k)[1] <= indices(q, k)[0]).to(q.dtype)) * torch.finfo(q.dtype).min),
    ("causal", lambda q, k: lowest_unless(indices(q, k)[1] <= indices(q, k)[0])),
    ("causal", lambda q, k: torch.zeros(12, 12, dtype=q.dtype).masked_fill(indices(q, k)[1] > indices(q, k)[0], -INF)),
    ("causal offset=-1", lambda q, k: torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(-1)),
    ("causal offset=2", lambda q, k: torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(2)),
    (
        "causal window=4",
        lambda q, k: (indices(q, k)[1] <= indices(q, k)[0]) & (indices(q, k)[0] - indices(q, k)[1] < 4),
    ),
    ("causal window=4", lambda q, k: torch.ones(12, 12).tril().bool() * torch.ones(12, 12).triu(-3).bool()),
    ("causal window=4", lambda q, k: torch.ones(12, 12).tril().triu(-3) != 0),
    ("causal window=4", lambda q, k: ~(torch.ones(12, 12).tril() * torch.ones(12, 12).triu(-3) == 0)),
    ("causal window=100", lambda q, k: torch.ones(12, 12).tril().bool() & torch.ones(12, 12).triu(-99).bool()),
    (
        "causal window=5",
        lambda q, k: (
            torch.full((12, 12), -INF, dtype=q.dtype).triu(1) + torch.full((12, 12), -INF, dtype=q.dtype).tril(-5)
        ),
    ),
    ("window=3 window_right=3", lambda q, k: (indices(q, k)[0] - indices(q, k)[1]).abs() < 3),
    ("window=3 window_right=3", lambda q, k: (indices(q, k)[0] - indices(q, k)[1]).neg().abs() <= 2),
    ("window=4 window_right=2", lambda q, k: torch.ones(12, 12).triu(-3).tril(1).bool()),
    ("chunk=4", lambda q, k: indices(q, k)[0] // 4 == indices(q, k)[1] // 4),
    (
        "causal chunk=5",
        lambda q, k: (
            (indices(q, k)[0].div(5, rounding_mode="floor") == indices(q, k)[1] // 5) & torch.ones(12, 12).tril().bool()
        ),
    ),
    ("causal prefix=5", lambda q, k: (indices(q, k)[1] <= indices(q, k)[0]) | (indices(q, k)[1] < 5)),
    (
        "causal documents",
        lambda q, k: (indices(q, k)[1] <= indices(q, k)[0]) & (indices(q, k)[0] % 3 == indices(q, k)[1] % 3),
    ),
    (
        "causal window=4",
        lambda q, k: torch.cat(
            [
                torch.ones(12, 12).tril().triu(-3).bool()[:4],
                (indices(q, k)[0][4:] - indices(q, k)[1] < 4) & (indices(q, k)[0][4:] >= indices(q, k)[1]),
            ]
        ),
    ),
]


@pytest.mark.thinned(10)
@pytest.mark.parametrize("case", range(len(POSITIONAL)))
def test_positional_masks(case: int) -> None:
    expected, build = POSITIONAL[case]
    found = rewrite(lambda q, k, v: attend(q, k, v, build(q, k)), qkv())
    assert str(found.mask) == expected
    assert (LENGTH, LENGTH) not in {size[-2:] for size in found.sizes()}, found.text
    assert not found.remarks.rows


def test_queries_that_are_fewer_than_keys() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = indices(q, k)
        return attend(q, k, v, j <= i + (k.shape[2] - q.shape[2]))

    assert str(rewrite(model, qkv(queries=5, keys=12)).mask) == "causal offset=7"


def test_one_sequence() -> None:
    inputs = tuple(x[:1].detach().requires_grad_() for x in qkv())
    valid = (torch.arange(LENGTH) < 9)[None]
    found = rewrite(
        lambda q, k, v, m: attend(q, k, v, m[:, None, None, :] & torch.ones(12, 12).tril().bool()), (*inputs, valid)
    )
    assert str(found.mask) == "causal key_padding"


UNREADABLE: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], list[str]]] = {
    "a dense input": (lambda m, q, k: m, (torch.rand(LENGTH, LENGTH) < 0.8,), ["full + bias"]),
    "a dense input and causal": (
        lambda m, q, k: m & torch.ones(LENGTH, LENGTH).tril().bool(),
        (torch.rand(LENGTH, LENGTH) < 0.8,),
        ["causal + bias"],
    ),
    "neither of two": (
        lambda m, q, k: ~(m | torch.ones(LENGTH, LENGTH).triu(1).bool()),
        (torch.rand(2, 1, LENGTH, LENGTH) < 0.2,),
        ["causal + bias"],
    ),
    "a bias and causal": (
        lambda m, q, k: m + torch.full((LENGTH, LENGTH), -INF, dtype=m.dtype).triu(1),
        (torch.randn(4, LENGTH, LENGTH, dtype=torch.float64).requires_grad_(),),
        ["causal + bias"],
    ),
    "a bias, masked twice": (
        lambda m, q, k: (
            m.masked_fill(~VALID.clone()[:, None, None], -INF) + torch.full((12, 12), -INF).double().triu(1)
        ),
        (torch.randn(1, 4, LENGTH, LENGTH, dtype=torch.float64).requires_grad_(),),
        ["causal key_padding + bias"],
    ),
    "heads that differ": (
        lambda m, q, k: torch.arange(LENGTH)[None, :] <= torch.arange(LENGTH)[:, None] + torch.arange(4)[:, None, None],
        (),
        ["full + bias"],
    ),
    "queries that are invalid": (
        lambda m, q, k: m[:, None, :, None] & m[:, None, None, :],
        (VALID,),
        ["key_padding + bias"],
    ),
    "nothing": (lambda m, q, k: torch.zeros(LENGTH, LENGTH, dtype=torch.bool), (), ["full + bias"]),
    "small fill": (lambda m, q, k: torch.full((LENGTH, LENGTH), -3.0, dtype=q.dtype).triu(1), (), ["full + bias"]),
    "global tokens": (
        lambda m, q, k: (
            (torch.arange(12) < 2)[None] | (torch.arange(12) < 2)[:, None] | torch.ones(12, 12).tril().bool()
        ),
        (),
        ["full + bias"],
    ),
    "indices that wrap": (lambda m, q, k: m[:, torch.arange(LENGTH) - 3][:, None, None, :], (VALID,), ["key_padding"]),
    "narrow integers wrap": (
        lambda m, q, k: (torch.arange(12)[:, None].to(torch.uint8) - torch.arange(12).to(torch.uint8)) < 5,
        (),
        ["full + bias"],
    ),
}


@pytest.mark.thinned(7)
@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_stays_dense(name: str) -> None:
    build, data, expected = UNREADABLE[name]
    model = lambda q, k, v, *m: attend(q, k, v, build(m[0] if m else None, q, k))  # noqa: E731
    found = rewrite(model, (*qkv(), *data))
    assert found.masks == expected
    assert bool(found.remarks.rows) == ("bias" in expected[0])


TRIL = torch.ones(64, 64).tril()
WINDOW = torch.ones(64, 64, dtype=torch.bool).tril().triu(-4)
BUFFERS = {  # a buffer, how scores take a part of it, the mask
    "bools": (TRIL.bool(), lambda s, m: s.masked_fill(~m, -INF), "causal"),
    "ones and zeros": (TRIL, lambda s, m: s.masked_fill(m == 0, -INF), "causal"),
    "integers": (TRIL.int(), lambda s, m: s.masked_fill(m < 1, -INF), "causal"),
    "true where masked": (TRIL == 0, lambda s, m: s.masked_fill(m, -INF), "causal"),
    "in four dims": (TRIL[None, None], lambda s, m: s.masked_fill(m == 0, -INF), "causal"),
    "added": (torch.full((64, 64), -INF).triu(1), lambda s, m: s + m, "causal"),
    "added, finite": (torch.full((64, 64), torch.finfo(torch.float32).min).triu(1), lambda s, m: s + m, "causal"),
    "turned into numbers": (TRIL, lambda s, m: s + (1.0 - m) * -1e9, "causal"),
    "a window": (WINDOW.float(), lambda s, m: s.masked_fill(m == 0, -INF), "causal window=5"),
    "all but a window": ((~WINDOW).half(), lambda s, m: s.masked_fill(m != 0, -INF), "causal window=5"),
}


@pytest.mark.thinned(4)
@pytest.mark.parametrize("name", BUFFERS)
def test_a_mask_in_a_buffer_is_read(name: str) -> None:
    values, apply, expected = BUFFERS[name]

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", values)

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            mask = self.mask[..., :LENGTH, :LENGTH]  # type: ignore[index]
            return apply(q @ k.mT * 0.5, mask).softmax(-1) @ v

    found = rewrite(Model(), qkv())
    assert found.masks == [expected]
    assert not found.remarks.rows


def test_vectors_that_cannot_be_written_leave_no_trace() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        even = m.repeat_interleave(2, 1)  # m[b, t // 2]: no slice of m
        return attend(q, k, v, even[:, None, None, :] & (torch.arange(LENGTH) != 3))

    found = rewrite(model, (*qkv(), VALID[:, ::2].contiguous()))
    assert found.masks == ["full + bias"]
    assert found.codes == ["SPR201"]


def test_fewer_queries_than_keys_take_a_part_of_the_documents() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, d: Tensor) -> Tensor:
        return attend(q, k, v, d[:, None, : q.shape[2], None] == d[:, None, None, :])

    found = rewrite(model, (*qkv(queries=5, keys=12), DOCUMENTS))
    assert str(found.mask) == "documents"
    assert [n.meta["val"].shape[1] for n in found.attentions[0].args[5:7]] == [5, 12]  # type: ignore[union-attr]


def test_a_mask_that_is_written_in_place_is_functional_after_capture() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.full((LENGTH, LENGTH), -INF, dtype=q.dtype)
        mask.triu_(1)
        mask.masked_fill_(torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(-3), -INF)
        return attend(q, k, v, mask)

    assert str(rewrite(model, qkv()).mask) == "causal window=3"


def test_layers_share_one_reading() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        mask = (torch.arange(LENGTH) < m[:, None])[:, None, None, :] & torch.ones(LENGTH, LENGTH).tril().bool()
        return attend(attend(q, k, v, mask), k, v, mask)

    first, second = rewrite(model, (*qkv(), LENGTHS)).attentions
    assert first.args[7] is second.args[7]


DYNAMIC: dict[str, tuple[str, Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "causal": ("causal", lambda q, k, *m: indices(q, k)[1] <= indices(q, k)[0], ()),
    "tril": ("causal", lambda q, k, *m: torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(), ()),
    "window": ("window=3 window_right=3", lambda q, k, *m: (indices(q, k)[0] - indices(q, k)[1]).abs() < 3, ()),
    "lengths": ("key_padding", lambda q, k, m: (torch.arange(k.shape[2]) < m[:, None])[:, None, None, :], (LENGTHS,)),
    "parity": ("documents", lambda q, k, *m: indices(q, k)[0] % 3 == indices(q, k)[1] % 3, ()),
    "packed": (
        "causal documents",
        lambda q, k, p: (lambda p_q, p_k, same: (p_k <= p_q) & same)(*packed(p, STARTS["diff, prepended"])),
        (POSITIONS,),
    ),
}


@pytest.mark.thinned(10)
@pytest.mark.parametrize("name", DYNAMIC)
def test_symbolic_lengths(name: str) -> None:
    expected, build, data = DYNAMIC[name]
    own = [x.clone() for x in data]  # their lengths are marked as symbols
    found = rewrite(lambda q, k, v, *m: attend(q, k, v, build(q, k, *m)), (*qkv(), *own), dynamic=2)
    assert str(found.mask) == expected
    assert isinstance(found.attentions[0].meta["val"][0].shape[2], torch.SymInt)


@pytest.mark.thinned(10)
@pytest.mark.parametrize("mesh", [{"cp": 2}, {"tp": 2}], ids=str)
@pytest.mark.parametrize("is_learned", [True, False])
def test_rows_of_a_dense_bias_that_are_one_large_number(is_learned: bool, mesh: dict[str, int]) -> None:
    """They average all values; so in the backward, and where a ring merges blocks."""

    class Masked(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = torch.nn.Linear(8, 24, dtype=torch.float64)

        def forward(self, x_BSD: Tensor, keep_BS: Tensor) -> Tensor:
            B, S, _ = x_BSD.shape
            q, k, v = (t.view(B, S, 2, -1).transpose(1, 2) for t in self.qkv(x_BSD).chunk(3, -1))
            numbers_B1SS = torch.exp(x_BSD[:, None, :, 0])[:, :, None].expand(-1, -1, S, -1)
            seen_B1SS = torch.ones(S, S, dtype=torch.bool).tril() & keep_BS[:, None, None, :]
            bias_B1SS = numbers_B1SS.masked_fill(~seen_B1SS, torch.finfo(torch.float64).min)
            if is_learned:
                return F.scaled_dot_product_attention(q, k, v, attn_mask=bias_B1SS).transpose(1, 2).flatten(2)
            return ((q @ k.mT + bias_B1SS.detach()).softmax(-1) @ v).transpose(1, 2).flatten(2)

    keep_BS = torch.ones(2, 7, dtype=torch.bool)
    keep_BS[1, :3] = False
    x_BSD = torch.randn(2, 7, 8, dtype=torch.float64, requires_grad=True)
    report = verify(Masked(), {"x_BSD": x_BSD, "keep_BS": keep_BS}, mesh=mesh, attention="ring")
    assert report.ok, str(report)
