"""Calls that are written as others: the same numbers, and none of the calls that were replaced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import ANY

import pytest
import torch
import torch.nn.functional as F
from example_numerics import assert_equal, captured, on_one_device
from torch import Tensor

aten = torch.ops.aten


def made(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


CASES: dict[str, tuple[Callable[..., Tensor], list[Tensor], Any, list[Any]]] = {
    "roll over two dims": (
        lambda x: torch.roll(x, (1, -2), (0, 2)).sin(),
        [made(3, 2, 5)],
        aten.roll.default,
        [([1], [0]), ([-2], [2])],
    ),
    "pad of two dims": (
        lambda x: F.pad(x, (1, 0, 0, 0, 2, -1), value=3.0),
        [made(4, 2, 5)],
        aten.constant_pad_nd.default,
        [([1, 0], 3.0), ([0, 0, 0, 0, 2, -1], 3.0)],
    ),
    "pool to one place": (lambda x: F.adaptive_avg_pool2d(x, 1), [made(2, 3, 4, 5)], aten.mean.dim, [([-1, -2], True)]),
    "conv1d of width 1": (
        lambda x, w, b: F.conv1d(x, w, bias=b),
        [made(2, 3, 5), made(4, 3, 1), made(4)],
        aten.squeeze.dim,
        [(-1,)],
    ),
    "glu": (lambda x: F.glu(x, 1), [made(2, 6, 5)], aten.chunk.default, [(2, 1)]),
    "glu behind a transpose": (lambda x: F.glu(x.transpose(1, 2), 1), [made(2, 5, 6)], aten.chunk.default, [(2, 2)]),
    "pairs of a copy": (
        lambda x: torch.view_as_complex(x.unflatten(-1, (2, -1)).transpose(1, 2).contiguous()).abs(),
        [made(3, 8)],
        aten.complex.default,
        [ANY],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_numbers_and_calls(name: str) -> None:
    function, inputs, op, calls = CASES[name]
    gm = captured(function, *inputs)
    assert_equal(on_one_device(gm, inputs), on_one_device(function, inputs))
    assert [node.args[1:] for node in gm.graph.find_nodes(op="call_function", target=op)] == calls
    assert not gm.graph.find_nodes(op="call_function", target=aten.glu.default)


@pytest.mark.parametrize(
    ("function", "op"),
    [
        (lambda x: torch.roll(x, 1, 0), aten.roll.default),
        (lambda x: torch.roll(x, 1), aten.roll.default),
        (lambda x: F.adaptive_avg_pool1d(x, 2), aten.adaptive_avg_pool1d.default),
        (lambda x: torch.view_as_complex(x.unflatten(-1, (-1, 2))).abs(), aten.view_as_complex.default),
        (lambda x: F.pad(x, (1, 1, 1, 1), "reflect"), aten.pad.default),
        (lambda x: F.conv1d(x, x[:, :, :2]), aten.conv1d.default),
    ],
)
def test_calls_that_stay(function: Callable[..., Tensor], op: Any) -> None:
    gm = captured(function, made(2, 4, 6))
    assert gm.graph.find_nodes(op="call_function", target=op)
