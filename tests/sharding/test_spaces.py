"""Index spaces: unification of products, and what a whole graph's dims turn out to share."""

from __future__ import annotations

import itertools
import math

import hypothesis.strategies as st
import torch
import torch.nn.functional as F
from example_numerics import captured
from hypothesis import given
from torch import Tensor

from spcompile.sharding.index_spaces import find_index_spaces
from spcompile.sharding.spaces import Space, leaves, unify

FACTORS = st.lists(st.sampled_from([2, 3, 4, 5]), min_size=1, max_size=5)


def merged(sizes: list[int], borders: list[int]) -> list[int]:
    """Products of neighbouring sizes, cut at `borders`."""
    cuts = sorted({0, len(sizes), *(b % (len(sizes) + 1) for b in borders)})
    return [math.prod(sizes[a:b]) for a, b in itertools.pairwise(cuts)]


@given(FACTORS, st.lists(st.integers(0, 5)), st.lists(st.integers(0, 5)))
def test_two_groupings_of_one_product_unify(sizes: list[int], first: list[int], second: list[int]) -> None:
    left, right = ([Space(n) for n in merged(sizes, borders)] for borders in (first, second))
    assert unify(left, right)
    assert leaves(left) == leaves(right)
    assert math.prod(space.size for space in leaves(left)) == math.prod(sizes)


@given(FACTORS, st.lists(st.integers(0, 5)))
def test_unification_is_idempotent(sizes: list[int], borders: list[int]) -> None:
    left, right = [Space(n) for n in sizes], [Space(n) for n in merged(sizes, borders)]
    unify(left, right)
    found = leaves(left)
    assert unify(right, left)
    assert leaves(left) == found


def test_a_space_on_both_sides_is_split_on_both() -> None:
    a, b = Space(2), Space(4)
    assert unify([a, b], [b, a])
    assert [space.size for space in leaves([a, b])] == [2, 2, 2]


def test_dims_that_are_cut_in_other_places_stay_whole() -> None:
    def shuffled(h: Tensor) -> Tensor:
        return h + h.view(2, 3, 4, 5).transpose(1, 2).reshape(2, 12, 5)

    graph = captured(shuffled, torch.randn(2, 12, 5)).graph
    (add,) = (node for node in graph.nodes if node.target is torch.ops.aten.add.Tensor)
    call = find_index_spaces(graph).calls[add]
    assert call.rule.replicated == {"b"}
    assert call.rule.text() == "a [b] c, a [b] c -> a [b] c"


def test_borders_that_do_not_divide() -> None:
    assert not unify([Space(4), Space(6)], [Space(6), Space(4)])
    assert not unify([Space(4)], [Space(4), Space(2)])


def test_a_split_is_seen_by_all_dims_of_a_class() -> None:
    a, b = Space(6), Space(6)
    a.unite(b)
    unify([b], [Space(2), Space(3)])
    assert [space.size for space in leaves([a])] == [2, 3]


def test_unequal_sizes_are_never_one_space() -> None:
    a, b = Space(4), Space(6)
    unify([a], [b])
    assert a.find() is not b.find()


def test_the_sequence_through_a_flattened_dim() -> None:
    """[B, S, D] -> [B * S, D] -> [B, S, 2, D / 2] -> [B, 2, S, D / 2]: one space S, one space B."""

    def heads(h: Tensor, w: Tensor) -> Tensor:
        flat = h.reshape(-1, 4) @ w
        return flat.reshape(2, 7, 2, 2).transpose(1, 2)

    graph = captured(heads, torch.randn(2, 7, 4), torch.randn(4, 4)).graph
    spaces = find_index_spaces(graph)
    h, *_ = (n for n in graph.nodes if n.op == "placeholder")
    result = next(n for n in reversed(graph.nodes) if n.op == "call_function")
    assert spaces.dims(result)[2] == spaces.dims(h)[1]
    assert spaces.dims(result)[0] == spaces.dims(h)[0]


def test_equal_sizes_that_meet_nowhere_stay_apart() -> None:
    graph = captured(lambda a, b: (a.sum(0), b.sum(0)), torch.randn(5, 3), torch.randn(5, 3)).graph
    a, b = (n for n in graph.nodes if n.op == "placeholder")
    spaces = find_index_spaces(graph)
    assert spaces.dims(a)[0] != spaces.dims(b)[0]


def test_a_matmul_with_itself_makes_both_rows_one_space() -> None:
    graph = captured(lambda h: F.linear(h, h), torch.randn(5, 3)).graph
    spaces = find_index_spaces(graph)
    product = next(n for n in graph.nodes if n.op == "call_function")
    assert spaces.dims(product)[0] == spaces.dims(product)[1]


def test_results_of_an_op_without_a_rule_are_new_spaces() -> None:
    graph = captured(lambda h: torch.special.bessel_j0(h) + 1, torch.eye(4)).graph
    spaces = find_index_spaces(graph)
    (h,) = (n for n in graph.nodes if n.op == "placeholder")
    result = h.next
    assert result not in spaces.calls
    assert spaces.dims(result)[0] != spaces.dims(h)[0]
