"""Models whose sequence is made of parts save as little as others, and their final graphs have the right gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import joined_models as jm
import pytest
import torch
from torch import nn

from spcompile import explain, verify

MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], dict[str, Any]]]] = {
    "text and image": (jm.TextAndImage, lambda number: jm.text_and_image(number, text=24, image=48)),
    "class attention": (jm.ClassAttention, lambda number: jm.images(number, length=69)),
}


def in_float64(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}


@pytest.mark.thinned(30)
@pytest.mark.parametrize("attention", ["ring", "ulysses"])
@pytest.mark.parametrize("degree", [2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_every_gradient(name: str, degree: int, attention: str) -> None:
    build, inputs = MODELS[name]
    torch.manual_seed(degree)
    report = verify(build().double(), in_float64(inputs(1)), {"cp": degree}, attention=attention)
    assert report.ok, report
    assert {row.graph for row in report.rows} == {"local", "final"}


@pytest.mark.thinned(29)
@pytest.mark.parametrize("mesh", [{"cp": 2}, {"cp": 2, "tp": 2}, {"dp": 2, "cp": 2}], ids=str)
def test_rows_that_are_short_and_read_twice(mesh: dict[str, int]) -> None:
    torch.manual_seed(0)
    report = verify(jm.DeepPrompt().double(), in_float64(jm.images(1, length=130)), mesh)
    assert report.ok, report


@pytest.mark.thinned(24)
@pytest.mark.parametrize("name", MODELS)
def test_a_rank_saves_its_part(name: str) -> None:
    build, inputs = MODELS[name]
    plan = explain(build(), inputs(1), {"cp": 2})
    memory = plan.to_dict()["memory"]
    assert memory["saved_activation_bytes"] <= 1.15 / 2 * memory["saved_activation_bytes_one_device"]
    assert {remark.code for remark in plan.remarks} <= {"SPR203"}
