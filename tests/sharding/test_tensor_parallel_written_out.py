"""Attention that stays written out, with dropout of its weights: heads over tp, and Megatron SP between blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron_gpt import MegatronGPT, Sizes

import spcompile

HELD = {"recognize-attention": {"written_out": True}}


def given(recompute: str) -> tuple[MegatronGPT, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    sizes = Sizes(layers=1, heads=4, dim=32, seq=16, recompute=recompute, vocab=64)
    ids = torch.randint(0, 64, (2, 16))
    return MegatronGPT(sizes).double(), {"ids_BS": ids, "labels_BS": ids}


@pytest.mark.thinned(6)
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_loss_and_gradients_are_those_of_one_device(recompute: str) -> None:
    report = spcompile.verify(*given(recompute), mesh={"tp": 2}, passes=HELD, outputs="loss", tolerance=1e-6)
    assert report.ok, str(report)


@pytest.mark.thinned(14)
@pytest.mark.parametrize("megatron_sp", [True, False])
def test_all_weights_are_split_and_sums_are_scattered_over_the_sequence(megatron_sp: bool) -> None:
    passes: dict[str, Any] = HELD if megatron_sp else {**HELD, "split-all-reduce": False}
    plan = spcompile.explain(*given("none"), {"tp": 2}, passes=passes, outputs="loss")
    codes = [remark.code for remark in plan.remarks]
    assert "SPR202" in codes
    assert "SPR502" not in codes, "a weight is not split"
    ops = {row.op for row in plan.collectives if row.phase == "forward" and row.bytes > 1000}
    assert ("reduce_scatter" in ops) == megatron_sp
    assert ("all_reduce" in ops) == (not megatron_sp)
