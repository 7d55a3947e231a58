"""Which collectives have a group of their own, by the graph alone, and how such groups are made."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.fx as fx
from final_graphs import final_graphs, llama, tokens

from spcompile import backend
from spcompile.diagnostics import IllegalOption
from spcompile.graph.axes import axis_argument, bind_axes, groups_of
from spcompile.machine import mesh
from spcompile.options import Options
from spcompile.schedule.channels import channels_of

c10d = torch.ops._c10d_functional
aten = torch.ops.aten


def reductions(op: Any, *rest: Any) -> tuple[fx.Graph, fx.Node, fx.Node]:
    """A graph with a reduction whose parts leave it, and one that is multiplied with something."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(8)
    found = []
    for _ in range(2):
        start = graph.call_function(op, (x, *rest))
        wait = graph.call_function(c10d.wait_tensor.default, (start,))
        for node in (start, wait):
            node.meta["val"] = torch.empty(8)
        found.append((start, wait))
    view = graph.call_function(aten.view.default, (found[0][1], [2, 4]))
    view.meta["val"] = torch.empty(2, 4)
    product = graph.call_function(aten.mul.Tensor, (found[1][1], 2.0))
    product.meta["val"] = torch.empty(8)
    graph.output((view, product, found[1][1]))
    return graph, found[0][0], found[1][0]


@pytest.mark.parametrize(
    ("op", "rest"), [(c10d.all_reduce.default, ("sum", "cp")), (c10d.reduce_scatter_tensor.default, ("sum", 2, "cp"))]
)
def test_only_sums_that_leave_the_graph_are_gradients(op: Any, rest: Any) -> None:
    graph, leaves, _ = reductions(op, *rest)
    channels = channels_of(graph)
    assert channels == {leaves: "gradients"}
    assert groups_of(graph, channels) == ["cp", "cp/gradients"]
    assert bind_axes(graph, {"cp": "7", "cp/gradients": "8"}, channels) == 2
    places = [node.args[axis_argument(node.target)] for node in graph.nodes if axis_argument(node.target) is not None]
    assert places == ["8", "7"]
    assert groups_of(graph, channels) == []


def test_gathers_and_exchanges_stay_on_the_group_of_the_axis() -> None:
    graph, *_ = reductions(c10d.all_gather_into_tensor.default, 2, "cp")
    assert not channels_of(graph)


@pytest.mark.thinned(6)
def test_rings_and_gradients_of_a_model() -> None:
    graphs, *_ = final_graphs(llama(1), tokens(), {"cp": 2}, attention="ring")
    names = {phase: groups_of(gm.graph, channels_of(gm.graph)) for phase, gm in graphs.items()}
    assert "cp/messages" in names["forward"]
    assert "cp/gradients" not in names["forward"]
    assert names["backward"][-2:] == ["cp/gradients", "cp/messages"]


class World:
    """A process group that is bound to a device."""

    bound_device_id = torch.device("cuda", 3)


def test_groups_are_made_as_if_the_world_were_bound_to_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its communicator would be split, for which ranks of no mesh would have to come."""
    seen: list[Any] = []

    def local_group(name: str, ranks: tuple[int, ...], timeout: Any) -> Any:
        seen.append((World.bound_device_id, world.bound_device_id, name, ranks, timeout))
        return SimpleNamespace(group_name=name)

    world: Any = World()
    monkeypatch.setattr("spcompile.torch_private_groups.local_group", local_group)
    monkeypatch.setattr("spcompile.torch_private_groups.group_timeout", lambda device: 5)
    mesh._group_of(world, (4, 6), "messages", "cuda")
    assert seen == [(World.bound_device_id, None, "spcompile_cuda_messages_4_6", (4, 6), 5)]
    assert world.bound_device_id == torch.device("cuda", 3)


def test_a_world_is_bound_again_whatever_happens() -> None:
    world: Any = World()
    seen = []

    def fail() -> None:
        with mesh.unbound(world):
            seen.append(world.bound_device_id)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert seen == [None]
    assert world.bound_device_id == torch.device("cuda", 3)


def test_cuda_graphs_are_refused_by_name() -> None:
    with torch._inductor.config.patch({"triton.cudagraphs": True}):
        backend._require_no_cuda_graphs(Options(compiler="eager"))
        with pytest.raises(IllegalOption, match="cudagraphs=True"):
            backend._require_no_cuda_graphs(Options(compiler="inductor"))
    backend._require_no_cuda_graphs(Options(compiler="inductor"))


def test_names_of_groups() -> None:
    assert mesh.on_channel("cp", None) == "cp"
    assert mesh.on_channel("cp.outer2", "messages") == "cp.outer2/messages"
    whole = {name: mesh.is_whole_axis(name) for name in ("cp", "cp.inner2", "cp/messages", "cp.outer2/gradients")}
    assert whole == {"cp": True, "cp.inner2": False, "cp/messages": False, "cp.outer2/gradients": False}
