"""Whole models whose loss becomes spx.linear_cross_entropy: numbers on all ranks, and no logits in any final graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from example_numerics import after_autograd, as_list, assert_equal, on_one_device
from final_graphs import final_graphs
from made_tensors import MadeTensors
from oracle import FLOAT32_INSIDE
from torch import Tensor, nn

import spcompile
from spcompile.command.model_spec import build_model
from spcompile.losses.linear_loss_call import LinearCrossEntropyBackwardCall, LinearCrossEntropyCall
from spcompile.machine.accelerators import Accelerator
from spcompile.machine.mesh import MeshShape
from spcompile.report.verify_report import Report
from spcompile.schedule.op_cost import CostModel

B, D, C = 4, 8, 400
MESHES = [{"cp": 2}, {"cp": 3}, {"tp": 2}, {"tp": 3}, {"dp": 2}, {"tp": 2, "cp": 2}]


class Decoder(nn.Module):
    """Embedding, one attention with four heads, a head; tied: the head's weight is the embedding's."""

    def __init__(self, *, tied: bool = False, softcap: float = 0.0, dropout: float = 0.0, bias: bool = False) -> None:
        super().__init__()
        self.tokens, self.qkv, self.norm = nn.Embedding(C, D), nn.Linear(D, 3 * D), nn.LayerNorm(D)
        self.head = nn.Linear(D, C, bias=bias)
        self.softcap, self.dropout = softcap, dropout
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids_BS: Tensor, labels_BS: Tensor) -> Any:
        x_BSD = self.tokens(ids_BS)
        q, k, v = (y.unflatten(-1, (4, -1)).transpose(1, 2) for y in self.qkv(x_BSD).chunk(3, -1))
        y_BSD = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        logits_BSC = self.head(F.dropout(self.norm(x_BSD + y_BSD), self.dropout))
        if self.softcap:
            logits_BSC = self.softcap * torch.tanh(logits_BSC / self.softcap)
        return self.loss(logits_BSC, labels_BS)

    def loss(self, logits_BSC: Tensor, labels_BS: Tensor) -> Any:
        return F.cross_entropy(logits_BSC[:, :-1].flatten(0, 1), labels_BS[:, 1:].flatten())


class AlsoLogits(Decoder):
    """What models of transformers return: the loss and the logits; the loss over a number that the caller counted."""

    def loss(self, logits_BSC: Tensor, labels_BS: Tensor) -> Any:
        total = F.cross_entropy(logits_BSC.float().flatten(0, 1), labels_BS.flatten(), reduction="sum")
        return {"loss": total / 17, "logits": logits_BSC}


class Regularized(Decoder):
    """With label smoothing, class weights and a z-loss."""

    def loss(self, logits_BSC: Tensor, labels_BS: Tensor) -> Any:
        z = logits_BSC.logsumexp(-1).square().mean()
        weights = torch.linspace(0.5, 1.5, C, dtype=logits_BSC.dtype)
        rows = F.cross_entropy(logits_BSC.transpose(1, 2), labels_BS, weights, label_smoothing=0.1)
        return rows + 1e-2 * z


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": Decoder,
    "bias": lambda: Decoder(bias=True),
    "tied": lambda: Decoder(tied=True),
    "softcap": lambda: Decoder(softcap=3.0),
    "dropout": lambda: Decoder(dropout=0.2),
    "regularized": Regularized,
}


def batch(length: int) -> dict[str, Tensor]:
    """Ids and labels, of which most of the first entry are ignored, so that ranks have unequal numbers."""
    generator = torch.Generator().manual_seed(0)
    ids_BS = torch.randint(0, C, (B, length), generator=generator)
    labels_BS = torch.where((torch.arange(length) < 10) & (torch.arange(B) == 0)[:, None], -100, ids_BS)
    return {"ids_BS": ids_BS, "labels_BS": labels_BS}


def made(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build().double()


def agrees(model: nn.Module, inputs: Any, mesh: Mapping[str, int], **options: Any) -> Report:
    report = spcompile.verify(model, inputs, mesh=mesh, compiler="eager", **options)
    assert report.ok, str(report)
    return report


@pytest.mark.thinned(30)
@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_on_all_ranks(name: str, mesh: dict[str, int]) -> None:
    if name == "dropout" and "dp" in mesh:
        pytest.skip("each rank of dp draws its own random numbers")
    agrees(made(MODELS[name]), batch(13), mesh)


@pytest.mark.thinned(4)
def test_one_entry_on_each_rank_of_dp() -> None:
    """Rows and labels of one number of entries: that each rank has its own is certain."""
    given = {name: x[:2] for name, x in batch(13).items()}
    agrees(made(Decoder), given, {"dp": 2})


@pytest.mark.thinned(3)
def test_a_model_that_returns_logits_builds_them_and_says_so() -> None:
    report = agrees(made(AlsoLogits), batch(13), {"cp": 2}, tolerance=1e-6)
    (remark,) = [remark for remark in report.remarks if remark.code == "SPR208"]
    assert f"[{B}, 13, {C}] are built" in remark.text


@pytest.mark.thinned(29)
@pytest.mark.parametrize("mesh", [{"cp": 2}, {"tp": 2}], ids=str)
def test_a_model_that_returns_logits_does_without_them_where_the_caller_does(mesh: dict[str, int]) -> None:
    report = agrees(made(AlsoLogits), batch(13), mesh, outputs="loss", tolerance=1e-6)
    assert not [remark for remark in report.remarks if remark.code == "SPR208"]
    assert len(calls(final_graphs(made(AlsoLogits), tuple(batch(13).values()), mesh)[0])) == 2


def calls(graphs: Mapping[str, fx.GraphModule]) -> list[fx.Node]:
    kinds = (LinearCrossEntropyCall, LinearCrossEntropyBackwardCall)
    return [node for gm in graphs.values() for kind in kinds for node in kind.all_in(gm.graph)]


@pytest.mark.thinned(30)
@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("name", ["plain", "tied", "softcap", "regularized"])
def test_no_value_is_as_large_as_a_ranks_logits(name: str, mesh: dict[str, int]) -> None:
    """In the final graphs, and while they run, also inside of the ops. All else is smaller, scores of attention too."""
    length = 48
    rows = B // mesh.get("dp", 1) * -(-(length - 1) // mesh.get("cp", 1))
    logits = rows * -(-C // mesh.get("tp", 1))
    graphs, plain, inputs = final_graphs(made(MODELS[name]), tuple(batch(length).values()), mesh)
    assert len(calls(graphs)) == 2
    values = [x for gm in graphs.values() for node in gm.graph.nodes for x in tensors(node.meta.get("val"))]
    assert max(x.numel() for x in values) < logits
    if "dp" in mesh:
        return
    expected = on_one_device(lambda *given: as_list(plain(*given)), inputs)
    with MadeTensors() as elements:
        found = after_autograd(graphs["forward"], graphs["backward"], inputs, mesh, "late")
    assert elements.most < logits
    for rank in found:
        assert_equal(rank, expected)


def tensors(value: Any) -> list[Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(value) if isinstance(x, Tensor)]


@pytest.mark.thinned(30)
@pytest.mark.parametrize("mesh", [{"cp": 2}, {"tp": 2, "cp": 2}], ids=str)
def test_lengths_may_be_symbols(mesh: dict[str, int]) -> None:
    given = batch(13)
    for x in given.values():
        torch._dynamo.mark_dynamic(x, 1)
    agrees(made(Decoder), given, mesh)


@pytest.mark.thinned(12)
def test_explain_shows_what_is_saved() -> None:
    model = made(lambda: Decoder(softcap=3.0))
    inputs = batch(64)
    with_op, without = (
        spcompile.explain(model, inputs, mesh={"cp": 2}, compiler="eager", passes=passes).to_dict()["memory"]
        for passes in ({}, {"recognize-linear-loss": False})
    )
    logits = B * 32 * C * 8
    assert without["saved_activation_bytes"] - with_op["saved_activation_bytes"] > 1.5 * logits
    assert without["peak_bytes"] - with_op["peak_bytes"] > 2 * logits


@pytest.mark.thinned(3)
def test_predicted_seconds_count_one_product_more() -> None:
    """Of the head, in the dtype of the rows: four of them in place of three, and no more than that."""
    graphs, _, _ = final_graphs(made(Decoder).bfloat16(), tuple(batch(64).values()), {"cp": 2})
    cost = CostModel(MeshShape.of({"cp": 2}), Accelerator("toy", {2: 1e9, 4: 1e6}, 0.5, 0.5, 1e15, 0.0), {})
    rows = B * 32
    seconds = sum(cost.work(node).seconds for node in calls(graphs))
    assert seconds == pytest.approx(4 * 2 * rows * D * C / (1e9 * 0.5), rel=0.1)


@pytest.mark.slow
@pytest.mark.thinned(24)
@pytest.mark.parametrize("mesh", [{"cp": 3}, {"tp": 2}, {"tp": 2, "cp": 2}], ids=str)
@pytest.mark.parametrize("name", ["hf:llama", "hf:gemma2", "hf:gpt2"])
def test_hugging_face_models(name: str, mesh: dict[str, int]) -> None:
    torch.manual_seed(0)
    built = build_model(name, seq=21, device="cpu", dtype="float64", settings={})
    report = agrees(built.model, built.example_inputs(2, 21, "cpu"), mesh, outputs="loss", tolerance=FLOAT32_INSIDE)
    assert not [remark for remark in report.remarks if remark.code == "SPR208"]
