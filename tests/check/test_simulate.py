"""The simulator: programs written with collectives against the plain program they shard, forward and gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx as fx
from torch.fx.experimental.proxy_tensor import make_fx

from spcompile.check.simulate import Simulator, register_spec, simulate
from spcompile.collectives import COLLECTIVES, Call
from spcompile.machine.mesh import MeshShape

spx = torch.ops.spx
c10d = torch.ops._c10d_functional
F64 = torch.float64
_LIBRARY = torch.library.Library("spx", "FRAGMENT")


def graph_of(function: Callable[..., Any], *inputs: torch.Tensor) -> fx.GraphModule:
    """The per-rank graph, with shapes of rank 0."""
    return make_fx(function, tracing_mode="fake", pre_dispatch=True)(*inputs)


def replicas(x: torch.Tensor, ranks: int) -> list[torch.Tensor]:
    return [x.detach().clone().requires_grad_(x.is_floating_point()) for _ in range(ranks)]


def assert_every_rank_equals(found: list[torch.Tensor], expected: torch.Tensor) -> None:
    for value in found:
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize(("degree", "length"), [(1, 5), (2, 5), (3, 6), (4, 7)])
def test_context_parallel_mlp_with_loss(degree: int, length: int, order: str) -> None:
    """Positions are sharded, weights used by all, a mean over positions: the loss and each gradient of one device."""

    def plain(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = torch.tanh(x @ w)
        return (h * h).mean(), h

    def local(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = spx.shard(x, 1, "cp", degree, order, 7.0)
        h = torch.tanh(x @ spx.vary(w, "cp", degree))
        total = spx.mask_padding(h * h, 1, length, "cp", degree, order, 0.0).sum()
        loss = spx.all_reduce(total, "cp", degree, "I") / (2 * length * 4)
        return loss, spx.all_gather(h, 1, length, "cp", degree, order, "I")

    x, w = torch.randn(2, length, 3, dtype=F64, requires_grad=True), torch.randn(3, 4, dtype=F64, requires_grad=True)
    loss, h = plain(x, w)
    h_grad = torch.randn_like(h)
    torch.autograd.backward([loss, h], [torch.ones_like(loss), h_grad])

    xs, ws = replicas(x, degree), replicas(w, degree)
    results = simulate(graph_of(local, x.detach(), w.detach()), list(zip(xs, ws, strict=True)), {"cp": degree})
    losses, hs = zip(*results, strict=True)
    torch.autograd.backward([*losses, *hs], [*map(torch.ones_like, losses), *[h_grad] * degree])
    assert_every_rank_equals(list(losses), loss)
    assert_every_rank_equals(list(hs), h)
    assert_every_rank_equals([x_.grad for x_ in xs], x.grad)
    assert_every_rank_equals([w_.grad for w_ in ws], w.grad)


def test_megatron_block_inside_context_parallel_on_a_two_axis_mesh() -> None:
    """The axis tp shards the hidden size, cp the positions: gather before, reduce-scatter after, gradients of one."""
    mesh = MeshShape.of({"tp": 2, "cp": 3})

    def plain(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (torch.relu(x @ a) @ b).sin().sum()

    def local(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        x = spx.shard(x, 0, "cp", 3, "contiguous", 0.0)
        a, b = spx.vary(a, "cp", 3), spx.vary(b, "cp", 3)
        a, b = spx.shard(a, 1, "tp", 2, "contiguous", 0.0), spx.shard(b, 0, "tp", 2, "contiguous", 0.0)
        x = spx.shard(x, 0, "tp", 2, "contiguous", 0.0)
        whole = spx.all_gather(x, 0, 4, "tp", 2, "contiguous", "R")
        part = spx.reduce_scatter(torch.relu(whole @ a) @ b, 0, "tp", 2, "contiguous")
        return spx.all_reduce(spx.all_reduce(part.sin().sum(), "tp", 2, "I"), "cp", 3, "I")

    inputs = [torch.randn(*shape, dtype=F64, requires_grad=True) for shape in ((12, 3), (3, 6), (6, 5))]
    loss = plain(*inputs)
    loss.backward()
    copies = [replicas(x, 6) for x in inputs]
    losses = Simulator(mesh).run(graph_of(local, *[x.detach() for x in inputs]), list(zip(*copies, strict=True)))
    torch.autograd.backward(losses)
    assert_every_rank_equals(losses, loss)
    for copy, x in zip(copies, inputs, strict=True):
        assert_every_rank_equals([c.grad for c in copy], x.grad)


def test_a_forgotten_vary_is_seen_in_the_gradient() -> None:
    """What the simulator is for: the loss is right, the gradient of w is one rank's term only."""

    def local(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return spx.all_reduce((spx.shard(x, 0, "cp", 2, "contiguous", 0.0) * w).sum(), "cp", 2, "I")

    x, w = torch.randn(4, dtype=F64), torch.randn((), dtype=F64)
    ws = replicas(w, 2)
    losses = simulate(graph_of(local, x, w), [[x, w_] for w_ in ws], {"cp": 2})
    torch.autograd.backward(losses)
    assert_every_rank_equals(losses, (x * w).sum())
    assert [w_.grad.item() for w_ in ws] == [x[:2].sum().item(), x[2:].sum().item()]


def test_a_wrong_dual_is_seen_in_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward of a gather to R without its sum: the loss stays right, the gradient does not."""
    gather = COLLECTIVES[spx.all_gather.default]

    def without_sum(x: torch.Tensor, **arguments: Any) -> Call:
        return gather.dual(x, **{**arguments, "to": "I"})

    def local(x: torch.Tensor) -> torch.Tensor:
        part = spx.shard(x, 0, "cp", 2, "contiguous", 0.0)
        whole = spx.all_gather(part, 0, 4, "cp", 2, "contiguous", "R")
        return spx.all_reduce((whole.sum() * part).sum(), "cp", 2, "I")

    def gradient(x: torch.Tensor) -> torch.Tensor:
        xs = replicas(x, 2)
        losses = simulate(graph_of(local, x), [[x_] for x_ in xs], {"cp": 2})
        torch.autograd.backward(losses)
        assert_every_rank_equals(losses, x.sum() ** 2)
        return xs[0].grad

    x = torch.randn(4, dtype=F64)
    torch.testing.assert_close(gradient(x), 2 * x.sum().expand(4), rtol=1e-12, atol=1e-12)
    monkeypatch.setitem(COLLECTIVES, gather.op, dataclasses.replace(gather, dual=without_sum))
    assert not torch.allclose(gradient(x), 2 * x.sum().expand(4))


def test_second_derivatives_follow_the_duals() -> None:
    def local(x: torch.Tensor) -> torch.Tensor:
        part = spx.shard(x, 0, "cp", 2, "contiguous", 0.0)
        return spx.all_reduce((part**3).sum(), "cp", 2, "I")

    x = torch.randn(4, dtype=F64)
    xs = replicas(x, 2)
    losses = simulate(graph_of(local, x), [[x_] for x_ in xs], {"cp": 2})
    first = torch.autograd.grad(losses, xs, create_graph=True)
    assert_every_rank_equals(list(first), 3 * x**2)
    second = torch.autograd.grad([g.sum() for g in first], xs)
    assert_every_rank_equals(list(second), 6 * x)


def test_groups_are_row_major() -> None:
    simulator = Simulator(MeshShape.of({"dp": 2, "tp": 1, "cp": 3}))
    assert simulator.groups("cp") == [[0, 1, 2], [3, 4, 5]]
    assert simulator.groups("dp") == [[0, 3], [1, 4], [2, 5]]
    with pytest.raises(ValueError, match="axis 'pp' is not in the mesh dp=2 tp=1 cp=3"):
        simulator.groups("pp")


def test_replicated_random_numbers_are_equal_on_all_ranks() -> None:
    gm = graph_of(lambda x: (torch.ops.aten.rand_like(x), torch.ops.aten.rand_like(x)), torch.empty(3))
    torch.manual_seed(3)
    expected = torch.rand(3), torch.rand(3)
    torch.manual_seed(3)
    for result in simulate(gm, [[torch.empty(3)]] * 3, {"cp": 3}):
        assert torch.equal(torch.stack(list(result)), torch.stack(expected))


def functional(function: Callable[[fx.Graph, fx.Node], fx.Node]) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(function(graph, graph.placeholder("x")))
    return fx.GraphModule(torch.nn.Module(), graph)


@pytest.mark.parametrize("in_flight", ["poison", "late"])
def test_a_started_collective_is_poison_until_its_wait(in_flight: Any) -> None:
    def early(graph: fx.Graph, x: fx.Node) -> Any:
        started = graph.call_function(c10d.all_reduce.default, (x, "sum", "cp"))
        read = graph.call_function(torch.ops.aten.mul.Tensor, (started, 2))
        return read, graph.call_function(c10d.wait_tensor.default, (started,))

    simulator = Simulator(MeshShape.of({"cp": 2}), in_flight)
    results = simulator.run(functional(early), [[torch.ones(2)], [torch.ones(2)]])
    for read, waited in results:
        assert read.isnan().all()
        assert torch.equal(waited, torch.full((2,), 2.0))
    for dtype, poison in ((torch.int64, -2), (torch.bool, 2)):
        x = torch.zeros(2, dtype=dtype)
        assert simulator.run(functional(early), [[x], [x]])[0][0].tolist() == [poison, poison]


@pytest.mark.parametrize(("in_flight", "expected"), [("poison", 3.0), ("late", 0.0)])
def test_an_operand_overwritten_in_flight(in_flight: Any, expected: float) -> None:
    def overwrite(graph: fx.Graph, x: fx.Node) -> Any:
        started = graph.call_function(c10d.all_reduce.default, (x, "sum", "cp"))
        graph.call_function(torch.ops.aten.zero_.default, (x,))
        return graph.call_function(c10d.wait_tensor.default, (started,))

    results = Simulator(MeshShape.of({"cp": 2}), in_flight).run(
        functional(overwrite), [[torch.ones(1)], [torch.ones(1) * 2]]
    )
    assert [r.item() for r in results] == [expected, expected]


def test_waiting_through_a_view_and_never() -> None:
    def through_view(graph: fx.Graph, x: fx.Node) -> Any:
        started = graph.call_function(c10d.all_gather_into_tensor.default, (x, 2, "cp"))
        return graph.call_function(
            c10d.wait_tensor.default, (graph.call_function(torch.ops.aten.view.default, (started, [2, 2])),)
        )

    simulator = Simulator(MeshShape.of({"cp": 2}))
    inputs = [[torch.tensor([1.0, 2.0])], [torch.tensor([3.0, 4.0])]]
    assert [r.tolist() for r in simulator.run(functional(through_view), inputs)] == [[[1, 2], [3, 4]]] * 2
    never = functional(lambda graph, x: graph.call_function(c10d.all_reduce.default, (x, "sum", "cp")))
    with pytest.raises(RuntimeError, match="2 started collectives were never waited for"):
        simulator.run(never, inputs)


def test_uneven_all_to_all() -> None:
    graph = fx.Graph()
    x, out, sent = (graph.placeholder(name) for name in ("x", "out", "sent"))
    started = graph.call_function(c10d.all_to_all_single.default, (x, out, sent, "cp"))
    graph.output(graph.call_function(c10d.wait_tensor.default, (started,)))
    gm = fx.GraphModule(torch.nn.Module(), graph)
    inputs = [[torch.tensor([1, 2, 3]), [1, 0], [1, 2]], [torch.tensor([]).long(), [2, 0], [0, 0]]]
    assert [r.tolist() for r in simulate(gm, inputs, {"cp": 2})] == [[1], [2, 3]]


def test_errors_name_the_node() -> None:
    gm = functional(lambda graph, x: graph.call_function(spx.vary.default, (x, "cp", 3)))
    with pytest.raises(RuntimeError, match=r"degree 3 in a group of 2\s+in .*spx\.vary"):
        simulate(gm, [[torch.ones(2)]] * 2, {"cp": 2})
    gm = functional(lambda graph, x: graph.call_function(c10d.broadcast.default, (x, 0, "cp")))
    with pytest.raises(RuntimeError, match=r"no spec of _c10d_functional\.broadcast"):
        simulate(gm, [[torch.ones(2)]] * 2, {"cp": 2})


def test_an_op_with_registered_specs() -> None:
    """A ring shift of (x, y): x goes on by one rank, y stays; its gradient goes back by one rank."""
    _LIBRARY.define("test_ring_shift(Tensor x, Tensor? mask, Tensor y, str axis, int degree) -> (Tensor, Tensor)")
    op = spx.test_ring_shift.default

    def forward(calls: list[tuple[Any, ...]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(calls[rank - 1][0].clone(), 2 * calls[rank][2]) for rank in range(len(calls))]

    def backward(calls: list[Any], results: list[Any], grads: list[Any]) -> list[Any]:
        ranks = range(len(calls))
        return [(grads[(rank + 1) % len(calls)][0], None, 2 * grads[rank][1]) for rank in ranks]

    register_spec(op, forward, backward)
    with pytest.raises(ValueError, match="has a spec already"):
        register_spec(op, forward, backward)
    graph = fx.Graph()
    shifted = graph.call_function(op, (graph.placeholder("x"), None, graph.placeholder("y"), "cp", 3))
    graph.output(shifted)
    xs, ys = [[torch.full((1,), float(r + k), requires_grad=True) for r in range(3)] for k in (0, 10)]
    results = simulate(fx.GraphModule(torch.nn.Module(), graph), list(zip(xs, ys, strict=True)), {"cp": 3})
    assert [(a.item(), b.item()) for a, b in results] == [(2, 20), (0, 22), (1, 24)]
    torch.autograd.backward([a for a, _ in results], [torch.full((1,), float(r)) for r in range(3)])
    assert [x.grad.item() for x in xs] == [1, 2, 0]
    assert [y.grad.item() for y in ys] == [0, 0, 0]


def test_values_can_be_observed() -> None:
    seen: dict[str, int] = {}
    gm = functional(lambda graph, x: graph.call_function(torch.ops.aten.neg.default, (x,)))
    Simulator(MeshShape.of({"cp": 2})).run(
        gm, [[torch.ones(1)]] * 2, lambda node, vals: seen.update({node.name: len(vals)})
    )
    assert seen == {"x": 2, "neg_default": 2}
