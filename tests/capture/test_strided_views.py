"""`as_strided` by elements: the same numbers and gradients, also where a rank has another copy of its operand.

B batch, N heads, S sequence, H head width.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from example_numerics import assert_equal, captured, on_one_device
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import spcompile

aten = torch.ops.aten
CASES: dict[str, Callable[[Tensor], Tensor]] = {
    "overlapping windows": lambda x: x.sin().as_strided((4, 3, 4, 3), (24, 6, 3, 1)),
    "of a transpose": lambda x: x.sin().transpose(0, 1).as_strided((8, 3, 2), (3, 1, 24)),
    "of a slice, from its own start": lambda x: x.sin()[1:].as_strided((2, 3), (3, 5)).square(),
    "with a start": lambda x: x.sin().as_strided((2, 3), (1, 2), 7).exp(),
    "one element many times": lambda x: x.sin().as_strided((5,), (0,)),
}


def _doubled(x: Tensor) -> Tensor:
    x = x.sin()
    x.as_strided((8, 3), (3, 25)).mul_(2.0)
    return x.exp()


def _without_diagonal(x: Tensor) -> Tensor:
    product = x[0] @ x[0].T
    return product.fill_diagonal_(0.5).square()


CASES |= {"written to": _doubled, "a diagonal": _without_diagonal}


@pytest.mark.parametrize("name", CASES)
def test_numbers_and_gradients(name: str) -> None:
    x = torch.randn(4, 8, 3, dtype=torch.float64, requires_grad=True)
    gm = captured(CASES[name], x)
    assert_equal(on_one_device(gm, [x]), on_one_device(CASES[name], [x]))
    assert not {aten.as_strided.default, aten.as_strided_scatter.default} & {node.target for node in gm.graph.nodes}


def test_memory_beside_the_operand_is_refused() -> None:
    with pytest.raises(BackendCompilerFailed, match="reads memory beside its operand"):
        captured(lambda x: x.sin()[:, 2:].as_strided((4, 24), (24, 1), 0), torch.randn(4, 8, 3))


def test_an_element_that_is_written_to_twice_is_refused() -> None:
    with pytest.raises(BackendCompilerFailed, match="writes to an element twice"):
        captured(lambda x: x.sin().as_strided((4, 3), (1, 1)).mul_(2.0), torch.randn(4, 8))


def test_strides_of_a_view_that_are_written_to_are_refused() -> None:
    with pytest.raises(BackendCompilerFailed, match=r"SP302(.|\n)*as_strided(.|\n)*test_strided_views.py"):
        captured(lambda x: x.sin().T.as_strided((4, 3), (8, 1)).mul_(2.0), torch.randn(4, 8))


class Windows(nn.Module):
    """Attention, whose values are cut into windows that overlap, by the strides that they have in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x_BSD: Tensor) -> Tensor:
        B, S, _ = x_BSD.shape
        q, k, v = (t.view(B, S, 4, 4).transpose(1, 2) for t in self.qkv(x_BSD).chunk(3, -1))
        y_BNSH = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        y_BNSH = y_BNSH.sin()
        b, n, s, h = y_BNSH.stride()
        windows = y_BNSH.as_strided((B, 4, S // 4 - 1, 8, 4), (b, n, 4 * s, s, h))
        return windows.cos().mean((2, 3))


@pytest.mark.thinned(7)
@pytest.mark.parametrize("axis", ["cp", "tp"])
def test_ranks(axis: str) -> None:
    torch.manual_seed(0)
    report = spcompile.verify(Windows().double(), [torch.randn(2, 16, 16, dtype=torch.float64)], {axis: 2})
    assert report.ok, str(report)
