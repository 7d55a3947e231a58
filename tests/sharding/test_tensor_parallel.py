"""Axis tp on models written by hand: which weights are split, and that loss, outputs and gradients are exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from split_models import (
    VOCAB,
    FusedConv1D,
    FusedGate,
    FusedSlices,
    Grouped,
    Interleaved,
    LowRank,
    Mlp,
    Model,
    batch,
)
from torch import Tensor, nn
from tp_decisions import decide

import spcompile
from spcompile.report.verify_report import Report

COLUMN_ROW = {"mlp.inner.weight": "colwise", "mlp.outer.weight": "rowwise"}
ENDS = {"tokens.weight": "vocabulary", "head.weight": "colwise"}
GROUPED = {f"attention.{x}.weight": kind for x, kind in zip("abcd", ["colwise"] * 3 + ["rowwise"], strict=True)}


@pytest.fixture(autouse=True)
def float64() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def checked(model: nn.Module, mesh: dict[str, int], inputs: Any = None, **options: Any) -> Report:
    report = spcompile.verify(model, inputs or batch(), mesh=mesh, **options)
    assert report.ok, str(report)
    assert {row.graph for row in report.rows} == {"local", "final"}
    return report


BUILT: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "grouped": (lambda: Model(Grouped(), Mlp()), GROUPED | COLUMN_ROW | ENDS),
    "Conv1D, fused": (
        lambda: Model(FusedConv1D(), Mlp()),
        {
            "attention.weight": "colwise",
            "attention.bias": "part",
            "attention.d.weight": "rowwise",
            **COLUMN_ROW,
            **ENDS,
        },
    ),
    "slices, fused": (
        lambda: Model(FusedSlices(), FusedGate()),
        {
            "attention.all.weight": "colwise",
            "attention.d.weight": "rowwise",
            "mlp.both.weight": "colwise",
            "mlp.outer.weight": "rowwise",
            **ENDS,
        },
    ),
    "interleaved": (
        lambda: Model(Interleaved(), Mlp()),
        {"attention.all.weight": "colwise", "attention.d.weight": "rowwise", **COLUMN_ROW, **ENDS},
    ),
    "tied": (
        lambda: Model(Grouped(), Mlp(), tied=True),
        GROUPED | COLUMN_ROW | dict.fromkeys(ENDS, "colwise+vocabulary"),
    ),
    "no norms": (lambda: Model(Grouped(), Mlp(), norms=False), GROUPED | COLUMN_ROW | ENDS),
    "low rank": (
        lambda: Model(LowRank(), Mlp()),
        {
            "attention.q_down.weight": "whole",
            "attention.q_up.weight": "colwise",
            "attention.kv_down.weight": "whole",
            "attention.kv_up.weight": "colwise",
            "attention.d.weight": "rowwise",
            **COLUMN_ROW,
            **ENDS,
        },
    ),
    "one head": (
        lambda: Model(Grouped(1, 1, 8), Mlp()),
        dict.fromkeys(GROUPED, "whole") | COLUMN_ROW | ENDS,
    ),
    "no attention": (lambda: Model(None, Mlp()), COLUMN_ROW | ENDS),
}


@pytest.mark.thinned(6)
@pytest.mark.parametrize("name", BUILT)
def test_decisions(name: str) -> None:
    build, expected = BUILT[name]
    decisions = decide(build(), batch())
    assert {key: decisions.kinds[key] for key in expected} == expected
    assert ("SPR502" in decisions.codes) == ("whole" in expected.values())


@pytest.mark.thinned(10)
@pytest.mark.parametrize("name", BUILT)
def test_exact(name: str) -> None:
    checked(BUILT[name][0](), {"tp": 2})


@pytest.mark.thinned(10)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "mesh"),
    [
        (4, 2, {"tp": 4}),  # fewer key/value heads than ranks: they are repeated
        (4, 1, {"tp": 2}),
        (6, 3, {"tp": 2}),  # key/value heads do not divide
        (5, 5, {"tp": 3}),  # nor do heads, the vocabulary (22) and the hidden width (20)
        (4, 2, {"tp": 2, "cp": 2}),
        (4, 1, {"tp": 2, "cp": 2}),  # all ranks of tp share the keys that a ring of cp carries
    ],
)
def test_heads_that_do_not_divide(heads: int, kv_heads: int, mesh: dict[str, int]) -> None:
    report = checked(Model(Grouped(heads, kv_heads), Mlp()), mesh)
    codes = {remark.code for remark in report.remarks}
    assert ("SPR503" in codes) == (kv_heads % mesh["tp"] != 0)
    assert "SPR202" not in codes


@pytest.mark.thinned(7)
@pytest.mark.parametrize("attention", ["ring", "ulysses"])
def test_with_context_parallelism(attention: str) -> None:
    checked(Model(FusedSlices(), FusedGate(), tied=True), {"tp": 2, "cp": 2}, attention=attention)


@pytest.mark.slow
@pytest.mark.thinned(6, covers=["name", "mesh", "attention"])
@pytest.mark.parametrize("attention", ["ring", "ulysses"])
@pytest.mark.parametrize(
    "mesh", [{"tp": 4, "cp": 2}, {"cp": 4, "tp": 2}, {"tp": 2, "cp": 3}, {"tp": 3, "cp": 2}], ids=str
)
@pytest.mark.parametrize("name", ["grouped", "Conv1D, fused", "interleaved", "low rank", "tied"])
def test_large_meshes(name: str, mesh: dict[str, int], attention: str) -> None:
    checked(BUILT[name][0](), mesh, attention=attention)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    checked(Model(Grouped(), FusedGate()).to(dtype), {"tp": 2})


@pytest.mark.slow
@pytest.mark.thinned(2)
@pytest.mark.parametrize("mesh", [{"tp": 2, "cp": 4}, {"tp": 4, "cp": 2}], ids=str)
def test_float32_on_eight_ranks(mesh: dict[str, int]) -> None:
    checked(Model(Grouped(), FusedGate()).float(), mesh, tolerance=1e-5)


class Losses(Model):
    """A loss of the logits [B, S, V]: `name` is that of a function below."""

    def __init__(self, name: str, vocab: int) -> None:
        super().__init__(Grouped(), Mlp(), vocab=vocab)
        self.name = name

    def forward(self, ids_BS: Tensor, labels_BS: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"loss": LOSSES[self.name](self.logits(ids_BS).flatten(0, 1), labels_BS.flatten())}


def z_loss(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """PaLM's term, over valid tokens."""
    z_N = torch.logsumexp(logits_NV, -1) * (labels_N != -100)
    return F.cross_entropy(logits_NV, labels_N) + 1e-2 * z_N.square().mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": F.cross_entropy,
    "sum": lambda x, y: F.cross_entropy(x, y, reduction="sum"),
    "none": lambda x, y: F.cross_entropy(x, y, reduction="none").square().sum(),
    "label smoothing": lambda x, y: F.cross_entropy(x, y, label_smoothing=0.1),
    "class weights": lambda x, y: F.cross_entropy(x, y, torch.arange(1.0, x.shape[1] + 1)),
    "other ignore_index": lambda x, y: F.cross_entropy(x, y.clamp(min=0), ignore_index=3),
    "z-loss": z_loss,
    "log_softmax and nll": lambda x, y: F.nll_loss(F.log_softmax(x, -1), y),
    "log_softmax and gather": lambda x, y: -F.log_softmax(x, -1).gather(1, y.clamp(min=0)[:, None]).mean(),
    "scaled logits": lambda x, y: F.cross_entropy(30 * torch.tanh(x / 30), y),
    "entropy": lambda x, y: F.cross_entropy(x, y) - 0.1 * (x.softmax(-1) * x.log_softmax(-1)).sum(-1).mean(),
}


@pytest.mark.thinned(10, covers=["mesh"])
@pytest.mark.parametrize("mesh", [{"tp": 2}, {"tp": 3, "cp": 2}], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str, mesh: dict[str, int]) -> None:
    checked(Losses(name, VOCAB), mesh)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("name", ["mean", "z-loss"])
def test_the_vocabulary_does_not_divide(name: str) -> None:
    checked(Losses(name, 23), {"tp": 3}, batch(vocab=23))


@pytest.mark.thinned(4)
@pytest.mark.parametrize("name", ["mean", "scaled logits"])
def test_logits_are_never_gathered(name: str) -> None:
    plan = spcompile.explain(Losses(name, VOCAB), batch(), mesh={"tp": 2})
    logits = 2 * 9 * VOCAB
    assert all(row.numel <= max(logits // 2, VOCAB * 16) for row in plan.largest_tensors)


@pytest.mark.thinned(7)
@pytest.mark.parametrize("name", ["mean", "none"])
def test_no_token_is_valid(name: str) -> None:
    """A mean over nothing is NaN in the plain model too; with a sum all is zero."""
    model, inputs = Losses(name, VOCAB), batch() | {"labels_BS": torch.full((2, 9), -100)}
    report = spcompile.verify(model, inputs, mesh={"tp": 2})
    assert all(row.ok or (name == "mean" and row.max_abs != row.max_abs) for row in report.rows), str(report)
