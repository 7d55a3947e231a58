"""Mixtures of transformers, unchanged: each rank saves its share, and loss and gradients are the plain model's."""

from __future__ import annotations

import hf_families
import pytest
import torch
from mixtures import GATHERS
from oracle import FLOAT32_INSIDE, default_dtype

import spcompile

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss", "granitemoe")


@pytest.mark.thinned(10)
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_stay_with_their_tokens(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = pytest.importorskip("transformers.integrations.moe")
    monkeypatch.setattr(experts, "_can_use_grouped_mm", lambda *_: False)  # torch's has no float64
    torch.manual_seed(0)
    with default_dtype(torch.float64):
        model = hf_families.build(family)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # zeros in routers and biases would hide gradients
    inputs = hf_families.inputs(32)
    plan = spcompile.explain(model, inputs, mesh={"cp": 2}, outputs="loss")
    memory = plan.to_dict()["memory"]
    assert memory["saved_activation_bytes"] <= 1.05 * memory["saved_activation_bytes_one_device"] / 2
    report = spcompile.verify(model, inputs, mesh={"cp": 2}, outputs="loss", tolerance=FLOAT32_INSIDE)
    assert report.ok, str(report)
    assert not GATHERS & {remark.code for remark in report.remarks}, str(report)
