"""The text of the rule of every op, of symbolic sizes, and what a rule promises."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.fx as fx
from rule_calls import Call, call, x
from rules_table import CASES, NO_RULE
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from spcompile.sharding.rules import OpRule, register, registered_ops, rule_of, tensor_operands, tensor_results


@pytest.mark.parametrize(("call", "text"), CASES, ids=[c.name for c, _ in CASES])
def test_text(call: Call, text: str) -> None:
    node = call.node()
    rule = rule_of(node)
    assert rule is not None
    assert rule.text() == text
    check_sizes(node, rule)


@pytest.mark.parametrize("call", NO_RULE, ids=[c.name for c in NO_RULE])
def test_forms_without_a_rule(call: Call) -> None:
    assert rule_of(call.node()) is None


def check_sizes(node: fx.Node, rule: OpRule) -> None:
    """Every dim has the product of its factors' sizes; a factor is of some use; replicated ones are not reduced."""
    tensors = [n.meta["val"] for n in tensor_operands(node)] + tensor_results(node)
    layouts = [*rule.operands, *rule.results]
    assert len(tensors) == len(layouts)
    for tensor, dims in zip(tensors, layouts, strict=True):
        assert tensor.ndim == len(dims)
        for size, dim in zip(tensor.shape, dims, strict=True):
            assert statically_known_true(size == math.prod(rule.sizes[f] for f in dim)), (rule.text(), size, dim)
    assert set(rule.sizes) == {f for dims in layouts for dim in dims for f in dim}
    assert rule.replicated <= set(rule.sizes)
    assert not rule.replicated & set(rule.reductions)
    assert not set(rule.reductions) & {f for dims in rule.results for dim in dims for f in dim}


def test_table_is_alphabetical_and_complete() -> None:
    names = [c.name for c, _ in CASES]
    assert names == sorted(names)
    assert len({c.op for c, _ in CASES}) >= 120
    aten_ops = {str(op) for op in registered_ops() if op.namespace == "aten"}
    missing = aten_ops - {str(c.op) for c, _ in CASES}
    assert not missing


def symbolic_nodes(function: Any, *inputs: torch.Tensor) -> Iterator[tuple[fx.Node, OpRule]]:
    """The calls of a function captured with symbolic sizes."""
    graph = make_fx(function, pre_dispatch=True, tracing_mode="symbolic")(*inputs).graph
    for node in graph.nodes:
        if node.op == "call_function" and tensor_results(node):
            rule = rule_of(node)
            assert rule is not None, node.format_node()
            check_sizes(node, rule)
            yield node, rule


def heads(h: torch.Tensor) -> torch.Tensor:
    b, s, _ = h.shape
    return h.view(b, s, -1, 4).transpose(1, 2).reshape(b, 3, s * 4)


def repeated(h: torch.Tensor) -> torch.Tensor:
    b, g, s, d = h.shape
    return h[:, :, None].expand(b, g, 3, s, d).reshape(b, g * 3, s, d)


def prefix(h: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return table[: h.shape[0]]


SYMBOLIC: list[tuple[Any, tuple[Any, ...], list[str]]] = [
    (lambda h: h.view(-1, 6), ((2, 5, 6),), ["a b c -> (a b) c"]),
    (lambda h: h.view(h.shape[0], -1), ((2, 5, 6),), ["a b c -> a (b c)"]),
    (heads, ((2, 5, 12),), ["a b (c d) -> a b c d", "a c b d -> a b c d", "a b c d -> a b (c d)"]),
    (
        repeated,
        ((2, 4, 5, 6),),
        [*["a b c d -> a b c d"] * 2, "a b c d -> a b 1 c d", "a b 1 d e -> a b c d e", "a b c d e -> a (b c) d e"],
    ),
    (lambda h: h + h.mean(-1, keepdim=True), ((3, 5),), ["a b -> a 1 | b: sum", "a b, a 1 -> a b"]),
    (lambda h, w: torch.nn.functional.linear(h, w), ((2, 5, 6), (7, 6)), ["a b d, c d -> a b c | d: sum"]),
    (lambda h: h[:, : h.shape[1]], ((3, 5),), ["a b -> a b"]),
    (prefix, ((3, 5), (9, 4)), ["[c] b -> [a] b"]),
    (lambda h: torch.arange(h.shape[1]), ((3, 5),), ["-> [a]"]),
    (lambda h: h.new_zeros(h.shape[1], 4), ((3, 5),), ["c d -> a b"]),
    (lambda h: torch.cat([h.new_empty(0), h], -1), ((3, 5),), ["b c -> a", "[c], a b -> a b"]),
]


@pytest.mark.parametrize(("function", "shapes", "texts"), SYMBOLIC)
def test_symbolic_sizes(function: Any, shapes: tuple[tuple[int, ...], ...], texts: list[str]) -> None:
    inputs = [torch.rand(shape) for shape in shapes]
    assert [rule.text() for _, rule in symbolic_nodes(function, *inputs)] == texts


def test_prefix_slices_are_marked() -> None:
    for node in (
        call("slice.Tensor", x(4, 6), 1, 0, 4).node(),
        call("slice.Tensor", x(4, 6), 1, None, -2).node(),
        call("slice.Tensor", x(4, 6), 1, -7, -2).node(),
        call("narrow", x(4, 6), 1, 0, 4).node(),
    ):
        rule = rule_of(node)
        assert rule is not None
        assert rule.prefix_of == {"b": "c"}
    for node in (
        call("slice.Tensor", x(4, 6), 1, 1, 6).node(),
        call("slice.Tensor", x(4, 6), 1, 0, 6, 2).node(),
        call("narrow", x(4, 6), 1, 1, 4).node(),
    ):
        rule = rule_of(node)
        assert rule is not None
        assert not rule.prefix_of


def test_operands_follow_the_order_of_the_call() -> None:
    graph = fx.Graph()
    mode = FakeTensorMode()
    h, w, b = (graph.placeholder(name) for name in "hwb")
    for node, shape in ((h, (2, 8)), (w, (6, 8)), (b, (6,))):
        node.meta["val"] = mode.from_tensor(torch.rand(shape))
    node = graph.call_function(torch.ops.aten.linear.default, (h,), {"bias": b, "weight": w})
    node.meta["val"] = mode.from_tensor(torch.rand(2, 6))
    rule = rule_of(node)
    assert rule is not None
    assert rule.text() == "a [c], b, b [c] -> a b"


def test_an_op_has_one_rule() -> None:
    with pytest.raises(ValueError, match="has a rule already"):
        register(torch.ops.aten.linear.default)(lambda node: None)


@pytest.mark.parametrize(
    ("bias", "expected"),
    [
        (None, "b (g r) s [h], b g t [h], b g t [v] -> b (g r) s [v], b (g r) s"),
        (
            (1, 4, 5, 6),
            "b (g r) s [h], b g t [h], b g t [v], 1 (g r) s [bias3] -> b (g r) s [v], b (g r) s",
        ),
    ],
)
def test_keys_of_attention_are_split_with_its_rows(bias: tuple[int, ...] | None, expected: str) -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *masks: torch.Tensor) -> torch.Tensor:
        mask = masks[0] if masks else None
        return torch.ops.spx.attention(q, k, v, None, None, None, None, None, mask, "full", 0.5)[0]

    shapes = [(2, 4, 5, 3), (2, 2, 6, 3), (2, 2, 6, 7), *([bias] if bias else [])]
    graph = make_fx(attend, pre_dispatch=True)(*[torch.randn(shape) for shape in shapes]).graph
    node = next(n for n in graph.nodes if n.target is torch.ops.spx.attention.default)
    rule = rule_of(node)
    assert rule is not None
    assert rule.text() == expected
    assert rule.paired == {"s": "t"}
