"""Floats under `dynamic=True`: numbers where the model holds them, tensors where the caller's only meet tensors."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn

from spcompile.capture.python_floats import without_symbolic_floats


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.inner = 1.5, nn.Linear(4, 4)

    def forward(self, x_BD: Tensor, given: float, power: float = 2.0) -> Tensor:
        return (self.inner(x_BD) * self.scale).abs() ** power + given


def compiled(model: nn.Module) -> tuple[Any, list[fx.GraphModule]]:
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        without_symbolic_floats(gm)
        graphs.append(gm)
        return gm

    return torch.compile(model, backend=backend, dynamic=True), graphs


def test_no_float_is_read_and_every_value_is_right() -> None:
    model = Scaled()
    run, graphs = compiled(model)
    x_BD = torch.randn(3, 4)
    for given, power in ((2.5, 2.0), (0.25, 2.0), (7.0, 2.0), (7.0, 3.0)):
        assert torch.equal(run(x_BD, given, power), model(x_BD, given, power))
    assert len(graphs) == 2, "one for each power, which is no arithmetic with a tensor"
    assert not any(node.target == "item" for gm in graphs for node in gm.graph.nodes)
    numbers = [x for node in graphs[0].graph.nodes for x in node.args if isinstance(x, float)]
    assert 1.5 in numbers


def test_a_float_of_the_model_that_changes_is_seen() -> None:
    model = Scaled()
    run, _ = compiled(model)
    x_BD = torch.randn(3, 4)
    run(x_BD, 1.0)
    model.scale = -0.5
    assert torch.equal(run(x_BD, 1.0), model(x_BD, 1.0))
