"""The symbolic reader: every element it reads equals the tensor's, on written and on random programs."""

from __future__ import annotations

import itertools
import operator
import random
from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
import torch.fx as fx
from sympy.core.symbol import Str
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from spcompile.attention.scores.mask import AttentionMask
from spcompile.recognition.masks.index_maps import IndexSpace, sizes_of, step
from spcompile.recognition.masks.match import B as b
from spcompile.recognition.masks.match import K as k
from spcompile.recognition.masks.match import Q as q
from spcompile.recognition.masks.match import Unmatched, clauses, every_row_has_a_key, match
from spcompile.recognition.masks.reader import Reader
from spcompile.recognition.masks.values import (
    Element,
    Select,
    Unreadable,
    Value,
    at_least_zero,
    either,
    equal_zero,
    is_bool,
    negate,
    relation,
    substitute,
)
from spcompile.recognition.repeated_heads import before_repeat, heads_in_batch

Graph = tuple[fx.GraphModule, fx.Node]


def graph_of(function: Callable[..., Tensor], *inputs: Any) -> Graph:
    gm = make_fx(function, tracing_mode="fake", pre_dispatch=True)(*inputs)
    (result,) = gm.graph.find_nodes(op="output")[0].all_input_nodes
    return gm, result


def evaluate(value: Any, at: dict[sympy.Symbol, int], leaves: dict[str, Tensor]) -> Any:
    """A symbolic value at one place, without sympy's own evaluation of conditions."""
    if isinstance(value, Select):
        return evaluate(value.then if evaluate(value.condition, at, leaves) else value.other, at, leaves)
    if isinstance(value, float | int):
        return value
    if value in (sympy.true, sympy.false):
        return value == sympy.true
    if isinstance(value, sympy.And | sympy.Or):
        return (all if isinstance(value, sympy.And) else any)(evaluate(arg, at, leaves) for arg in value.args)
    if isinstance(value, sympy.Ge | sympy.Eq | sympy.Ne):
        compare_with = {sympy.Ge: operator.ge, sympy.Eq: operator.eq, sympy.Ne: operator.ne}[type(value)]
        return bool(compare_with(evaluate(value.lhs, at, leaves), evaluate(value.rhs, at, leaves)))
    if isinstance(value, Element):
        return int(leaves[value.node_name][tuple(evaluate(i, at, leaves) for i in value.indices)])
    if isinstance(value, sympy.Add):
        return sum(evaluate(arg, at, leaves) for arg in value.args)
    if isinstance(value, sympy.Mul):
        product = sympy.Integer(1)
        for arg in value.args:
            product *= evaluate(arg, at, leaves)
        return product
    if isinstance(value, sympy.floor):
        return int(sympy.floor(evaluate(value.args[0], at, leaves)))
    if isinstance(value, sympy.Abs):
        return abs(evaluate(value.args[0], at, leaves))
    if isinstance(value, sympy.Symbol):
        return at[value]
    assert value.is_Rational, value
    return value


class Recorder(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.values = {**getattr(self, "values", {}), n.name: result}
        return result


def check(function: Callable[..., Tensor], *inputs: Tensor) -> Value:
    """Read the result of `function` at symbolic indices and compare every element with the real one."""
    gm, result = graph_of(function, *inputs)
    recorder = Recorder(gm)
    tensor = recorder.run(*inputs)
    space = IndexSpace()
    sizes = sizes_of(result)
    indices = tuple(space.add(f"i{d}", size) for d, size in enumerate(sizes))
    value = Reader(space).element(result, indices)
    for place in itertools.product(*(range(int(size)) for size in sizes)):
        at = dict(zip(indices, place, strict=True))
        read = evaluate(value, at, recorder.values)
        assert float(read) == float(tensor[place]), (place, value)
    return value


def arange(n: int) -> Tensor:
    return torch.arange(n)


WRITTEN: dict[str, Callable[[], Tensor]] = {
    "arange with a step": lambda: torch.arange(3, 20, 4),
    "falling arange": lambda: torch.arange(10, 2, -3),
    "reshape": lambda: arange(24).reshape(2, 3, 4).reshape(6, 4).reshape(3, 2, 4),
    "permute": lambda: arange(24).reshape(2, 3, 4).permute(2, 0, 1),
    "transposed and folded": lambda: arange(24).reshape(2, 3, 4).transpose(0, 1).reshape(6, 4),
    "movedim": lambda: arange(24).reshape(2, 3, 4).movedim(0, 2),
    "slices": lambda: arange(24).reshape(4, 6)[1:, -5:5:2],
    "select": lambda: arange(24).reshape(2, 3, 4)[1, :, -1],
    "expand": lambda: arange(3)[:, None].expand(2, 3, 4),
    "repeat": lambda: arange(6).reshape(2, 3).repeat(2, 2, 2),
    "repeat_interleave": lambda: arange(6).reshape(2, 3).repeat_interleave(3, 1),
    "triangles": lambda: torch.ones(5, 7).tril(1).triu(-2) * 3,
    "arithmetic": lambda: (arange(5)[:, None] * 3 - arange(4) + 2).neg() - 7,
    "rsub": lambda: 5 - torch.sub(arange(6), arange(6) * 2, alpha=3),
    "division": lambda: (arange(20) - 7) // 4 + (arange(20) - 7) % 5,
    "truncating division": lambda: arange(20).div(4, rounding_mode="trunc"),
    "truncating division of negatives": lambda: (arange(20) - 9).div(4, rounding_mode="trunc"),
    "abs": lambda: (arange(9) - 4).abs() < 3,
    "abs, outside": lambda: (arange(9) - 4).abs() >= 3,
    "clamp": lambda: (arange(9) - 4).clamp(-2, 3),
    "minimum": lambda: torch.minimum(arange(9), 8 - arange(9)) + torch.maximum(arange(9), 5 * torch.ones(9).long()),
    "where": lambda: torch.where(arange(6) > 2, arange(6), 10 - arange(6)),
    "logic": lambda: (arange(6) > 2) ^ (arange(6) % 2 == 0) | ~(arange(6) < 5) & (arange(6) != 0),
    "bool arithmetic": lambda: ((arange(6) > 2) * (arange(6) < 5)) + (arange(6) == 0),
    "bool to int": lambda: (arange(6) > 2).int() * 3 + (arange(6) > 4),
    "floats": lambda: (1.0 - (arange(6) > 2).float()) * -1e9,
    "half": lambda: torch.where(arange(6) > 2, torch.full((), 0.1).half(), torch.full((), -65504.0).half()),
    "infinities": lambda: torch.zeros(6).masked_fill(arange(6) > 2, -torch.inf) + torch.full((6,), 2.0),
    "nan is not equal to itself": lambda: torch.full((3,), torch.nan) == torch.full((3,), torch.nan),
    "cat": lambda: torch.cat([arange(3), arange(4) * 2, torch.full((2,), 9)])[1:8],
    "diff": lambda: torch.diff(arange(7) * 3, prepend=torch.full((1,), -5), append=torch.full((2,), 4)),
    "diff of bools": lambda: torch.diff(arange(7) > 3),
    "cumsum": lambda: torch.ones(3, 5, dtype=torch.bool).cumsum(1) + torch.full((3, 5), 2).cumsum(0),
    "cumsum of a range": lambda: arange(5).cumsum(0),
    "index": lambda: arange(12).reshape(3, 4)[arange(3)[:, None], 3 - arange(4)],
    "index, adjacent": lambda: arange(24).reshape(2, 3, 4)[:, arange(2)[:, None], arange(3)],
    "index, apart": lambda: arange(24).reshape(2, 3, 4)[arange(2)[:, None], :, arange(3)],
    "index with a negative number": lambda: arange(12).reshape(3, 4)[:, torch.full((2,), -1)],
    "index that wraps": lambda: arange(6)[arange(6) - 3],
    "index of a dim of one": lambda: arange(4)[None][torch.zeros(3).long()],
    "index_select": lambda: arange(12).reshape(3, 4).index_select(1, arange(2) + 1),
    "gather": lambda: arange(12).reshape(3, 4).gather(1, (arange(3)[:, None] + arange(2)) % 4),
    "narrow integers": lambda: arange(300).to(torch.uint8) + 1,
    "like": lambda: torch.full_like(arange(3), 7) + arange(3).new_ones(3) - torch.zeros_like(arange(3)),
    "detached": lambda: (torch.ones(3) * 2).detach().to(torch.int32),
    "comparison with a float": lambda: (arange(5) >= 2.0) & (arange(5) < 3.5),
}


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", WRITTEN)
def test_read_elements_are_those_of_the_tensor(name: str) -> None:
    check(WRITTEN[name])


def test_what_has_no_symbolic_form() -> None:
    _, result = graph_of(lambda: torch.arange(5).float() * 0.3)
    with pytest.raises(Unreadable) as stop:
        Reader(IndexSpace()).element(result, (q,))
    assert stop.value.node is not None
    assert stop.value.node.target == torch.ops.aten.to.dtype  # a rounded number is none that can be followed


def test_a_leaf_knows_the_call_that_stopped_the_reader() -> None:
    _, result = graph_of(lambda x: (x.sin() * 2 > 0) & (torch.arange(4) > 1), torch.randn(4))
    reader = Reader(IndexSpace())
    value = reader.element(result, (q,))
    (leaf,) = value.atoms(Element)
    assert reader.leaves[leaf.node_name].target == torch.ops.aten.gt.Scalar
    assert reader.stopped_at[leaf.node_name].target == torch.ops.aten.sin.default


def random_integers(rng: random.Random, data: Tensor, depth: int) -> Tensor:
    """A random [2, 1, 6, 6] or smaller integer tensor over batch, query and key indices."""
    if depth == 0:
        base = rng.choice([lambda: torch.arange(6)[:, None], lambda: torch.arange(6), lambda: data[:, None, None, :]])
        return rng.choice([base, lambda: data[:, None, :, None]])()
    a = random_integers(rng, data, depth - 1)
    c = rng.randint(1, 4)
    b = random_integers(rng, data, depth - 1)
    choices: list[Callable[[], Tensor]] = [
        lambda: a + c,
        lambda: c - a,
        lambda: a - b,
        lambda: a * c,
        lambda: a // c,
        lambda: a % c,
        lambda: (a - b).abs(),
        lambda: torch.where(random_mask(rng, data, 0), a, b),
        lambda: a.clamp(max=c),
        lambda: random_mask(rng, data, 0).long() + a,
        lambda: torch.diff(a, dim=-1, prepend=a[..., :1] - 1) if a.shape[-1] == 6 else a,
        lambda: (a * 0 + c).cumsum(-1),
        lambda: a.roll(1, -1),
        lambda: a[..., torch.arange(a.shape[-1])],
    ]
    return rng.choice(choices)()


def random_mask(rng: random.Random, data: Tensor, depth: int) -> Tensor:
    """A random bool mask, broadcastable to [2, 1, 6, 6]."""
    if depth == 0:
        a, b = (random_integers(rng, data, rng.randint(0, 2)) for _ in "ab")
        return rng.choice([torch.le, torch.lt, torch.ge, torch.gt, torch.eq, torch.ne])(a, b)
    a, b = (random_mask(rng, data, depth - 1) for _ in "ab")
    choices: list[Callable[[], Tensor]] = [
        lambda: a & b,
        lambda: a & b,
        lambda: a | b,
        lambda: ~a,
        lambda: torch.where(a, b, a),
        lambda: a.expand(2, 1, 6, 6).tril(rng.randint(-2, 2)),
        lambda: b.expand(2, 1, 6, 6).transpose(-1, -2),
        lambda: a.expand(2, 1, 6, 6).reshape(2, 36).reshape(2, 1, 6, 6),
        lambda: torch.cat([a.expand(2, 1, 6, 6)[:, :, :2], b.expand(2, 1, 6, 6)[:, :, 2:]], 2),
        lambda: torch.zeros(6, 6).masked_fill(a, -torch.inf) == 0,
    ]
    return rng.choice(choices)()


@pytest.mark.thinned(30)
@pytest.mark.parametrize("seed", range(60))
def test_random_masks(seed: int) -> None:
    """Each element, and the AttentionMask where one is found, equals the dense mask."""
    data = torch.randint(0, 4, (2, 6), generator=torch.Generator().manual_seed(seed))
    function = lambda x: random_mask(random.Random(seed), x, 2).expand(2, 1, 6, 6)  # noqa: E731
    check(function, data)
    gm, result = graph_of(function, data)
    recorder = Recorder(gm)
    dense = recorder.run(data)
    space = IndexSpace()
    indices = tuple(space.add(name, size) for name, size in zip("bhqk", sizes_of(result), strict=True))
    reader = Reader(space)
    condition = reader.element(result, indices)
    try:
        structure = match(condition, reader)
    except Unmatched:
        return
    positions = torch.arange(6)
    values = lambda e: torch.tensor(  # noqa: E731
        [[int(evaluate(e, {b: i, k: j}, recorder.values)) for j in range(6)] for i in range(2)]
    )
    mask = structure.mask
    rows = dense.new_ones(dense.shape)
    for document_id in structure.document_ids:
        ids = values(document_id)
        rows = rows & (ids[:, None, :, None] == ids[:, None, None, :])
    if mask.key_padding:
        rows = rows & (values(structure.key_valid) == 1)[:, None, None, :]
    alone = AttentionMask.parse(str(mask).replace("documents", "").replace("key_padding", "").strip() or "full")
    assert torch.equal(rows & alone.allowed(positions, positions), dense), str(mask)
    if every_row_has_a_key(condition, sympy.Integer(6), sympy.Integer(6)):
        assert dense.any(-1).all()


class TestConditions:
    def test_equal_meanings_are_one_object(self) -> None:
        causal = at_least_zero(q - k)
        assert relation("le", k, q) == relation("ge", q, k) == relation("lt", k - 1, q) == causal
        assert negate(relation("gt", k, q)) == causal
        assert negate(negate(causal)) == causal

    def test_what_assumptions_decide(self) -> None:
        assert at_least_zero(q + 1) == sympy.true
        assert at_least_zero(-q - 1) == sympy.false
        assert equal_zero(q + 1) == sympy.false

    def test_absolute_values_open_into_two_bounds(self) -> None:
        inside = relation("lt", sympy.Abs(q - k), sympy.Integer(3))
        assert inside == sympy.And(at_least_zero(2 + q - k), at_least_zero(2 + k - q))
        assert negate(inside) == relation("ge", sympy.Abs(q - k), sympy.Integer(3))

    def test_select_where_both_sides_meet(self) -> None:
        assert either(at_least_zero(-q), sympy.Integer(-1), q - 1) == q - 1
        assert isinstance(either(at_least_zero(-q), sympy.Integer(0), q - 1), Select)

    def test_substitution_normalises_again(self) -> None:
        assert substitute(at_least_zero(q - k), {k: q}) == sympy.true
        element = Element(Str("d"), b, q)
        assert substitute(equal_zero(element - Element(Str("d"), b, k)), {k: q}) == sympy.true

    def test_disjunctions_of_conjunctions_become_clauses(self) -> None:
        one, two = at_least_zero(q - k), at_least_zero(k - 3)
        choice = sympy.Or(sympy.And(two, one), sympy.And(negate(two), one))
        assert is_bool(choice)
        assert one in clauses(choice) or len(clauses(choice)) > 1


def heads_graph(function: Callable[[Tensor], Tensor], *shape: int) -> fx.Node:
    return graph_of(function, torch.randn(shape))[1]


def test_origins_of_heads() -> None:
    node = heads_graph(lambda x: x.sin()[:, :, None].expand(2, 3, 4, 5, 6).reshape(2, 12, 5, 6), 2, 3, 5, 6)
    assert before_repeat(node).target == torch.ops.aten.sin.default
    assert before_repeat(node, repeats_allowed=False) is node
    tiled = heads_graph(lambda x: x.sin().repeat(1, 4, 1, 1), 2, 3, 5, 6)
    assert before_repeat(tiled) is tiled
    folded = heads_graph(lambda x: x.transpose(1, 2).reshape(6, 5, 4), 2, 5, 3, 4)
    assert heads_in_batch(folded) == 3
    swapped = heads_graph(lambda x: x.transpose(0, 1).reshape(6, 5, 4), 2, 3, 5, 4)
    assert heads_in_batch(swapped) == 2  # x [3, 2, ...]: the other dim is inside


def test_a_computed_tensor_is_no_view() -> None:
    node = heads_graph(lambda x: x.sin(), 2, 3)
    assert step(node, (q, k), IndexSpace()) is None
