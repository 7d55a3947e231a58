"""Every rule is run: for each factor that it says may be sharded, the op is computed on shards and compared.

The shards of one factor are put together again (or added up, where the rule says sum) and must be what the op gives on
whole tensors: forward, and the gradient of every floating-point operand, in float64. Elements of the factor are laid
out over two and three ranks in three ways: in order, zigzag, and with more padding than they need. Padding holds other
numbers than the tensor does. A rule that hides a dependence on positions or on neighbours, a wrong reduction, fill or
mean fails one of them. `test_rules_placements.py` has every placement of the operands.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from rule_calls import Call, Spec, call, ints, pos, x
from rules_table import CASES, NONE, SUM
from torch import Tensor

from spcompile.machine.sequence import positions
from spcompile.sharding.rules import LocalCall, OpRule, rule_of
from spcompile.sharding.rules.rule import Dims

DEGREES = (2, 3)
UNDEFINED = ("empty", "empty_like", "new_empty")  # ops whose elements mean nothing: only shapes are compared


@dataclass(frozen=True)
class Layout:
    """Which positions of a factor each rank holds; -1 is padding."""

    factor: str
    size: int
    places: Tensor  # [degree, local size]

    @property
    def degree(self) -> int:
        return self.places.shape[0]

    @property
    def local_size(self) -> int:
        return self.places.shape[1]


def layouts(factor: str, size: int, degree: int) -> list[Layout]:
    """In order, zigzag, and in order with one more element of padding per rank."""
    found = []
    for length, order in ((size, "contiguous"), (size, "zigzag"), (size + degree, "contiguous")):
        places = torch.stack([positions(length, rank, degree, order).long() for rank in range(degree)])
        found.append(Layout(factor, size, torch.where(places < size, places, -1)))
    return found


def flat_names(dims: Dims) -> list[str]:
    return [name for dim in dims for name in dim]


def take(
    whole: Tensor, dims: Dims, sizes: Mapping[str, int], layout: Layout, rank: int, padding: Tensor | None
) -> Tensor:
    """The part of `whole` that `rank` holds, with elements of `padding` (of the same shape) where padding is."""
    names = flat_names(dims)
    if layout.factor not in names:
        return whole
    dim = names.index(layout.factor)
    shape = [sizes[name] for name in names]
    places = layout.places[rank]
    part = whole.reshape(shape).index_select(dim, places.clamp(min=0))
    if padding is not None and (places < 0).any():
        other = padding.reshape(shape).index_select(dim, places.clamp(min=0))
        mask = (places >= 0).view([-1 if d == dim else 1 for d in range(len(shape))])
        part = torch.where(mask, part, other)
    return part.reshape(local_shape(dims, sizes, layout))


def local_shape(dims: Dims, sizes: Mapping[str, int], layout: Layout) -> list[int]:
    shape = []
    for dim in dims:
        size = 1
        for name in dim:
            size *= layout.local_size if name == layout.factor else sizes[name]
        shape.append(size)
    return shape


def put_together(parts: Sequence[Tensor], dims: Dims, sizes: Mapping[str, int], layout: Layout) -> Tensor:
    """The inverse of `take`; padding is dropped."""
    names = flat_names(dims)
    dim = names.index(layout.factor)
    whole = torch.full([sizes[name] for name in names], 77, dtype=parts[0].dtype)
    for rank, part in enumerate(parts):
        valid = layout.places[rank] >= 0
        shape = [layout.local_size if name == layout.factor else sizes[name] for name in names]
        rows = part.reshape(shape).index_select(dim, valid.nonzero().view(-1))
        whole = whole.index_copy(dim, layout.places[rank][valid], rows)
    shape = [1] * len(dims)
    for d, factors in enumerate(dims):
        for name in factors:
            shape[d] *= sizes[name]
    return whole.reshape(shape)


def flatten(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [v for v in value if isinstance(v, Tensor)]


def differentiable(tensor: Tensor) -> bool:
    return tensor.dtype.is_floating_point or tensor.dtype.is_complex


def gradients(results: Sequence[Tensor], operands: Sequence[Tensor], upstream: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients of every operand; None where there is none."""
    pairs = [(r, u) for r, u in zip(results, upstream, strict=True) if r.requires_grad]
    wanted = [t for t in operands if t.requires_grad]
    if not pairs or not wanted:
        return [None for _ in operands]
    found = iter(torch.autograd.grad([r for r, _ in pairs], wanted, [u for _, u in pairs], allow_unused=True))
    return [next(found) if t.requires_grad else None for t in operands]


def equal(found: Tensor, wanted: Tensor, what: str) -> None:
    assert found.shape == wanted.shape, f"{what}: shape {tuple(found.shape)}, should be {tuple(wanted.shape)}"
    assert found.dtype == wanted.dtype, f"{what}: {found.dtype}, should be {wanted.dtype}"
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if found.dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(found, wanted, **tolerance, msg=lambda text: f"{what}: {text}")


class Run:
    """A call with random operands, whole and on shards."""

    def __init__(self, of: Call, rule: OpRule, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.call, self.rule = of, rule
        self.operands: list[Tensor] = []
        self.noise: list[Tensor] = []  # other elements of the same kind, for padding
        self.has_gradient: list[bool] = []

        def collect(arg: Any) -> Any:
            if isinstance(arg, Spec):
                self.operands.append(arg.make(generator))
                self.noise.append(arg.make(generator))
                self.has_gradient.append(arg.gradient and differentiable(self.operands[-1]))
            return arg

        visit((of.args, of.kwargs), collect)
        leaves = self.leaves(self.operands)
        args, kwargs = self.arguments(leaves)
        self.results = flatten(of.op(*args, **kwargs))
        self.upstream = [
            torch.rand(r.shape, generator=generator, dtype=torch.float64).to(r.dtype) for r in self.results
        ]
        self.gradients = gradients(self.results, leaves, self.upstream)

    def leaves(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [t.detach().clone().requires_grad_(grad) for t, grad in zip(tensors, self.has_gradient, strict=True)]

    def arguments(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        remaining = iter(tensors)
        return visit((self.call.args, self.call.kwargs), lambda a: next(remaining) if isinstance(a, Spec) else a)

    def check(self, layout: Layout) -> None:
        """Compares the shards of one factor with the whole."""
        rule, sizes = self.rule, self.rule.sizes
        results, grads = [], []
        for rank in range(layout.degree):
            leaves = self.leaves(self.local_operands(layout, rank))
            local = flatten(self.run_local(leaves, layout, rank))
            for result, dims in zip(local, rule.results, strict=True):
                assert list(result.shape) == local_shape(dims, sizes, layout), f"local shape {tuple(result.shape)}"
            results.append(local)
            grads.append(gradients(local, leaves, self.local_upstream(layout, rank)))
        for i, dims in enumerate(rule.results):
            if self.call.name.split(".")[0] in UNDEFINED:
                continue
            parts = [of_rank[i].detach() for of_rank in results]
            if layout.factor in flat_names(dims):
                found = put_together(parts, dims, sizes, layout)
            elif rule.reductions.get(layout.factor) == "sum":
                found = sum(parts[1:], parts[0])
            else:
                for other in parts[1:]:
                    equal(parts[0], other, f"result {i} on two ranks")
                found = parts[0]
            equal(found, self.results[i].detach(), f"result {i} over {layout.factor}")
        for i, (dims, wanted) in enumerate(zip(rule.operands, self.gradients, strict=True)):
            parts = [of_rank[i] for of_rank in grads if of_rank[i] is not None]
            assert (wanted is None) == (not parts) or i in rule.unread, f"gradient of operand {i}"
            if wanted is None or not parts:
                continue
            sharded = layout.factor in flat_names(dims)
            found = put_together(parts, dims, sizes, layout) if sharded else sum(parts[1:], parts[0])
            equal(found, wanted, f"gradient of operand {i} over {layout.factor}")

    def local_operands(self, layout: Layout, rank: int) -> list[Tensor]:
        parts = []
        for i, (whole, noise, dims) in enumerate(zip(self.operands, self.noise, self.rule.operands, strict=True)):
            if i in self.rule.unread:
                parts.append(whole)
                continue
            reduced = layout.factor in self.rule.reductions and i in self.rule.fills
            padding = torch.full_like(whole, self.rule.fills[i]) if reduced else noise
            parts.append(take(whole, dims, self.rule.sizes, layout, rank, padding))
        return parts

    def local_upstream(self, layout: Layout, rank: int) -> list[Tensor]:
        """Padding has no gradient; a result that is the same on all ranks gets its gradient once."""
        parts = []
        for whole, dims in zip(self.upstream, self.rule.results, strict=True):
            part = take(whole, dims, self.rule.sizes, layout, rank, torch.zeros_like(whole))
            once = layout.factor not in flat_names(dims) and layout.factor not in self.rule.reductions
            parts.append(torch.zeros_like(part) if once and rank > 0 else part)
        return parts

    def run_local(self, tensors: Sequence[Tensor], layout: Layout, rank: int) -> Any:
        args, kwargs = self.arguments(tensors)
        if self.rule.local is None:
            return self.call.op(*args, **kwargs)
        shapes = tuple(tuple(local_shape(dims, self.rule.sizes, layout)) for dims in self.rule.results)
        return self.rule.local(
            LocalCall(args, kwargs, shapes, layout.factor, layout.size, layout.degree, _Rank(layout, rank))
        )


class NotContiguous(Exception):
    """A local form asked for the first of elements that do not stand together."""


@dataclass(frozen=True)
class _Rank:
    layout: Layout
    rank: int

    def first(self, length: int, device: torch.device) -> Tensor:
        places = self.layout.places[self.rank]
        present = places[places >= 0]
        together = torch.arange(len(present)) + places[0]
        if not torch.equal(present, together) or int(places[0]) != self.rank * self.layout.local_size:
            raise NotContiguous
        return places[0]

    def gather(self, x: Tensor) -> Tensor:
        raise AssertionError("completed factors have tests of their own")


def visit(arg: Any, change: Any) -> Any:
    if isinstance(arg, tuple | list):
        return type(arg)(visit(a, change) for a in arg)
    if isinstance(arg, dict):
        return {k: visit(v, change) for k, v in arg.items()}
    return change(arg)


def shardable(rule: OpRule) -> list[str]:
    in_results = {name for dims in rule.results for name in flat_names(dims)}
    unread_only = frozenset(name for i in rule.unread for name in flat_names(rule.operands[i])) - in_results
    elsewhere = rule.replicated | unread_only | rule.completed
    return [name for name in rule.sizes if name not in elsewhere]


def check(of: Call, rule: OpRule) -> None:
    """Runs a call on shards of every factor that its rule says may be sharded."""
    for seed, degree in enumerate(DEGREES):
        run = Run(of, rule, seed)
        for factor in shardable(rule):
            for layout in layouts(factor, rule.sizes[factor], degree):
                with suppress(NotContiguous):
                    run.check(layout)


def rule_for(of: Call) -> OpRule:
    rule = rule_of(of.node())
    assert rule is not None
    return rule


# A letter outside brackets is a factor that may be sharded; those that ranks complete have tests of their own.
RUNNABLE = [c for c, text in CASES if re.search(r"(?<!\[)\b([a-z])\b(?!:)(?!.*\b\1: complete)", text)]


@pytest.mark.parametrize("of", RUNNABLE, ids=[c.name for c in RUNNABLE])
def test_shards_compute_what_the_whole_computes(of: Call) -> None:
    rule = rule_for(of)
    assert shardable(rule)
    check(of, rule)


# Calls, the finest factors of their first operand's dims, and the rule where ranks have parts of their own.
APART: list[tuple[Call, list[list[int]], str]] = [
    (call("slice.Tensor", x(6, 5), 0, 2, 6), [[3, 2], [5]], "([d] b) c -> ([a] b) c"),
    (call("slice.Tensor", x(6, 5), 0, -2, 6), [[3, 2], [5]], "([c] a) b -> a b"),
    (call("slice.Tensor", x(12, 5), 0, 2, 6), [[3, 2, 2], [5]], "([d] b) c -> ([a] b) c"),
    (call("slice.Tensor", x(6, 5), 0, 1, 3), [[3, 2], [5]], "[c] b -> [a] b"),
    (call("slice.Tensor", x(6, 5), 0, 0, 2), [[6], [5]], "[c] b -> [a] b"),
    (call("slice.Tensor", x(6, 5), 0, 0, 6, 2), [[3, 2], [5]], "[c] b -> [a] b"),
    (call("narrow", x(6, 5), 0, 2, 2), [[3, 2], [5]], "([c] a) b -> a b"),
    (call("chunk", x(5, 4), 2, 1), [[5], [2, 2]], "a ([c] b) -> a b, a b"),
    (call("split_with_sizes", x(6, 5), [2, 4]), [[3, 2], [5]], "([d] a) b -> a b, ([c] a) b"),
    (call("cat", [x(2, 5), x(2, 5)]), [[2], [5]], "b c, b c -> ([a] b) c"),
    (call("cat", [x(4, 5), x(2, 5)]), [[4], [5]], "([d] b) c, b c -> ([a] b) c"),
    (call("cat", [x(4, 5), x(3, 5)]), [[4], [5]], "[c] b, [d] b -> [a] b"),
    (call("cat", [x(1, 5), x(1, 5)]), [[], [5]], "1 b, 1 b -> [a] b"),
]


@pytest.mark.parametrize(("of", "dims", "text"), APART, ids=[f"{c.name} {text}" for c, _, text in APART])
def test_rules_where_ranks_have_parts_of_their_own(of: Call, dims: list[list[int]], text: str) -> None:
    plain = rule_for(of)
    rule = plain.apart(dims) if plain.apart is not None else plain
    assert rule.text() == text
    check(of, rule)


NOTHING: frozenset[str] = frozenset()
WRONG: list[tuple[str, Call, dict[str, Any]]] = [
    ("softmax over shards", call("softmax.int", x(4, 6), -1), {"replicated": NOTHING}),
    ("normalization over shards", call("layer_norm", x(4, 6), [6], x(6), x(6)), {"replicated": NOTHING}),
    ("scan over shards", call("cumsum", x(4, 6), 1), {"replicated": NOTHING}),
    ("shift over shards", call("roll", x(4, 6), [1], [1]), {"replicated": NOTHING}),
    ("order over shards", call("sort", x(4, 6), 1), {"replicated": NOTHING}),
    ("triangle that does not know its rows", call("tril", x(4, 6)), {"local": None}),
    ("positions over shards", call("arange", 4), {"replicated": NOTHING}),
    ("gather over shards", call("gather", x(4, 6), 1, ints(6, 4, 6)), {"operands": (((), ("b",)), (("a",), ("b",)))}),
    ("contraction without a sum", call("linear", x(4, 6), x(2, 6)), {"reductions": {}}),
    (
        "bias added by every rank",
        call("linear", x(4, 6), x(2, 6), x(2)),
        {"reductions": {"c": "sum"}, "replicated": NOTHING},
    ),
    ("padding that counts", call("linear", x(4, 6), x(2, 6)), {"fills": {}}),
    ("padding that counts", call("sum", x(4, 6)), {"fills": {0: 1.0}}),
    (
        "padding whose loss is log 2",
        call("binary_cross_entropy_with_logits", x(4), pos(4)),
        {"fills": {0: 0.0, 1: 0.0}},
    ),
    ("padded rows that count", call("cross_entropy_loss", x(4, 6), ints(6, 4), None, SUM), {"fills": {1: 0.0}}),
    ("a sum of means", call("mean", x(4, 6)), {"local": None}),
    ("a sum of mean losses", call("mse_loss", x(4, 6), x(4, 6)), {"local": None}),
    (
        "a sum of mean losses",
        call("cross_entropy_loss", x(4, 6), ints(6, 4)),
        {"reductions": {"a": "sum"}, "replicated": frozenset("b")},
    ),
    (
        "classes over shards",
        call("nll_loss", x(4, 6), ints(6, 4), None, NONE),
        {"replicated": NOTHING},
    ),
    ("a sum of logarithms", call("logsumexp", x(4, 6), [1]), {"reductions": {"b": "sum"}, "replicated": NOTHING}),
    ("major and minor exchanged", call("view", x(4, 6), [24]), {"results": ((("b", "a"),),)}),
    ("repeat taken for interleave", call("repeat", x(4, 6), [1, 2]), {"results": ((("a",), ("c", "b")),)}),
    ("global sizes", call("view", x(4, 6), [24]), {"local": None}),
    ("global sizes", call("full", [4, 6], 2.5), {"local": None}),
    (
        "causal by local positions",
        call("scaled_dot_product_attention", x(2, 2, 4, 6), x(2, 2, 4, 6), x(2, 2, 4, 6), is_causal=True),
        {"replicated": frozenset("efg")},
    ),
]


@pytest.mark.parametrize(("what", "of", "change"), WRONG, ids=[what for what, _, _ in WRONG])
def test_a_wrong_rule_fails(what: str, of: Call, change: dict[str, Any]) -> None:
    right = rule_for(of)
    check(of, right)
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        check(of, dataclasses.replace(right, **change))
