"""The cost model and the timeline, on graphs whose times can be added by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.fx as fx
from explained import HEADS, WIDTH, plan_of
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from spcompile.attention.scores.mask import AttentionMask
from spcompile.attention.strategy import Strategy
from spcompile.attention.strategy_cost import Problem, cost
from spcompile.machine.accelerators import ACCELERATORS, Accelerator
from spcompile.machine.links import LINKS, Link
from spcompile.machine.mesh import MeshShape
from spcompile.schedule.op_cost import CostModel, attention_flops, matmul_flops, visible
from spcompile.schedule.timeline import COMPUTE, timeline

c10d = torch.ops._c10d_functional
SLOW = Accelerator(
    "a slow one", {4: 1e6}, reached=0.5, attention_reached=0.5, bytes_per_second=1e12, seconds_per_kernel=0.0
)
COST = CostModel(MeshShape.of({"cp": 4}), SLOW, {"cp": "loopback"})
N = 100
PRODUCT = 2 * N**3 / (1e6 * 0.5)  # seconds of [N, N] @ [N, N]


def traced(function: Any, *inputs: Tensor, mode: str = "fake") -> fx.GraphModule:
    return make_fx(function, tracing_mode=mode)(*inputs)


def test_flops_of_products() -> None:
    gm = traced(lambda x, y: x @ y, torch.randn(3, 5), torch.randn(5, 7))
    assert [matmul_flops(n) for n in gm.graph.nodes if n.op == "call_function"] == [2 * 3 * 5 * 7]


def test_symbols_count_as_at_trace_time() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        return c10d.wait_tensor(c10d.all_reduce(x @ y, "sum", "cp"))

    inputs = torch.randn(3, 5), torch.randn(5, 7)
    fixed, symbolic = (timeline("", traced(function, *inputs, mode=m).graph.nodes, COST) for m in ("fake", "symbolic"))
    assert fixed == symbolic


@pytest.mark.parametrize("text", ["full", "causal", "causal window=100", "causal chunk=64", "causal prefix=300"])
def test_the_part_of_the_scores_that_a_mask_leaves(text: str) -> None:
    mask, length = AttentionMask.parse(text), 1000
    positions = torch.arange(length)
    exact = mask.allowed(positions, positions).float().mean().item()
    assert visible(mask, length) == pytest.approx(exact, abs=0.02)


def test_flops_of_attention_are_two_products_forward_and_five_backward() -> None:
    from torch.nn.functional import scaled_dot_product_attention as sdpa
    from torch.utils.flop_counter import flop_registry

    import spcompile.attention.op  # noqa: F401

    B, N, S, H = 2, 4, 64, 8
    q, lse = torch.randn(B, N, S, H), torch.randn(B, N, S)
    none = [None] * 6

    def both(q: Tensor, lse: Tensor) -> Any:
        return (
            torch.ops.spx.attention(q, q, q, *none, "full", 1.0),
            torch.ops.spx.attention_backward(q, None, q, lse, q, q, q, *none, "full", 1.0, False),
        )

    nodes = [n for n in traced(both, q, lse).graph.nodes if "attention" in str(n.target)]
    aten = torch.ops.aten
    forward = flop_registry[aten._scaled_dot_product_flash_attention](q, q, q, out_val=q)
    backward = flop_registry[aten._scaled_dot_product_flash_attention_backward](q, q, q, q, out_val=(q, q, q))
    assert [attention_flops(n) for n in nodes] == [forward, backward]
    assert sdpa(q, q, q).shape == q.shape


def hidden(products: int) -> Any:
    """One all-reduce of [N, N], with products between its start and its wait."""

    def function(x: Tensor) -> Tensor:
        start = c10d.all_reduce(x, "sum", "cp")
        y = x
        for _ in range(products):
            y = y @ x
        return y + c10d.wait_tensor(start)

    return timeline("", traced(function, torch.randn(N, N)).graph.nodes, COST)


def test_a_timeline_added_by_hand() -> None:
    size = N * N * 4 * 2 * 3 / 4  # all-reduce over four ranks
    seconds = LINKS["loopback"].seconds(size, 6)
    assert seconds < PRODUCT
    alone, behind = hidden(0), hidden(2)
    assert alone.communication == behind.communication == pytest.approx(seconds)
    assert alone.exposed == pytest.approx(seconds)
    assert alone.exposed_bytes == alone.bytes == size
    assert behind.exposed == behind.exposed_bytes == 0.0
    assert behind.compute == pytest.approx(2 * PRODUCT, rel=1e-3)
    assert behind.hidden == behind.communication


def test_collectives_of_one_axis_travel_one_after_the_other() -> None:
    def function(x: Tensor) -> Tensor:
        first, second = (c10d.all_reduce(x, "sum", "cp") for _ in range(2))
        return c10d.wait_tensor(first) + c10d.wait_tensor(second)

    found = timeline("", traced(function, torch.randn(N, N)).graph.nodes, COST)
    assert found.exposed == pytest.approx(found.communication)
    assert found.communication == pytest.approx(2 * hidden(0).communication)


@pytest.mark.thinned(4)
def test_predicted_times_add_up_and_name_what_they_assume() -> None:
    plans = {name: plan_of(2, attention="ulysses", links={"cp": name}) for name in ("nvlink", "loopback")}
    for link, plan in plans.items():
        predicted = json.loads(json.dumps(plan.to_dict()))["predicted"]
        assert [row["phase"] for row in predicted["phases"]] == ["forward", "backward"]
        assert any("H100" in text for text in predicted["assumptions"])
        assert any(link in text for text in predicted["assumptions"])
        for row in predicted["phases"]:
            assert row["seconds"] == pytest.approx(row["compute"] + row["exposed"])
            assert row["communication"] == pytest.approx(row["hidden"] + row["exposed"])
            sent = sum(r.bytes for r in plan.collectives if r.phase == row["phase"])
            assert row["bytes"] == pytest.approx(float(sent))
            assert 0 <= row["exposed_bytes"] <= row["bytes"]
        assert all(text in str(plan) for text in predicted["assumptions"])
    slow, fast = plans["loopback"].predicted, plans["nvlink"].predicted
    assert slow.total("exposed") > fast.total("exposed") > 0


def test_what_a_product_reads_through_a_view_is_written() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x + 1
        return y.view(N, N) @ y.view(N, N), torch.relu(y.view(N * N)).sum()

    graph = traced(function, torch.randn(N * N)).graph
    (add,) = (node for node in graph.nodes if node.target is torch.ops.aten.add.Tensor)
    assert COST.work(add).compute == pytest.approx(2 * N * N * 4 / 1e12)
    for reader in [node for node in graph.nodes if node.target is torch.ops.aten.mm.default]:
        reader.replace_all_uses_with(add)  # now views of it are read by what fuses alone
        graph.erase_node(reader)
    graph.output_node().args = ((graph.output_node().args[0][1],),)  # type: ignore[index]
    assert COST.work(add).compute == pytest.approx(N * N * 4 / 1e12)


@pytest.mark.thinned(4)
def test_rings_are_as_fast_as_where_strategies_are_compared() -> None:
    """`attention="auto"` and predicted steps have one cost model."""
    length, free = 65536, Link("free", 1e30, 0.0)
    plan = plan_of(4, attention="ring", length=length, layers=1)
    events = [event for found in plan.events.values() for event in found if event.stream == COMPUTE]
    found = sum(event.seconds for event in events if event.node.startswith("ring_attention"))
    problem = Problem(1, HEADS, HEADS, length, length, WIDTH // HEADS, WIDTH // HEADS, 4, AttentionMask(causal=True))
    rate = ACCELERATORS["h100"].attention_flops(4)
    compared = cost(problem, Strategy(1, 4), plan.sharding.order, free, free, rate)
    assert found == pytest.approx(compared.seconds, rel=0.05)
