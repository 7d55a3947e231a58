"""Propagation and the minimum cut on graphs made by hand."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensorMode

from spcompile.graph.reshard import Place
from spcompile.sharding.index_spaces import IndexSpaces, find_index_spaces
from spcompile.sharding.layout import NodeLayout
from spcompile.sharding.propagate import Choice, Placements, propagate
from spcompile.sharding.sequences import sequence_seeds
from spcompile.sharding.sharded_or_replicated import sharded_calls, trained_values

aten = torch.ops.aten


class Builder:
    """A graph of calls with example values."""

    def __init__(self) -> None:
        self.graph, self.mode = fx.Graph(), FakeTensorMode()

    def input(self, *shape: int, grad: bool = False) -> fx.Node:
        node = self.graph.placeholder(f"x{len(self.graph.nodes)}")
        node.meta["val"] = self.mode.from_tensor(torch.randn(*shape))
        node.meta["trainable"] = grad
        return node

    def call(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(op, args, kwargs)
        values = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.mode:
            node.meta["val"] = op(*values[0], **values[1])
        return node


def attention(b: Builder, q: fx.Node, k: fx.Node) -> fx.Node:
    return b.call(torch.ops.spx.attention.default, q, k, k, *[None] * 6, "full", 1.0)


def run(b: Builder) -> tuple[IndexSpaces, Placements]:
    spaces = find_index_spaces(b.graph)
    return spaces, propagate(spaces, sequence_seeds(spaces))


def test_the_seeds_are_the_rows_of_attention() -> None:
    b = Builder()
    q = b.input(2, 2, 7, 4)
    node = attention(b, q, q)
    spaces, found = run(b)
    assert sequence_seeds(spaces) == {node: Choice("s")}
    assert found.places[q, 0] == Place(2)
    assert found.places[node, 0] == found.places[node, 1] == Place(2)  # out and lse


def test_placements_know_where_they_came_from() -> None:
    b = Builder()
    x = b.input(2, 2, 7, 4)
    doubled = b.call(aten.mul.Tensor, x, 2)
    node = attention(b, doubled, doubled)
    _, found = run(b)
    assert found.origin(x) == [x, doubled, node]


def test_what_does_not_reach_attention_stays_whole() -> None:
    b = Builder()
    q, other = b.input(2, 2, 7, 4), b.input(2, 2, 7, 4)
    attention(b, q, q)
    apart = b.call(aten.mul.Tensor, other, 2)
    _, found = run(b)
    assert (other, 0) not in found.places
    assert apart not in found.choices


def test_an_op_that_mixes_positions_stops_the_walk() -> None:
    b = Builder()
    q = b.input(2, 2, 7, 4)
    node = attention(b, q, q)
    out = b.call(operator.getitem, node, 0)
    total = b.call(aten.cumsum.default, out, 2)
    after = b.call(aten.mul.Tensor, total, 2)
    _, found = run(b)
    assert total not in found.choices
    assert after not in found.choices


def test_the_nearer_seed_wins() -> None:
    """Two attentions over other dims of one value: each call on the way keeps the choice that reached it first."""
    b = Builder()
    x = b.input(2, 7, 7, 4)
    turned = b.call(aten.transpose.int, x, 1, 2)
    near = attention(b, x, x)
    far = attention(b, turned, turned)
    found = propagate(find_index_spaces(b.graph), {near: Choice("s"), far: Choice("s")})
    assert found.places[x, 0] == Place(2)
    assert found.choices[near] == found.choices[far] == Choice("s")


def test_attentions_along_two_dims_are_split_over_one() -> None:
    """The second one has the rows of the first for its batch, or for its heads."""
    b = Builder()
    x = b.input(2, 7, 8, 4)
    first, second = attention(b, x, x), attention(b, *[b.call(aten.transpose.int, x, 1, 2)] * 2)
    assert sequence_seeds(find_index_spaces(b.graph)) == {first: Choice("s"), second: Choice("g")}


def test_windows_are_split_and_not_their_rows() -> None:
    """Also where few windows are on one rank; of fewer windows than ranks the rows are split."""
    b = Builder()
    x = b.input(5, 12, 4)
    cut = b.call(aten.reshape.default, b.call(aten.sin.default, x), [5 * 3, 1, 4, 4])
    node = attention(b, cut, cut)
    spaces = find_index_spaces(b.graph)
    entries = {spaces.dims(x)[0][0]}
    assert sequence_seeds(spaces, entries, 3) == {node: Choice("b", 1)}
    assert sequence_seeds(spaces, entries, 4) == {node: Choice("s")}


def annotated(b: Builder) -> None:
    spaces, found = run(b)
    for node, dims in spaces.values.items():
        places = {number: found.places[node, number] for number in range(len(dims)) if (node, number) in found.places}
        choice = {"cp": found.choices[node]} if node in found.choices else {}
        node.meta["layout"] = NodeLayout(dims, spaces.calls.get(node), choice, {"cp": places} if places else {})


def test_calls_on_the_path_of_a_gradient_always_run_sharded() -> None:
    b = Builder()
    x = b.input(2, 2, 7, 4, grad=True)
    doubled = b.call(aten.mul.Tensor, x, 2)
    node = attention(b, doubled, doubled)
    b.graph.output((b.call(operator.getitem, node, 0), doubled))
    annotated(b)
    assert trained_values(b.graph) >= {x, doubled, node}
    assert doubled in sharded_calls(b.graph, "cp")


def test_a_cheap_call_that_is_needed_whole_runs_replicated() -> None:
    """Labels * 2 is read whole by cumsum: computing it everywhere costs less than a gather."""
    b = Builder()
    x, labels = b.input(2, 2, 7, 4, grad=True), b.input(2, 2, 7, 4)
    doubled = b.call(aten.mul.Tensor, labels, 2)
    whole = b.call(aten.cumsum.default, doubled, 2)
    both = b.call(aten.add.Tensor, b.call(aten.add.Tensor, x, doubled), whole)
    node = attention(b, both, both)
    b.graph.output((b.call(operator.getitem, node, 0),))
    annotated(b)
    sharded = sharded_calls(b.graph, "cp")
    assert doubled not in sharded
    assert {both, node} <= sharded


def test_a_call_that_only_sharded_calls_read_runs_sharded() -> None:
    b = Builder()
    x, y = b.input(2, 2, 7, 4, grad=True), b.input(2, 2, 7, 4)
    doubled = b.call(aten.mul.Tensor, y, 2)
    both = b.call(aten.add.Tensor, x, doubled)
    node = attention(b, both, both)
    b.graph.output((b.call(operator.getitem, node, 0),))
    annotated(b)
    assert doubled in sharded_calls(b.graph, "cp")


def test_parts_of_a_split_lie_where_the_split_puts_them_whatever_their_reader_asked_for() -> None:
    """Rows of one attention are channels of what came split by rows of another."""
    b = Builder()
    x_BSD = b.input(2, 20, 12)
    both = b.call(aten.split.Tensor, x_BSD, 4, 2)
    parts = [b.call(operator.getitem, both, i) for i in range(3)]
    channels = [b.call(aten.permute.default, b.call(aten.view.default, p, [2, 20, 1, 4]), [0, 2, 3, 1]) for p in parts]
    b.call(torch.ops.spx.attention.default, *channels, *[None] * 6, "full", 1.0)
    rows = b.call(aten.view.default, x_BSD, [2, 1, 20, 12])
    attention(b, rows, rows)
    spaces, found = run(b)
    assert found.choices[both] == Choice(spaces.calls[both].rule.operands[0][1][0])
    assert found.places[x_BSD, 0] == Place(1)
    assert [found.places[part, 0] for part in parts] == [Place(1)] * 3
