"""Axis dp with one entry on every rank: the batch is a dim of size 1 there, as shared and unit dims are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spcompile
from spcompile import models
from spcompile.diagnostics import BatchNotSplit
from spcompile.machine.mesh import MeshShape
from spcompile.options import Options
from spcompile.passes import PIPELINE
from spcompile.program.trace import compile_for, through_dynamo
from spcompile.program.whole_batch import over_whole_batch

IGNORED = -100
S, D = 6, 4


class Entries(nn.Module):
    """One attention with one head over [B, S, D], then what `end` makes of the entries."""

    def __init__(self, end: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.end = end
        self.w_DD = nn.Parameter(torch.randn(D, D, dtype=torch.float64))

    def forward(self, x_BSD: Tensor, **others: Tensor) -> Tensor:
        h_B1SD = (x_BSD @ self.w_DD).unsqueeze(1)
        y_BSD = F.scaled_dot_product_attention(h_B1SD, h_B1SD, h_B1SD, others.get("mask_11SS")).squeeze(1)
        return self.end(y_BSD, self.w_DD, **others)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))


def verify(end: Callable[..., Any], mesh: dict[str, int] | None = None, **others: Tensor) -> Any:
    mesh = mesh or {"dp": 2}
    return spcompile.verify(Entries(end), {"x_BSD": random(mesh["dp"], S, D), **others}, mesh=mesh)


def mean(y_BSD: Tensor, w_DD: Tensor, **_: Tensor) -> Tensor:
    return y_BSD.square().mean()


def mean_of_entries(y_BSD: Tensor, w_DD: Tensor, **_: Tensor) -> Tensor:
    return y_BSD.mean((0, 1)).square().sum()


def squared_sum_of_tokens(y_BSD: Tensor, w_DD: Tensor, **_: Tensor) -> Tensor:
    """Sums within an entry are not sums over ranks, also where the batch stands beside another dim of 1."""
    return y_BSD.unsqueeze(1).sum(1).sum(1).square().sum()


def flattened(y_BSD: Tensor, w_DD: Tensor, **_: Tensor) -> Tensor:
    z_TD = y_BSD.view(-1, D) @ w_DD
    return z_TD.view(y_BSD.shape).sum(1).square().mean() + z_TD.view(-1, S, 2, D // 2).sum(2).square().sum()


def with_class_token(y_BSD: Tensor, w_DD: Tensor, **_: Tensor) -> Tensor:
    tokens_B1D = w_DD[:1].expand(y_BSD.shape[0], 1, D)
    return torch.cat([tokens_B1D, y_BSD], 1).sum(1).square().sum()


def shifted(y_BSD: Tensor, w_DD: Tensor, **_: Tensor) -> Tensor:
    """Written into zeros, as decoders shift their labels."""
    z_BSD = y_BSD.new_zeros(y_BSD.shape)
    z_BSD[:, 1:] = y_BSD[:, :-1]
    z_BSD[:, 0] = 2.0
    return (z_BSD @ w_DD).square().mean()


def weighted(y_BSD: Tensor, w_DD: Tensor, weight_B: Tensor) -> Tensor:
    return (y_BSD.sum((1, 2)) * weight_B).sum()


def scaled(y_BSD: Tensor, w_DD: Tensor, scale_1: Tensor, bias_1D: Tensor) -> Tensor:
    return (y_BSD * scale_1 + bias_1D).square().sum()


@pytest.mark.thinned(19)
@pytest.mark.parametrize("end", [mean, mean_of_entries, squared_sum_of_tokens, flattened, with_class_token, shifted])
@pytest.mark.parametrize("mesh", [{"dp": 2}, {"cp": 2, "dp": 3}])
def test_sums_over_entries_are_sums_over_ranks(end: Callable[..., Tensor], mesh: dict[str, int]) -> None:
    report = verify(end, mesh)
    assert report.ok, str(report)


def test_a_entry_of_its_own_beside_the_batch() -> None:
    report = verify(weighted, weight_B=random(2))
    assert report.ok, str(report)


@pytest.mark.thinned(6)
def test_shared_inputs_with_a_dim_of_1() -> None:
    for end, others in (
        (mean, {"mask_11SS": random(1, 1, S, S)}),
        (scaled, {"scale_1": random(1), "bias_1D": random(1, D)}),
    ):
        report = verify(end, **others)
        assert report.ok, str(report)


def over_a_count(y_BSD: Tensor, w_DD: Tensor, count_1: Tensor) -> Tensor:
    """A loss, [1], as trainers have it that count the labels of all ranks."""
    return y_BSD.square().sum() / count_1.to(y_BSD.dtype).clamp(min=1)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("mesh", [{"dp": 2}, {"dp": 2, "cp": 2}], ids=str)
def test_a_count_that_a_total_is_divided_by_is_shared(mesh: dict[str, int]) -> None:
    report = verify(over_a_count, mesh, count_1=torch.tensor([7]))
    assert report.ok, str(report)


def divided_by_the_weights(y_BSD: Tensor, w_DD: Tensor, weight_1S: Tensor) -> Tensor:
    return (y_BSD.sum(2) * weight_1S).sum() / weight_1S.sum()


def through_the_weights(y_BSD: Tensor, w_DD: Tensor, weight_1D: Tensor) -> tuple[Tensor, Tensor]:
    return y_BSD.square().sum(), weight_1D @ w_DD


@pytest.mark.parametrize("end", [divided_by_the_weights, through_the_weights])
def test_entries_or_shared_is_refused_where_it_matters(end: Callable[..., Tensor]) -> None:
    name, shape = ("weight_1S", (1, S)) if end is divided_by_the_weights else ("weight_1D", (1, D))
    with pytest.raises(BatchNotSplit, match="one that all ranks share") as caught:
        verify(end, **{name: random(*shape)})
    assert name.lower() in str(caught.value)
    assert "test_one_entry.py" in str(caught.value)


def squeezed_weights(y_BSD: Tensor, w_DD: Tensor, weight_1S: Tensor) -> Tensor:
    weight_S = weight_1S.squeeze(0)
    return (y_BSD.sum(2) * weight_S).sum() / weight_S.sum()


def test_an_input_without_its_entry_is_not_taken_for_shared() -> None:
    with pytest.raises(BatchNotSplit, match="squeeze"):
        verify(squeezed_weights, weight_1S=random(1, S))


def squeezed(y_BSD: Tensor, w_DD: Tensor) -> Tensor:
    return y_BSD.squeeze(0).square().sum() if y_BSD.shape[0] == 1 else y_BSD.square().sum()


def first(y_BSD: Tensor, w_DD: Tensor) -> Tensor:
    return y_BSD[0].square().sum()


def any_of_two(y_BSD: Tensor, w_DD: Tensor) -> Tensor:
    return y_BSD.sum(2).view(1, y_BSD.shape[0], S).square().sum() if y_BSD.shape[0] == 1 else y_BSD.square().sum()


def sequence_first(y_BSD: Tensor, w_DD: Tensor) -> Tensor:
    return y_BSD.transpose(0, 1).reshape(S * y_BSD.shape[0], D).cumsum(0).sum()


def sorted_entries(y_BSD: Tensor, w_DD: Tensor) -> Tensor:
    return y_BSD.sort(0).values.sum()


@pytest.mark.thinned(4)
@pytest.mark.parametrize("end", [first, sequence_first, sorted_entries])
def test_what_cannot_be_followed_is_gathered_with_its_line(end: Callable[..., Tensor]) -> None:
    report = verify(end)
    assert report.ok, str(report)
    assert "test_one_entry.py" in str(next(remark for remark in report.remarks if remark.code == "SPR107"))


@pytest.mark.thinned(2)
@pytest.mark.parametrize("end", [squeezed, any_of_two])
def test_a_batch_of_one_entry_is_none(end: Callable[..., Tensor]) -> None:
    """What a model does with a single entry is not what it does with the entries of all ranks."""
    report = verify(end)
    assert report.ok, str(report)


class Attention(nn.Module):
    """torch's own: it works on [S, B, D], and flattens that with the batch behind the sequence."""

    def __init__(self, needs_weights: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True, dtype=torch.float64)
        self.head = nn.Linear(D, D, dtype=torch.float64)
        self.needs_weights = needs_weights

    def forward(self, x_BSD: Tensor) -> Tensor:
        y_BSD = self.attention(x_BSD, x_BSD, x_BSD, need_weights=self.needs_weights)[0]
        return self.head(x_BSD + y_BSD).square().mean()


@pytest.mark.thinned(8)
@pytest.mark.parametrize("needs_weights", [False, True])
@pytest.mark.parametrize("mesh", [{"dp": 2}, {"cp": 2, "dp": 2}])
def test_multihead_attention(needs_weights: bool, mesh: dict[str, int]) -> None:
    report = spcompile.verify(Attention(needs_weights), {"x_BSD": random(2, S, D)}, mesh=mesh)
    assert report.ok, str(report)


class Latents(nn.Module):
    """Queries that are parameters, repeated for the batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.latents_LD = nn.Parameter(torch.randn(3, D, dtype=torch.float64))
        self.weights = nn.ModuleList(nn.Linear(D, D, dtype=torch.float64) for _ in "qkv")

    def forward(self, x_BSD: Tensor) -> Tensor:
        latents_BLD = self.latents_LD.expand(x_BSD.shape[0], -1, -1)
        given = (latents_BLD, x_BSD, x_BSD)
        q, k, v = (w(x).unflatten(-1, (2, -1)).transpose(1, 2) for w, x in zip(self.weights, given, strict=True))
        return (latents_BLD + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)).square().mean()


@pytest.mark.thinned(2)
def test_queries_that_are_no_input() -> None:
    report = spcompile.verify(Latents(), {"x_BSD": random(2, S, D)}, mesh={"dp": 2})
    assert report.ok, str(report)


class SequenceFirst(Attention):
    def forward(self, x_SBD: Tensor) -> Tensor:
        return super().forward(x_SBD.transpose(0, 1))


@pytest.mark.thinned(2)
def test_verify_cuts_the_first_dim_only() -> None:
    with pytest.raises(BatchNotSplit, match=r"x_sbd_ has the batch in dim 1"):
        spcompile.verify(SequenceFirst(False), {"x_SBD": random(2 * S, 3, D)}, mesh={"dp": 2})


def by_tokens(y_BSD: Tensor, w_DD: Tensor) -> Tensor:
    """Behind the sequence and back, and what joins two values in such dims, and a sum over tokens."""
    entries = y_BSD.shape[0]
    z_TD = y_BSD.transpose(0, 1).reshape(S * entries, D) @ w_DD
    joined_TD = z_TD + y_BSD.transpose(0, 1).reshape(-1, D)
    return joined_TD.view(S, entries, D).square().mean(1).sum() + joined_TD.square().sum()


def by_heads(y_BSD: Tensor, w_DD: Tensor) -> Tensor:
    z_SND = y_BSD.transpose(0, 1).reshape(S, y_BSD.shape[0] * 2, D // 2).tanh()
    return z_SND.transpose(0, 1).reshape(y_BSD.shape[0], 2, S, D // 2).square().sum()


def mean_of_heads(y_BSD: Tensor, w_DD: Tensor) -> Tensor:
    z_SND = y_BSD.transpose(0, 1).reshape(S, y_BSD.shape[0] * 2, D // 2)
    return z_SND.mean(1).square().sum()


@pytest.mark.thinned(4)
@pytest.mark.parametrize("end", [by_tokens, by_heads, mean_of_heads])
def test_dims_that_hold_the_batch_behind_something_else(end: Callable[..., Tensor]) -> None:
    report = verify(end)
    assert report.ok, str(report)


def different_places(y_BSD: Tensor, w_DD: Tensor) -> Tensor:
    z_TD = y_BSD.transpose(0, 1).reshape(-1, D) + y_BSD.reshape(-1, D)
    return z_TD.square().sum()


def test_dims_that_hold_the_batch_in_other_places() -> None:
    report = verify(different_places)
    assert report.ok, str(report)
    assert "SPR107" in {remark.code for remark in report.remarks}


@pytest.mark.thinned(25)
@pytest.mark.parametrize("model", ["gpt-tiny", "llama-tiny", "bert-tiny"])
def test_models_with_other_numbers_of_valid_tokens(model: str) -> None:
    ids_BS = torch.randint(0, 64, (2, 13), generator=torch.Generator().manual_seed(0))
    labels_BS = ids_BS.clone()
    labels_BS[0, :7] = IGNORED
    report = spcompile.verify(
        models.build(model).double(), {"ids_BS": ids_BS, "labels_BS": labels_BS}, mesh={"dp": 2, "cp": 2}
    )
    assert report.ok, str(report)


@pytest.mark.thinned(6)
def test_outputs_are_each_ranks_own_entry() -> None:
    ids_BS = torch.randint(0, 64, (2, 13), generator=torch.Generator().manual_seed(0))
    report = spcompile.verify(models.build("gpt-tiny").double(), {"ids_BS": ids_BS}, mesh={"dp": 2, "cp": 2})
    assert report.ok, str(report)


@pytest.mark.slow
@pytest.mark.thinned(4)
@pytest.mark.parametrize("others", ["padding", "positions of all entries"])
def test_hugging_face_llama(others: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, **sizes)).double()
    inputs = {"input_ids": torch.randint(0, 32, (2, 11), generator=torch.Generator().manual_seed(1))}
    inputs["labels"] = inputs["input_ids"].clone()
    if others == "padding":
        inputs["attention_mask"] = torch.ones(2, 11, dtype=torch.long)
        inputs["attention_mask"][1, 7:] = 0
        inputs["labels"][1, 7:] = IGNORED
    if others == "positions of all entries":
        inputs["position_ids"] = torch.arange(11)[None] + 3
    report = spcompile.verify(model, inputs, mesh={"dp": 2})
    assert report.ok, str(report)


@pytest.mark.thinned(10)
@pytest.mark.parametrize("model", ["gpt-tiny", "llama-tiny"])
def test_a_symbolic_length(model: str) -> None:
    """The entries are followed beside a length that is a symbol, and that stays one."""

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> None:
        traced = compile_for(gm, inputs, MeshShape.of({"dp": 2}), Options(), PIPELINE)
        logits = next(output for output in traced.program.outputs if output.dims)
        found.append(logits.shape)

    found: list[Any] = []
    ids_BS = torch.randint(0, 64, (1, 13))
    torch._dynamo.mark_dynamic(ids_BS, 1)
    through_dynamo(models.build(model), {"ids_BS": ids_BS}, over_whole_batch(backend, 2))
    ((entries, length, _),) = found
    assert entries == 2
    assert isinstance(length, torch.SymInt)
