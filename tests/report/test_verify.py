"""`verify`: right programs agree with the plain model, and of a wrong pass it names the pass and the value."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import Tensor, nn

import spcompile.passes
from spcompile import verify
from spcompile.diagnostics import IllegalModel, IllegalOption, UnknownOption
from spcompile.passes_api import Context, Pass, Stage
from spcompile.report.compare import DRAWN_BY_RANKS

aten, spx = torch.ops.aten, torch.ops.spx
F64 = torch.float64


class Block(nn.Module):
    """One attention layer with a norm, dropouts and a loss; `labels_BS` may be left out."""

    def __init__(
        self, heads: int = 2, width: int = 8, vocab: int = 11, dropout: float = 0.0, attention_dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.heads, self.dropout, self.attention_dropout = heads, dropout, attention_dropout
        self.tokens = nn.Embedding(vocab, width, dtype=F64)
        self.norm = nn.LayerNorm(width, dtype=F64)
        self.qkv = nn.Linear(width, 3 * width, dtype=F64)
        self.head = nn.Linear(width, vocab, dtype=F64)

    def forward(self, ids_BS: Tensor, labels_BS: Tensor | None = None) -> dict[str, Tensor]:
        B, S = ids_BS.shape
        x_BSD = self.tokens(ids_BS)
        q, k, v = (t.view(B, S, self.heads, -1).transpose(1, 2) for t in self.qkv(self.norm(x_BSD)).chunk(3, -1))
        y_BNSH = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.attention_dropout)
        y_BSD = F.dropout(y_BNSH.transpose(1, 2).flatten(2), self.dropout)
        logits_BSV = self.head(x_BSD + y_BSD)
        if labels_BS is None:
            return {"logits": logits_BSV}
        return {"loss": F.cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten()), "logits": logits_BSV}


def batch(length: int = 10, entries: int = 2) -> dict[str, Tensor]:
    labels = torch.randint(11, (entries, length))
    labels[0, : length // 3] = -100
    return {"ids_BS": torch.randint(11, (entries, length)), "labels_BS": labels}


@pytest.mark.thinned(18)
@pytest.mark.parametrize("degree", [1, 2, 3])
@pytest.mark.parametrize("outputs", ["full", "loss", "sharded"])
def test_every_tensor_of_a_right_program_agrees(degree: int, outputs: str) -> None:
    model, inputs = Block(), batch()
    report = verify(model, inputs, mesh={"cp": degree}, attention="ring", outputs=outputs)
    assert report.ok, str(report)
    expected = {("gradient", name) for name, _ in model.named_parameters()} | {("output", "loss")}
    expected |= set() if outputs == "loss" else {("output", "logits")}
    for graph in ("local", "final"):
        assert {(row.kind, row.name) for row in report.rows if row.graph == graph} == expected
    assert max(row.relative for row in report.rows if row.name != "qkv.bias") < 1e-12
    assert report.to_dict()["ok"] is True
    assert "agree" in str(report)


@pytest.mark.thinned(2)
def test_without_a_loss_all_outputs_are_differentiated() -> None:
    inputs = batch(7)
    del inputs["labels_BS"]
    report = verify(Block(), inputs, mesh={"cp": 2}, outputs="sharded")
    assert report.ok, str(report)
    assert {row.name for row in report.rows} >= {"logits", "tokens.weight", "head.bias"}
    with pytest.raises(IllegalOption, match="no loss"):
        verify(Block(), inputs, mesh={"cp": 2}, outputs="loss")


@pytest.mark.thinned(10)
@pytest.mark.parametrize("attention", ["ring", "ulysses"])
@pytest.mark.parametrize("degree", [1, 2])
def test_attention_dropout_is_that_of_one_device(degree: int, attention: str) -> None:
    """Forward, and the backward graph, which must not draw its seeds again."""
    model = Block(dropout=0.5, attention_dropout=0.3)
    report = verify(model, batch(), mesh={"cp": degree}, attention=attention)
    assert report.ok, str(report)
    assert {row.graph for row in report.rows} == {"local", "final"}
    assert any("one device" in note for note in report.notes)


@pytest.mark.thinned(10)
@pytest.mark.parametrize("mesh", [{"cp": 4}, {"cp": 4, "dp": 2}, {"tp": 2, "cp": 4}], ids=str)
def test_a_hybrid_on_parts_of_an_axis(mesh: dict[str, int]) -> None:
    """The graphs before and behind autograd; a length that does not divide, and fewer heads than ranks."""
    dropout = 0.0 if "dp" in mesh else 0.3  # over dp, ranks have other entries
    model = Block(heads=4 if "tp" in mesh else 1, attention_dropout=dropout)
    report = verify(model, batch(entries=4), mesh=mesh, attention={"ulysses": 2, "ring": 2})
    assert report.ok, str(report)
    assert {row.graph for row in report.rows} == {"local", "final"}


@pytest.mark.thinned(2)
def test_dropout_draws_what_the_plain_model_draws() -> None:
    report = verify(Block(dropout=0.5), batch(), mesh={"cp": 2})
    assert report.ok, str(report)


@pytest.mark.thinned(6)
def test_dropout_over_dp_differs_and_a_note_says_why() -> None:
    report = verify(Block(dropout=0.5), batch(entries=4), mesh={"dp": 2})
    assert not report.ok
    assert DRAWN_BY_RANKS in report.notes


@pytest.mark.thinned(2)
def test_inference_compares_outputs_only() -> None:
    with torch.no_grad():
        report = verify(Block(), batch(), mesh={"cp": 2})
    assert report.ok, str(report)
    assert {row.kind for row in report.rows} == {"output"}


@pytest.mark.thinned(2)
def test_the_model_and_the_generator_are_left_as_they_were() -> None:
    model, inputs = Block(dropout=0.5), batch()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    state = torch.get_rng_state()
    verify(model, inputs, mesh={"cp": 2})
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_weights_without_data_are_refused() -> None:
    with torch.device("meta"):
        model = Block()
    with pytest.raises(IllegalModel, match="real weights"):
        verify(model, batch(), mesh={"cp": 2})
    with pytest.raises(UnknownOption):
        verify(Block(), batch(), mesh={"cp": 2}, atention="ring")


@dataclass(frozen=True)
class Sabotage(Pass):
    """Changes the second argument of the first call of an op, in the graph of one stage."""

    name: ClassVar[str] = "sabotage"
    stage: ClassVar[Stage] = Stage.GLOBAL
    target: Any = None
    change: Any = None

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        node = next(n for n in gm.graph.nodes if n.target is self.target)
        self.change(node)
        gm.recompile()
        return 1


class LocalSabotage(Sabotage):
    stage = Stage.LOCAL


class ScheduleSabotage(Sabotage):
    stage = Stage.SCHEDULE

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        return super().run(gm, ctx) if any(n.target is self.target for n in gm.graph.nodes) else 0


def broken_pipeline(monkeypatch: pytest.MonkeyPatch, after: str, sabotage: Pass) -> None:
    passes = list(spcompile.passes.PIPELINE)
    at = next(i for i, p in enumerate(passes) if p.name == after) + 1
    monkeypatch.setattr(spcompile.passes, "PIPELINE", (*passes[:at], sabotage, *passes[at:]))


def scale_mask(node: fx.Node) -> None:
    node.args = (*node.args[:-1], node.args[-1] * 1.01)


def drop_vary(node: fx.Node) -> None:
    """What the verifier of graphs would refuse: a vary that is another op with the same value and no sum behind it."""
    node.target = aten.alias.default
    node.args = node.args[:1]


def double(node: fx.Node) -> None:
    with node.graph.inserting_after(node):
        twice = node.graph.call_function(aten.mul.Tensor, (node, 2.0))
    twice.meta = dict(node.meta)
    node.replace_all_uses_with(twice, delete_user_cb=lambda user: user is not twice)


@pytest.mark.thinned(3)
def test_a_wrong_value_is_traced_to_pass_and_line(monkeypatch: pytest.MonkeyPatch) -> None:
    broken_pipeline(monkeypatch, "recognize-loss", Sabotage(spx.attention.default, scale_mask))
    report = verify(Block(), batch(), mesh={"cp": 2})
    assert not report.ok
    culprit = report.culprit
    assert culprit is not None
    assert culprit.pass_name == "sabotage"
    assert culprit.what == "value"
    assert culprit.source is not None
    assert "scaled_dot_product_attention" in culprit.source.text
    assert "first wrong after pass sabotage" in str(report)
    assert report.to_dict()["culprit"]["pass"] == "sabotage"


@pytest.mark.thinned(3)
def test_a_wrong_value_in_one_ranks_graph_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    broken_pipeline(monkeypatch, "parallelize-attention", LocalSabotage(aten.layer_norm.default, scale_eps))
    report = verify(Block(), batch(), mesh={"cp": 2})
    assert not report.ok
    assert report.culprit is not None
    assert report.culprit.pass_name == "sabotage"


def scale_eps(node: fx.Node) -> None:
    node.args = (*node.args[:4], 0.5)


def overwrite_in_flight(node: fx.Node) -> None:
    with node.graph.inserting_after(node):
        node.graph.call_function(aten.mul_.Tensor, (node.args[0], 2)).meta = dict(node.meta)


@pytest.mark.thinned(10)
def test_an_operand_that_is_overwritten_in_flight_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right if the collective has read it by then, and so in real runs now and then."""
    start = torch.ops._c10d_functional.all_reduce.default
    broken_pipeline(monkeypatch, "overlap-collectives", ScheduleSabotage(start, overwrite_in_flight))
    report = verify(Block(), batch(), mesh={"cp": 2})
    assert {row.graph for row in report.rows if not row.ok} == {"late"}
    assert report.culprit is not None
    assert report.culprit.pass_name == "sabotage"


@pytest.mark.thinned(3)
def test_a_lowering_that_is_wrong_is_found_across_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The LOCAL graph has other shapes than the GLOBAL one: values are put together before they are compared."""
    from spcompile.sharding.lowering import Lower

    right = Lower.run_node

    def wrong(self: Lower, n: fx.Node) -> Any:
        result = right(self, n)
        return result * 1.5 if n.target is aten.dropout.default or n.name == "chosen" else result

    marked = Sabotage(aten.layer_norm.default, lambda node: setattr(node, "name", "chosen"))
    broken_pipeline(monkeypatch, "recognize-loss", replace(marked))
    monkeypatch.setattr(Lower, "run_node", wrong)
    report = verify(Block(), batch(), mesh={"cp": 2})
    assert report.culprit is not None
    assert report.culprit.pass_name == "lower"
    assert report.culprit.what == "value"
    assert report.culprit.source is not None
    assert "self.norm(x_BSD)" in report.culprit.source.text


@pytest.mark.thinned(2)
def test_a_right_loss_with_wrong_gradients_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from spcompile.sharding.lowering import Lower

    right = Lower.reshard

    def without_sum(self: Lower, x: Tensor, src: str, dst: str, dims: Any) -> Tensor:
        return x * 1.0 if (src, dst) == ("I", "R") else right(self, x, src, dst, dims)

    monkeypatch.setattr(Lower, "reshard", without_sum)
    monkeypatch.setattr("spcompile.program.pipeline.verify_graph", lambda *args, **kwargs: None)
    report = verify(Block(), batch(), mesh={"cp": 2})
    wrong = {(row.kind, row.name) for row in report.rows if not row.ok}
    assert ("gradient", "head.weight") in wrong
    assert not any(kind == "output" for kind, _ in wrong)
    assert report.culprit is not None
    assert (report.culprit.pass_name, report.culprit.what) == ("lower", "gradient")


@pytest.mark.thinned(7)
def test_a_pass_behind_autograd_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    broken_pipeline(monkeypatch, "lower-collectives", ScheduleSabotage(aten.embedding_dense_backward.default, double))
    report = verify(Block(), batch(), mesh={"cp": 2})
    assert {row.graph for row in report.rows if not row.ok} == {"final"}
    assert report.culprit is not None
    assert report.culprit.pass_name == "sabotage"


class Statistics(Block):
    """Before attention a batch norm, a table of constants made in the forward and a weight that is clamped in place."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_norm = nn.BatchNorm1d(8, dtype=F64)

    def forward(self, ids_BS: Tensor, labels_BS: Tensor | None = None) -> dict[str, Tensor]:
        B, S = ids_BS.shape
        self.norm.weight.data.clamp_(-0.9, 0.9)
        x_BSD = self.batch_norm(self.tokens(ids_BS).transpose(1, 2)).transpose(1, 2)
        x_BSD = x_BSD + torch.tensor([0.1, 0.2, 0.3, 0.4] * 2, dtype=F64)
        q, k, v = (t.view(B, S, self.heads, -1).transpose(1, 2) for t in self.qkv(self.norm(x_BSD)).chunk(3, -1))
        y_BSD = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return {"logits": self.head(x_BSD + y_BSD)}


@pytest.mark.thinned(7)
@pytest.mark.parametrize("mesh", [{"cp": 2}, {"tp": 2}], ids=str)
def test_inputs_that_are_written_to_and_constants(mesh: dict[str, int]) -> None:
    """A running mean is saved for the backward and written at the end, a weight is clamped without a gradient."""
    model = Statistics()
    report = verify(model, {"ids_BS": batch()["ids_BS"]}, mesh=mesh)
    assert report.ok, str(report)
    assert {"tokens.weight", "batch_norm.weight", "norm.weight"} <= {row.name for row in report.rows}


class Reported(Block):
    """Beside the loss what people log, and a complex output; it writes to its input."""

    def forward(self, ids_BS: Tensor, labels_BS: Tensor | None = None) -> dict[str, Tensor]:
        ids_BS.remainder_(7)
        found = super().forward(ids_BS, labels_BS)
        logits = found["logits"]
        right = (logits.argmax(-1) == labels_BS).double().mean()
        return found | {
            "right": right,
            "seen": logits.detach().sum(-1),
            "complex": torch.complex(logits, -logits),
            "signs": logits > 0,
        }


@pytest.mark.thinned(3)
def test_outputs_without_a_gradient_and_inputs_that_are_put_back() -> None:
    inputs = batch()
    before = {name: x.clone() for name, x in inputs.items()}
    report = verify(Reported(), inputs, mesh={"cp": 2})
    assert report.ok, str(report)
    assert {"right", "seen", "complex", "signs"} <= {row.name for row in report.rows}
    assert all(torch.equal(x, before[name]) for name, x in inputs.items())


@pytest.mark.thinned(6)
def test_final_graphs_are_run_beside_outputs_without_a_gradient() -> None:
    class Logged(Block):
        def forward(self, ids_BS: Tensor, labels_BS: Tensor | None = None) -> dict[str, Tensor]:
            found = super().forward(ids_BS, labels_BS)
            return found | {"seen": found["logits"].detach().sum(-1)}

    report = verify(Logged(), batch(), mesh={"cp": 2})
    assert report.ok, str(report)
    assert {row.graph for row in report.rows} == {"local", "final"}


class Constants(Block):
    def forward(self, ids_BS: Tensor, labels_BS: Tensor | None = None) -> dict[str, Tensor]:
        found = super().forward(ids_BS, labels_BS)
        return {"logits": found["logits"] * torch.tensor([float(i) for i in range(11)], dtype=F64)}


@pytest.mark.thinned(2)
def test_a_constant_of_many_numbers_is_an_input_of_the_final_graphs() -> None:
    report = verify(Constants(), {"ids_BS": batch()["ids_BS"]}, mesh={"cp": 2})
    assert report.ok, str(report)
    assert {row.graph for row in report.rows} == {"local", "final"}


class Permuted(Block):
    """The backward of softplus gets its two operands in different memory orders; then a view follows."""

    def forward(self, ids_BS: Tensor, labels_BS: Tensor | None = None) -> dict[str, Tensor]:
        found = super().forward(ids_BS, labels_BS)
        gate_BSV = F.softplus(found["logits"])
        return {"out": gate_BSV.transpose(1, 2).contiguous().cumsum(-1)}


@pytest.mark.thinned(2)
def test_kernels_that_leave_other_strides_than_their_fakes() -> None:
    report = verify(Permuted(), {"ids_BS": batch()["ids_BS"]}, mesh={"cp": 2})
    assert report.ok, str(report)
