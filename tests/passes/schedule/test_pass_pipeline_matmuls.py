"""pipeline-matmuls: its ops on all ranks, whole models in the simulator, races that it must catch, where it pays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial, reduce
from typing import Any

import pytest
import torch
import torch.fx as fx
from example_numerics import after_autograd, assert_equal, on_one_device
from final_graphs import MODES, Mode, final_graphs, llama, tokens
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree

from spcompile import models
from spcompile.check.verifier import verify_graph
from spcompile.collectives import pipelined_matmuls
from spcompile.collectives.pipelined_matmuls import PIPELINED, gather_and_multiply, multiply_and_scatter
from spcompile.collectives.pipelined_matmuls import spec_all_gather_matmul as gathered_on_all
from spcompile.collectives.pipelined_matmuls import spec_matmul_reduce_scatter as scattered_on_all
from spcompile.collectives.point_to_point import Shift, Wait
from spcompile.diagnostics import Remarks
from spcompile.explain import explain
from spcompile.graph.edit import call
from spcompile.machine import sequence
from spcompile.machine.mesh import MeshShape
from spcompile.options import Options
from spcompile.passes.schedule.pipeline_matmuls import PipelineMatmuls
from spcompile.passes_api import Context, Stage
from spcompile.schedule.communication import communication
from spcompile.schedule.op_cost import CostModel, cost_model

aten, spx = torch.ops.aten, torch.ops.spx
# With the logits built: the product inside of a loss without logits is not cut.
EVERYWHERE = {"pipeline-matmuls": {"min_gain": -math.inf}, "recognize-linear-loss": False}
LENGTHS = (1, 5, 8)
DEGREES = (1, 2, 4, 7)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("wants_gathered", [True, False])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("degree", DEGREES)
def test_gather_and_multiply(degree: int, batch: int, wants_gathered: bool) -> None:
    """Rows in front and behind the gathered dim, lengths that do not divide, weights that are transposed."""
    for length in LENGTHS:
        x = normal(batch, length, 3, 6)
        weights = [[normal(6, 5), normal(2, 6).t()] for _ in range(degree)]
        parts = [sequence.take(x, 1, rank, degree, "contiguous", math.nan) for rank in range(degree)]
        layout = 1, length, "tp", degree, wants_gathered
        found = gathered_on_all([(part, own, *layout) for part, own in zip(parts, weights, strict=True)])
        for results, own in zip(found, weights, strict=True):
            products = [x.reshape(-1, 6) @ weight for weight in own]
            expected = [x, *products] if wants_gathered else products
            for a, b in zip(results, expected, strict=True):
                assert a.is_contiguous()
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("degree", DEGREES)
def test_multiply_and_scatter(degree: int, batch: int) -> None:
    for length in LENGTHS:
        shape = [batch, length, 3, 6]
        xs = [[normal(batch * length * 3, 4), normal(2, batch * length * 3).t()] for _ in range(degree)]
        weights = [[normal(4, 6), normal(2, 6)] for _ in range(degree)]
        calls = [(x, weight, shape, 1, "tp", degree) for x, weight in zip(xs, weights, strict=True)]
        terms = [x @ weight for call in calls for x, weight in zip(call[0], call[1], strict=True)]
        total = torch.stack(terms).sum(0).view(shape)
        for rank, result in enumerate(scattered_on_all(calls)):
            torch.testing.assert_close(result, sequence.take(total, 1, rank, degree, "contiguous"))


def test_a_sum_in_bfloat16_is_no_worse_than_a_reduce_scatter() -> None:
    """A reduce-scatter that adds exactly has one rounding of each product; a ring that rounds at each hop has more."""
    degree, rows, width = 8, 64, 256
    xs = [normal(degree * rows, width).bfloat16() for _ in range(degree)]
    weights = [normal(width, 32).bfloat16() for _ in range(degree)]
    exact = torch.stack([x.double() @ weight.double() for x, weight in zip(xs, weights, strict=True)]).sum(0)
    ring = torch.zeros_like(exact).bfloat16()
    for x, weight in zip(xs, weights, strict=True):
        ring = ring + x @ weight  # product and sum are both rounded
    calls = [([x], [w], [degree * rows, 32], 0, "tp", degree) for x, w in zip(xs, weights, strict=True)]
    found = torch.cat(scattered_on_all(calls))
    again = torch.cat(scattered_on_all(calls))
    assert torch.equal(found, again)
    assert (found - exact).square().mean() <= (ring - exact).square().mean()


def calls_of(graph: Any) -> list[Any]:
    return [node for node in graph.nodes if node.target in PIPELINED]


@pytest.mark.thinned(7)
@pytest.mark.parametrize(("degree", "length"), [(2, 15), (4, 14)])
def test_whole_models_in_both_modes_of_the_simulator(degree: int, length: int) -> None:
    """Every gather and scatter beside a product, forward and backward: loss and gradients stay."""
    graphs, plain, inputs = final_graphs(llama(), tokens(length), {"tp": degree}, passes=EVERYWHERE)
    names = [[node.target._opname for node in calls_of(graphs[phase].graph)] for phase in ("forward", "backward")]
    if degree == 2:
        # Two layers with two gathers and two scatters each, and the output head. What the backward gathers again only
        # gives gradients of weights.
        assert names[0].count("all_gather_matmul") == names[1].count("matmul_reduce_scatter") == 5
        assert names[0].count("matmul_reduce_scatter") == names[1].count("all_gather_matmul") == 4
    else:  # more ranks than key heads: attention runs whole
        assert all(name.count("all_gather_matmul") and name.count("matmul_reduce_scatter") for name in names)
    expected = on_one_device(plain, inputs)
    for mode in MODES:
        for rank in after_autograd(graphs["forward"], graphs["backward"], inputs, {"tp": degree}, mode):
            assert_equal(rank, expected)


@pytest.mark.slow
@pytest.mark.thinned(5)
def test_lengths_may_be_symbols() -> None:
    """The graph compiled for one length is right for another, padding included."""
    given = tokens(14)
    for value in given:
        torch._dynamo.mark_dynamic(value, 1)
    graphs, plain, inputs = final_graphs(llama(1), given, {"tp": 2}, passes=EVERYWHERE)
    found = [call for phase in ("forward", "backward") for call in calls_of(graphs[phase].graph)]
    assert len(found) == 10
    sizes = [size for call in found for value in pytree.tree_leaves(call.meta["val"]) for size in value.shape]
    assert any(isinstance(size, torch.SymInt) for size in sizes)
    for length in (14, 15, 23):
        texts = tokens(length)[0]
        again = [length if isinstance(x, torch.SymInt) else x if x.is_floating_point() else texts for x in inputs]
        expected = on_one_device(plain, again)
        for rank in after_autograd(graphs["forward"], graphs["backward"], again, {"tp": 2}, "late"):
            assert_equal(rank, expected)


def reads_too_early(*args: Any) -> Any:
    """The loop of a rank with a race in it: every part is multiplied before it has arrived."""
    requests = gather_and_multiply(*args)
    answer: Any = None
    while True:
        try:
            request = requests.send(answer)
        except StopIteration as stop:
            return stop.value
        if isinstance(request, Wait):
            answer = request.handle.received.clone()
            yield request
        else:
            answer = yield request


def overwrites_in_flight(*args: Any) -> Any:
    """Every sum is changed once it is on its way."""
    requests = multiply_and_scatter(*args)
    answer: Any = None
    while True:
        try:
            request = requests.send(answer)
        except StopIteration as stop:
            return stop.value
        answer = yield request
        if isinstance(request, Shift):
            request.message.mul_(2)


@pytest.mark.thinned(10)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("race", [reads_too_early, overwrites_in_flight])
def test_a_planted_race_is_caught(mode: Mode, race: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs, plain, inputs = final_graphs(llama(1), tokens(), {"tp": 2}, passes=EVERYWHERE)
    expected = on_one_device(plain, inputs)
    name = "gather_and_multiply" if race is reads_too_early else "multiply_and_scatter"
    monkeypatch.setattr(pipelined_matmuls, name, race)

    def run() -> None:
        rank = after_autograd(graphs["forward"], graphs["backward"], inputs, {"tp": 2}, mode)[0]
        assert_equal(rank, expected)

    with pytest.raises((AssertionError, RuntimeError)):
        run()


@pytest.mark.slow
@pytest.mark.thinned(3)
def test_the_bytes_stay_what_they_were() -> None:
    """Counted for each phase and origin; only the names of the rows are others."""
    sent: list[dict[tuple[str, str], Any]] = []
    for passes in ({**EVERYWHERE, "pipeline-matmuls": False}, EVERYWHERE):
        graphs, _, _ = final_graphs(llama(1), tokens(), {"tp": 2}, passes=passes)
        found: dict[tuple[str, str], Any] = {}
        for phase, gm in graphs.items():
            for row in communication(phase, gm, MeshShape.of({"tp": 2}), ()):
                kind = "gather" if "gather" in row.op else "scatter" if "scatter" in row.op else row.op
                key = (phase, f"{kind} {row.origin}")
                found[key] = found.get(key, 0) + row.bytes
        sent.append(found)
    assert sent[0] == sent[1]


def llama_8b_layer(rows: int, *, passes: dict[str, Any] | None = None, **settings: Any) -> Any:
    """What `explain` says of one layer and its gradients in bf16, on tp = 8."""
    with torch.device("meta"):
        sizes = {"heads": 32, "kv_heads": 8, "dim": 4096, "hidden": 14336, "vocab": 1024}
        model = models.build("llama", layers=1, **sizes).to(torch.bfloat16)
        ids_BS = torch.zeros(1, 8 * rows, dtype=torch.int64)
    batch = {"ids_BS": ids_BS, "labels_BS": ids_BS}
    options = {"outputs": "loss", "passes": passes or {}, **settings}
    return explain(model, batch, mesh={"tp": 8}, **options)


def rewrites(plan: Any) -> int:
    return sum(row.rewrites for row in plan.passes if row.name == "pipeline-matmuls")


@pytest.mark.thinned(8)
def test_it_pays_for_the_layers_of_a_large_model_on_long_sequences() -> None:
    with_it, without = (llama_8b_layer(8192, passes=p) for p in ({}, {"pipeline-matmuls": False}))
    assert rewrites(with_it) >= 3
    assert with_it.predicted.total("seconds") < without.predicted.total("seconds")
    assert with_it.predicted.phases[0].exposed < 0.5 * without.predicted.phases[0].exposed


@pytest.mark.thinned(6)
def test_it_does_not_pay_where_products_are_small() -> None:
    graphs, _, _ = final_graphs(llama(1), tokens(), {"tp": 2})
    assert not [node for gm in graphs.values() for node in calls_of(gm.graph)]


@pytest.mark.thinned(8)
def test_chunks_of_few_rows_do_not_pay() -> None:
    assert rewrites(llama_8b_layer(16)) == 0


def test_what_a_chunk_takes_can_be_added_by_hand() -> None:
    """Rows of a chunk 8192, two weights; an H100 has 132 units, and a tile 128 rows and columns."""
    cost: CostModel = cost_model(MeshShape.of({"tp": 8}), Options(links={"tp": "nvlink"}))
    from spcompile.schedule.op_cost import gathering_chunks

    meta = {"dtype": torch.bfloat16, "device": "meta"}
    part, weights = torch.empty(1, 8192, 4096, **meta), [torch.empty(4096, 1792, **meta)] * 2
    work = cost.pipelined(gathering_chunks(part, weights, 1, "tp", 8, gathered=True))
    tiles = 64 * 14
    flops = 2 * 8192 * 4096 * 1792 * math.ceil(tiles / 132) * 132 / tiles
    hop = 2 * (flops / (0.65 * 989e12) + 3e-6)
    message = 8192 * 4096 * 2 / 400e9 + 3e-6
    assert work.compute == pytest.approx(8 * hop)
    assert work.communication == pytest.approx(7 * message)
    assert work.exposed == pytest.approx(7 * max(0.0, message - hop)) == 0


def interleaved(requests: Any) -> list[str]:
    """Shifts and waits in the order in which a rank asks for them; messages come back as they went."""
    found: list[str] = []
    answer: Any = None
    while True:
        try:
            request = requests.send(answer)
        except StopIteration:
            return found
        found.append(type(request).__name__)
        answer = request.message.clone() if isinstance(request, Shift) else request.handle


def test_the_sums_travel_in_two_halves() -> None:
    """While one half is on its way products are added to the other."""
    x, weight = normal(8, 2), normal(2, 3)
    order: Sequence[str] = interleaved(multiply_and_scatter(0, [x], [weight], [8, 3], 0, "tp", 2))
    assert order == ["Shift", "Shift", "Wait", "Wait"]
    order = interleaved(multiply_and_scatter(0, [x], [weight], [8, 3], 0, "tp", 4))
    assert order == ["Shift", "Shift", *["Wait", "Shift"] * 4, "Wait", "Wait"]


def site_on(device: str, length: int, products: int) -> fx.GraphModule:
    """No product: x is gathered and multiplied. Else so many are added and scattered."""
    graph = fx.Graph()
    with FakeTensorMode() as mode:
        values = torch.empty(1, 4, 6, device=device), torch.empty(length, 6, device=device)
        weight = torch.empty(6, 6, device=device)
    x, rows, w = (graph.placeholder(name) for name in ("x", "rows", "w"))
    for node, value in zip((x, rows, w), (*values, weight), strict=True):
        node.meta.update(val=value, stack_trace="by hand")
    output = graph.output(x)

    def added(target: Any, *args: Any) -> fx.Node:
        return call(graph, target, args, like=w, before=output)

    with mode:
        if products:
            terms = [added(aten.mm.default, rows, w) for _ in range(products)]
            whole = added(aten.view.default, reduce(partial(added, aten.add.Tensor), terms), [1, length, 6])
            result = added(spx.reduce_scatter.default, whole, 1, "tp", 2, "contiguous")
        else:
            whole = added(spx.all_gather.default, x, 1, length, "tp", 2, "contiguous", "R")
            result = added(aten.mm.default, added(aten.view.default, whole, [length, 6]), w)
    output.args = (result,)
    return fx.GraphModule(torch.nn.Module(), graph)


@pytest.mark.parametrize(
    ("device", "length", "products", "link", "why_not"),
    [
        ("cuda", 8, 0, "nvlink", None),
        ("cuda", 8, 1, "nvlink3", None),
        ("cuda", 7, 0, "nvlink", "7 rows do not divide by 2"),
        ("cuda", 8, 2, "nvlink", "no sum of several products"),
        ("cuda", 8, 1, "network", "talk over network"),
        ("cpu", 8, 0, "nvlink", "its tensors are on cpu"),
    ],
)
def test_symmetric_memory_where_it_fits(
    device: str, length: int, products: int, link: str, why_not: str | None
) -> None:
    """On GPUs that reach each other's memory, without padding, for one product in front of a scatter."""
    gm = site_on(device, length, products)
    context = Context(MeshShape.of({"tp": 2}), Options(links={"tp": link}), Remarks())
    assert PipelineMatmuls(min_gain=-math.inf, symmetric_memory=True).run(gm, context) == 1
    (found,) = calls_of(gm.graph)
    assert (found.args[-1] is True) == (why_not is None)
    assert [remark.code for remark in context.remarks.rows] == ["SPR206"] * (why_not is not None)
    assert all((why_not or "") in remark.text for remark in context.remarks.rows)
    verify_graph(gm, Stage.SCHEDULE, context.mesh)
