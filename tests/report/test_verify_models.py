"""Every model in the simulator on mesh sizes that no machine here has processes for: 3 and 8 ranks."""

from __future__ import annotations

from typing import Any

import hf_models
import plain_models as pm
import pytest
import torch

import spcompile
from spcompile.command.model_spec import build_model

EVERY_STRATEGY = pytest.mark.parametrize("attention", ["ring", "ulysses", "auto"])
EVERY_DEGREE = pytest.mark.parametrize("degree", [3, 8])
EVERY_TIME = ["name", "attention", "degree"]


def agrees(model: torch.nn.Module, inputs: Any, degree: int, attention: str) -> None:
    report = spcompile.verify(model, inputs, mesh={"cp": degree}, attention=attention)
    assert report.ok, str(report)
    assert not any(remark.code == "SPR101" for remark in report.remarks), "nothing was sharded"


@pytest.mark.slow
@pytest.mark.thinned(3, covers=EVERY_TIME)
@EVERY_DEGREE
@EVERY_STRATEGY
@pytest.mark.parametrize("name", ["models:gpt-tiny", "models:llama-tiny", "models:bert-tiny"])
def test_plain_models(name: str, attention: str, degree: int) -> None:
    torch.manual_seed(0)
    built = build_model(name, seq=21, device="cpu", dtype="float64", settings={})
    agrees(built.model, built.example_inputs(2, 21, "cpu"), degree, attention)


@pytest.mark.slow
@pytest.mark.thinned(6, covers=EVERY_TIME)
@EVERY_DEGREE
@EVERY_STRATEGY
@pytest.mark.parametrize("name", hf_models.MODELS)
def test_hugging_face_models(name: str, attention: str, degree: int, default_float64: None) -> None:
    torch.manual_seed(0)
    model = hf_models.build(name)
    agrees(model, hf_models.inputs(0, model=name, kind="right padding", length=21), degree, attention)


@pytest.mark.thinned(10)
@pytest.mark.parametrize("degree", [2, 3])
def test_unread_attention_is_split_by_rows(degree: int) -> None:
    torch.manual_seed(0)
    model = pm.TalkingHeads().double()
    inputs = {"stuff": pm.ids(0, 13), "goal": pm.ids(1, 13)}
    agrees(model, inputs, degree, "auto")
    plan = spcompile.explain(model, inputs, mesh={"cp": degree})
    assert plan.sharding.length == 13
    assert f'softmax: "f64[2, 4, {-(-13 // degree)}, 13]' in plan.graph("lower")


@pytest.mark.thinned(10)
@pytest.mark.parametrize("in_buffer", [False, True])
def test_an_encoder_with_a_causal_mask_and_no_hint_is_one_graph(in_buffer: bool) -> None:
    """The layers of torch compare the mask's values to find out whether it is causal."""
    torch.manual_seed(0)
    model = pm.Encoder(in_buffer).double()
    inputs = (pm.ids(0, 13), pm.ids(1, 13))
    agrees(model, inputs, 2, "auto")
    plan = spcompile.explain(model, inputs, mesh={"cp": 2})
    assert {remark.code for remark in plan.remarks} <= {"SPR203"}


@pytest.mark.thinned(14)
@pytest.mark.parametrize("mesh", [{"cp": 2}, {"tp": 2}, {"dp": 2}], ids=str)
def test_a_model_written_by_hand_is_split_as_any_other(mesh: dict[str, int]) -> None:
    torch.manual_seed(0)
    model = pm.ByHand().double()
    report = spcompile.verify(model, (pm.ids(0, 13), pm.ids(1, 13)), mesh=mesh)
    assert report.ok, str(report)
    assert {remark.code for remark in report.remarks} <= {"SPR203"}


@pytest.fixture
def default_float64() -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
