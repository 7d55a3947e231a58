"""The rule of products with a matrix for each group of rows: its line, and that shards give the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.fx as fx
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from spcompile.sharding.rules import rule_of

ROWS, GROUPS, IN, OUT = 16, 3, 32, 8
ENDS_G = torch.tensor([5, 5, 16], dtype=torch.int32)  # the second group is empty


def node_of(op: Any, *tensors: Tensor) -> fx.Node:
    graph, mode = fx.Graph(), FakeTensorMode()
    nodes = []
    for number, tensor in enumerate(tensors):
        node = graph.placeholder(f"arg{number}")
        node.meta["val"] = mode.from_tensor(tensor.bfloat16() if tensor.is_floating_point() else tensor)
        nodes.append(node)
    call = graph.call_function(op, (*nodes[:2],), {"offs": nodes[2]} if len(nodes) > 2 else {})
    with mode:
        call.meta["val"] = op(*(n.meta["val"] for n in nodes[:2]), **{k: n.meta["val"] for k, n in call.kwargs.items()})
    return call


def ops() -> list[Any]:
    pytest.importorskip("transformers.integrations.moe")
    return [torch.ops.aten._grouped_mm.default, torch.ops.transformers.grouped_mm_fallback.default]


def operands() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(ROWS, IN, generator=generator)
    return x_TD, torch.randn(GROUPS, IN, OUT, generator=generator), ENDS_G


@pytest.mark.parametrize("number", [0, 1])
def test_text(number: int) -> None:
    rule = rule_of(node_of(ops()[number], *operands()))
    assert rule is not None
    assert rule.text() == "[a] c, [d] c b, [d] -> [a] b | c: sum"
    assert rule.sizes == {"a": ROWS, "b": OUT, "c": IN, "d": GROUPS}


def test_other_forms_have_no_rule() -> None:
    x_TD, w_GDE, _ = operands()
    batched = node_of(ops()[0], x_TD[None].expand(GROUPS, -1, -1), w_GDE)
    assert rule_of(batched) is None


@pytest.mark.parametrize("number", [0, 1])
def test_numbers_on_two_shards(number: int) -> None:
    """Over the columns shards are joined, over what is contracted they are added up."""
    op = ops()[number]
    x_TD, w_GDE, ends_G = operands()
    whole_TE = op(x_TD, w_GDE, offs=ends_G)
    starts = [0, *ends_G.tolist()]
    plain_TE = torch.cat([x_TD[a:b] @ w for a, b, w in zip(starts, starts[1:], w_GDE, strict=False)])
    torch.testing.assert_close(whole_TE, plain_TE)
    columns = [op(x_TD, w.contiguous(), offs=ends_G) for w in w_GDE.chunk(2, 2)]
    torch.testing.assert_close(torch.cat(columns, 1), whole_TE)
    pairs = zip(x_TD.chunk(2, 1), w_GDE.chunk(2, 1), strict=True)
    terms = [op(x.contiguous(), w.contiguous(), offs=ends_G) for x, w in pairs]
    torch.testing.assert_close(sum(terms), whole_TE)
