"""Behind autograd terms that are 0, and were there to create a gradient, are gone; all other terms stay."""

from __future__ import annotations

import torch
import torch.fx as fx
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from spcompile.capture.custom_functions import NO_CHANGE
from spcompile.program.zero_terms import drop_zero_terms


def traced(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    with fx.traceback.annotate({NO_CHANGE: True}):
        change = x - x.detach()
    term = (change @ w).sum(0).expand(2, 3)
    scaled = torch.add(term, x @ w, alpha=3)
    return x @ w + term, (x @ w) * (x @ w + term + 1e-6), term + 2.0, x - x.detach(), scaled


def test_sums_lose_zeros_and_keep_numbers() -> None:
    x, w = torch.randn(2, 4, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    with fx.traceback.preserve_node_meta():
        gm = make_fx(traced)(x, w)
    expected = traced(x, w)
    products = len(gm.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default))
    assert drop_zero_terms(gm.graph) == 2
    gm.recompile()
    for found, wanted in zip(gm(x, w), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    left = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)
    assert len(left) == products  # `term + 2.0` still reads it
    assert drop_zero_terms(gm.graph) == 0


def test_a_difference_that_nobody_marked_stays() -> None:
    gm = make_fx(lambda x: x + (x - x.detach()))(torch.randn(3))
    assert drop_zero_terms(gm.graph) == 0
