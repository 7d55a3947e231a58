"""Whose states count: an optimizer's own, before and after its first step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import spcompile
from spcompile.diagnostics import IllegalOption
from spcompile.machine.optimizers import OPTIMIZERS, Optimizer, optimizer_of, text_of_states
from spcompile.options import Options

KINDS: list[tuple[Any, dict[str, Any], torch.dtype, int]] = [
    (torch.optim.AdamW, {}, torch.float32, 8),
    (torch.optim.AdamW, {}, torch.bfloat16, 4),
    (torch.optim.AdamW, {"amsgrad": True}, torch.float32, 12),
    (torch.optim.SGD, {"lr": 0.1}, torch.float32, 0),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, torch.float64, 8),
    (torch.optim.Adafactor, {}, torch.float32, 0),
]


def step(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


@pytest.mark.parametrize(("kind", "settings", "dtype", "each"), KINDS)
def test_before_and_after_the_first_step(kind: Any, settings: dict[str, Any], dtype: torch.dtype, each: int) -> None:
    model = nn.Linear(64, 96, bias=False, dtype=dtype)
    optimizer = kind(model.parameters(), **settings)
    assert text_of_states(optimizer) == f"{each} bytes an element"
    step(optimizer, model)
    assert text_of_states(optimizer) == f"{each} bytes an element"


def test_states_that_are_there_count_as_they_are() -> None:
    model = nn.Linear(64, 64, dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters())
    step(optimizer, model)
    for state in optimizer.state.values():
        state.update({name: x.float() for name, x in state.items()})
    assert text_of_states(optimizer) == "8 bytes an element"


def test_an_optimizer_that_cannot_be_tried() -> None:
    optimizer = torch.optim.LBFGS(nn.Linear(4, 4).parameters())
    with pytest.raises(IllegalOption, match=r"LBFGS.*no states yet(?s:.*)legal: one that has made a step"):
        Options.parse({"optimizer": optimizer})


def test_text_that_says_states() -> None:
    assert optimizer_of("8 bytes an element") == Optimizer(1, 8)
    assert optimizer_of("0 bytes an element") == OPTIMIZERS["none"]
    assert optimizer_of("8 bytes") is None
    assert Options.parse({"optimizer": "8 bytes an element"}).states.bytes(10, 2) == 80
    with pytest.raises(IllegalOption, match="optimizer=3"):
        Options.parse({"optimizer": 3})


@pytest.mark.thinned(6)
def test_explain_counts_them() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    plan = spcompile.explain(model, (torch.randn(2, 4, 8),), {"cp": 2}, optimizer=optimizer)
    assert plan.memory.optimizer_bytes == sum(p.nbytes for p in model.parameters())
    assert plan.options["optimizer"] == "4 bytes an element"
