"""Layers that are equal in a captured graph can be left out, and what is left is the model with fewer of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from spcompile.capture.retrace import capture
from spcompile.machine.accelerators import ACCELERATORS
from spcompile.options import Options
from spcompile.planning.equal_blocks import EqualBlocks, find_equal_blocks, shortened
from spcompile.program.trace import through_dynamo

WIDTH = 8


class Block(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, hidden)
        self.down = nn.Linear(hidden, WIDTH)

    def forward(self, x_BSD: Tensor, scale_D: Tensor) -> Tensor:
        return x_BSD + self.down(torch.relu(self.up(self.norm(x_BSD) * scale_D)))


class Stack(nn.Module):
    """returns_all: also what each block gives, as models do that are asked for hidden states."""

    def __init__(self, hidden: list[int], returns_all: bool = False) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.blocks = nn.ModuleList(map(Block, hidden))
        self.scale = nn.Parameter(torch.rand(WIDTH))
        self.returns_all = returns_all

    def forward(self, x_BSD: Tensor) -> Tensor | list[Tensor]:
        x_BSD = self.first(x_BSD)
        scale_D, between = self.scale.sigmoid(), []
        for block in self.blocks:
            x_BSD = block(x_BSD, scale_D)
            between.append(x_BSD)
        return [self.head(x_BSD), *between] if self.returns_all else self.head(x_BSD)


def captured(model: nn.Module, x_BSD: Tensor) -> tuple[torch.fx.GraphModule, list[Tensor], EqualBlocks | None]:
    found = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> None:
        graph = capture(gm, inputs)
        found.append((graph, list(inputs), find_equal_blocks(graph.graph, ACCELERATORS["cpu"])))

    through_dynamo(model, (x_BSD,), backend, Options())
    return found[0]


@pytest.fixture
def x_BSD() -> Tensor:
    return torch.rand(2, 3, WIDTH, dtype=torch.float64)


@pytest.mark.parametrize("keep", [0, 1, 3])
def test_what_is_left_is_the_model_with_fewer_blocks(keep: int, x_BSD: Tensor) -> None:
    model = Stack([16] * 6).double()
    graph, inputs, found = captured(model, x_BSD)
    assert found is not None
    assert found.count >= 4
    short, kept = shortened(graph, inputs, found, keep)
    here = {id(inputs[i]) for i in kept}
    model.blocks = nn.ModuleList(block for block in model.blocks if id(block.up.weight) in here)
    assert len(model.blocks) == 6 - found.count + keep
    parameters = list(model.parameters())
    assert here == {*map(id, parameters), id(x_BSD)}
    (result,), expected = short(*[inputs[i] for i in kept]), model(x_BSD)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(value.sin().sum(), parameters) for value in (result, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_a_run_is_of_equal_blocks(x_BSD: Tensor) -> None:
    """One block is wider than the others: the longest run stands behind it."""
    _, _, found = captured(Stack([16, 16, 24, *[16] * 7]).double(), x_BSD)
    assert found is not None
    weights = [value.meta["val"].shape for block in found.blocks for node in block for value in node.all_input_nodes]
    assert torch.Size([24, WIDTH]) not in weights
    assert 5 <= found.count <= 7


@pytest.mark.parametrize("model", [Stack([16] * 4, returns_all=True), Stack([16, 24, 32]), Stack([16])])
def test_what_cannot_be_left_out_stays(model: Stack, x_BSD: Tensor) -> None:
    """Blocks that somebody else reads, blocks that differ, a single one."""
    assert captured(model.double(), x_BSD)[2] is None
