"""split-all-to-alls: numbers for all heads and ways, what pays by the tables, and what then hides behind what.

N query heads, G key/value heads; float64, outputs and gradients of every input, all ranks in one process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.fx as fx
from attention_functions import DATA, causal, dropped, full, qkv
from example_numerics import (
    after_autograd,
    after_pass,
    assert_equal,
    check_pipeline,
    compiled_locally,
    nodes_of,
    on_all_ranks,
    on_one_device,
    remarks_of,
)
from final_graphs import MODES, final_graphs, tokens
from final_graphs import llama as small_llama

from spcompile import explain, models
from spcompile.attention.ulysses.head_groups import HeadGroups
from spcompile.attention.ulysses.head_shares import HeadSplit
from spcompile.attention.ulysses.messages import (
    WAYS,
    Messages,
    Piece,
    Times,
    apart,
    candidates,
    first_apart,
    together,
)
from spcompile.capture.meta_device import off_meta
from spcompile.diagnostics import IllegalOption, Remarks
from spcompile.machine.links import LINKS
from spcompile.machine.mesh import MeshShape
from spcompile.options import Options
from spcompile.passes import PIPELINE
from spcompile.passes.placement.split_all_to_alls import SplitAllToAlls
from spcompile.passes_api import Context
from spcompile.program.trace import compile_for, through_dynamo
from spcompile.schedule.op_cost import CostModel, cost_model, is_matmul
from spcompile.schedule.timeline import is_wait, starts, timeline, transfer

SIZES = [(4, 2, 2), (6, 2, 3), (5, 5, 3), (3, 3, 2), (8, 2, 2), (8, 4, 4), (4, 1, 2), (9, 3, 4)]  # N, G, ranks


def options(groups: int, way: str) -> dict[str, Any]:
    return {"split-all-to-alls": {"groups": groups, "way": way}}


def check(name: str, n: int, g: int, length: int, mesh: dict[str, int], attention: Any, groups: int, way: str) -> Any:
    function, data = DATA[name]
    inputs = [*qkv(n, g, length), *data(n, length)]
    return check_pipeline(function, inputs, mesh, attention=attention, passes=options(groups, way))


@pytest.mark.parametrize(("n", "g", "degree"), SIZES)
@pytest.mark.parametrize("groups", [1, 2, 3, 4])
def test_groups_take_heads_apart_and_put_them_together(n: int, g: int, degree: int, groups: int) -> None:
    split = HeadSplit(n, g, degree)
    if not HeadGroups.divides(split, groups):
        return
    cut = HeadGroups(split, groups)
    queries, keys = torch.arange(n)[:, None], torch.arange(g)[:, None]
    sent, keys_sent = split.split_queries(queries + 1, 0), split.split_keys(keys + 1, 0)
    assert torch.equal(cut.join_queries(cut.queries(sent, 1), 1), sent)
    for mine, read in zip(cut.queries(sent, 1), cut.keys(keys_sent, 1), strict=True):
        assert mine.shape[1] == split.local_heads // groups
        per_key = mine.shape[1] // read.shape[1]
        wanted = (mine - 1).div(n // g, rounding_mode="floor") + 1  # the key head of each query head
        found = read.repeat_interleave(per_key, 1)
        assert torch.equal(wanted[mine > 0], found[mine > 0])


def test_messages_as_text() -> None:
    by_keys, by_queries = HeadSplit(8, 4, 2), HeadSplit(8, 2, 2)
    assert str(together(by_keys)) == "q+kv"
    assert str(together(by_keys, keys_apart=True)) == "q | kv"
    assert str(apart()) == str(first_apart(by_keys, 1)) == "q | k | v"
    assert str(together(by_keys, 2)) == "q1+kv1 | q2+kv2"
    assert str(together(by_queries, 2)) == "q1+kv | q2"
    assert str(first_apart(by_keys, 2)) == "q1 | k1 | v1 | q2+kv2"
    assert str(first_apart(by_queries, 4)) == "q1 | k | v | q2 | q3 | q4"
    assert str(first_apart(by_keys, 2, keys_apart=True)) == "q1 | k1 | v1 | q2 | kv2"


@pytest.mark.thinned(27)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("n", "g", "degree"), [(4, 2, 2), (8, 4, 2), (6, 2, 3), (5, 5, 3), (8, 2, 4), (3, 1, 2)])
def test_numbers(n: int, g: int, degree: int, way: str) -> None:
    for groups, length in ((2, 7), (1, 8)):
        check("causal", n, g, length, {"cp": degree}, "ulysses", groups, way)


@pytest.mark.thinned(21)
@pytest.mark.parametrize("name", DATA)
def test_what_belongs_to_heads_goes_with_them(name: str) -> None:
    """Groups of key heads, then groups of the query heads of each of two key heads."""
    program = check(name, 8, 4, 5, {"cp": 2}, "ulysses", 2, "first apart")
    assert len(nodes_of(program, "spx.attention")) == 2
    program = check(name, 9, 3, 5, {"cp": 3}, "ulysses", 3, "apart")
    assert len(nodes_of(program, "spx.attention")) == 3


@pytest.mark.slow
@pytest.mark.thinned(10, covers=["way", "degree"])
@pytest.mark.parametrize("degree", [2, 3, *(pytest.param(n, marks=pytest.mark.manual) for n in (4, 6))])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", DATA)
def test_every_kind_with_any_heads(name: str, way: str, degree: int) -> None:
    for n, g in ((3, 3), (12, 3), (8, 2), (6, 1), (8, 8)):
        for groups in (2, 4):
            check(name, n, g, 9, {"cp": degree}, "ulysses", groups, way)


@pytest.mark.thinned(10)
@pytest.mark.parametrize("way", WAYS)
def test_a_hybrid_may_be_cut_too(way: str) -> None:
    for name in ("causal", "softcap and sinks"):
        program = check(name, 8, 4, 13, {"cp": 4}, {"ulysses": 2, "ring": 2}, 2, way)
        assert len(nodes_of(program, "spx.ring_attention")) == 2
    check("causal", 8, 4, 9, {"cp": 2, "tp": 2}, "ulysses", 2, way)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("way", WAYS)
def test_keys_of_another_length(way: str) -> None:
    check_pipeline(full, qkv(4, 2, 9, 6), {"cp": 2}, attention="ulysses", passes=options(2, way))


@pytest.mark.thinned(2)
def test_dropout_is_that_of_one_device() -> None:
    chosen = {"attention": "ulysses", "passes": options(2, "first apart")}
    program, _, given = compiled_locally(dropped, qkv(4, 4, 13), {"cp": 2}, **chosen)
    before = after_pass("recognize-loss", dropped, qkv(4, 4, 13))
    (alone,) = on_all_ranks(before.gm, given, {})
    for rank in on_all_ranks(program.gm, given, {"cp": 2}):
        assert_equal(rank, alone)


@pytest.mark.thinned(8)
def test_bytes_stay() -> None:
    """As many elements as in one message, and keys that several groups read travel once."""

    def sent(**passes: Any) -> int:
        program = after_pass("parallelize-attention", causal, qkv(8, 2, 8), 2, attention="ulysses", passes=passes)
        return sum(n.args[0].meta["val"].numel() for n in nodes_of(program, "spx.all_to_all"))

    whole = sent(**{"split-all-to-alls": False})
    assert {sent(**options(groups, way)) for groups in (1, 2, 4) for way in WAYS} == {whole}


def test_fewer_groups_where_heads_do_not_divide() -> None:
    """Three heads on a rank: 2 do not divide them."""
    program = check("full", 6, 6, 8, {"cp": 2}, "ulysses", 2, "together")
    assert len(nodes_of(program, "spx.attention")) == 1


def test_ways_and_groups_that_there_are_not() -> None:
    empty = fx.GraphModule(torch.nn.Module(), fx.Graph())
    ctx = Context(MeshShape.of({"cp": 2}), Options(), Remarks())
    for wrong in (SplitAllToAlls(way="apartly"), SplitAllToAlls(groups=0)):
        with pytest.raises(IllegalOption, match="split-all-to-alls"):
            wrong.run(empty, ctx)


def test_small_attentions_keep_one_message_each_way() -> None:
    program = after_pass("parallelize-attention", causal, qkv(8, 8, 8), 2, attention="ulysses")
    assert len(nodes_of(program, "spx.all_to_all")) == 2
    assert not remarks_of(program, "SPR205")


def test_times_added_by_hand() -> None:
    """q, k and v of one second each, one second of projection between them, attention of ten."""
    link = LINKS["loopback"]
    second = link.bytes_per_second
    times = Times({"q": 0.0, "k": 1.0, "v": 2.0}, dict.fromkeys(["q", "k", "v", "out"], second), 10.0, 0.0, link)
    heads = HeadSplit(8, 8, 2)
    latency = link.seconds_per_message
    assert times.until_back(together(heads)) == pytest.approx(2 + 3 + 10 + 1 + 2 * latency)
    assert times.until_back(apart()) == pytest.approx(3 + 10 + 1, abs=5 * latency)
    assert times.until_back(together(heads, 2)) == pytest.approx(2 + 1.5 + 10 + 0.5, abs=5 * latency)
    assert times.until_back(first_apart(heads, 2)) == pytest.approx(2 + 0.5 + 10 + 0.5, abs=5 * latency)
    late = Messages(((Piece("k"),), (Piece("v"),), (Piece("q"),)))
    assert times.until_back(late) == pytest.approx(2 + 2 + 10 + 1, abs=5 * latency)
    best = min(candidates(heads, (1, 2, 4), keys_apart=False), key=times.until_back)
    assert best == first_apart(heads, 4)


def llama(tokens: int, **chosen: Any) -> tuple[dict[str, fx.GraphModule], CostModel]:
    """Final graphs of a Llama 3 8B layer, bf16 on H100s, so many tokens on each of eight ranks."""
    with torch.device("meta"):
        sizes = {"heads": 32, "kv_heads": 8, "dim": 4096, "hidden": 14336}
        model = models.build("llama", layers=1, vocab=512, **sizes).to(torch.bfloat16)
        ids_BS = torch.zeros(1, 8 * tokens, dtype=torch.int64)
    asked = Options(outputs="loss", attention="ulysses", links={"cp": "nvlink"}, **chosen)
    mesh = MeshShape.of({"cp": 8})
    found: list[dict[str, fx.GraphModule]] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
        found.append(compile_for(*off_meta(gm, inputs), mesh, asked, PIPELINE).sharded.graphs)

    through_dynamo(model, {"ids_BS": ids_BS, "labels_BS": ids_BS}, backend)
    return found[0], cost_model(mesh, asked)


def late(gm: fx.GraphModule, cost: CostModel) -> dict[str, float]:
    """Seconds for which compute waits, by kind of collective."""
    now = free = 0.0
    arrivals: dict[fx.Node, float] = {}
    found: dict[str, float] = {}
    for node in gm.graph.nodes:
        if starts(node):
            free = max(now, free) + transfer(node, cost)[1]
            arrivals[node] = free
        elif is_wait(node):
            start = node.args[0]
            waited = max(0.0, arrivals.pop(start) - now)
            found[start.target._opname] = found.get(start.target._opname, 0.0) + waited
            now += waited
        else:
            now += cost.work(node).seconds
    return found


@pytest.mark.slow
@pytest.mark.thinned(2)
def test_most_of_a_large_all_to_all_hides() -> None:
    """Of a Llama 3 8B layer: a quarter is exposed forward, where all was; nothing backward."""
    split, cost = llama(8192)
    whole, _ = llama(8192, passes={"split-all-to-alls": False})
    exposed = {phase: late(gm, cost).get("all_to_all_single", 0.0) for phase, gm in split.items()}
    before = late(whole["forward"], cost)["all_to_all_single"]
    assert exposed["forward"] < before / 4
    assert exposed["backward"] < before / 20
    seconds = [timeline("", graphs["forward"].graph.nodes, cost).seconds for graphs in (split, whole)]
    assert seconds[1] - seconds[0] > 0.5 * (before - exposed["forward"])
    layer = [2, 1, 0, 3, 2, 1, 0]  # q behind the projections of k and v, k behind that of v; results behind attention
    assert products_between(split["forward"], "all_to_all_single") == layer


def products_between(gm: fx.GraphModule, op: str) -> list[int]:
    """How many products and attentions stand between start and wait of every collective of a kind."""
    count = 0
    found: dict[fx.Node, int] = {}
    for node in gm.graph.nodes:
        if starts(node) and node.target._opname == op:
            found[node] = -count
        elif is_wait(node) and node.args[0] in found:
            found[node.args[0]] += count
        elif is_matmul(node):
            count += 1
    return list(found.values())


def final_graphs_run(mesh: Mapping[str, int], groups: int, way: str) -> None:
    """Forward and backward graphs of a Llama, scheduled, on all ranks in both modes of the simulator."""
    graphs, plain, inputs = final_graphs(
        small_llama(1), tokens(), mesh, attention="ulysses", passes=options(groups, way)
    )
    expected = on_one_device(plain, inputs)
    for mode in MODES:
        for rank in after_autograd(graphs["forward"], graphs["backward"], inputs, mesh, mode):
            assert_equal(rank, expected)


@pytest.mark.thinned(10)
@pytest.mark.parametrize("way", WAYS)
def test_final_graphs_in_both_modes_of_the_simulator(way: str) -> None:
    final_graphs_run({"cp": 2}, 2, way)


@pytest.mark.slow
@pytest.mark.thinned(2)
def test_explain_counts_messages_and_says_why() -> None:
    model = models.build("llama-tiny", layers=1)
    ids_BS = torch.zeros(1, 32, dtype=torch.int64)
    batch = {"ids_BS": ids_BS, "labels_BS": ids_BS}
    asked: dict[str, Any] = {"attention": "ulysses", "mesh": {"cp": 2}}
    plans = [explain(model, batch, passes=passes, **asked) for passes in ({}, options(1, "apart"))]
    rows = [[r for r in plan.collectives if (r.op, r.phase) == ("all_to_all", "forward")] for plan in plans]
    assert [sum(row.count for row in found) for found in rows] == [2, 4]
    totals = [sum(row.bytes for row in found) for found in rows]
    assert totals[0] == totals[1]
    assert [any(r.code == "SPR205" and "q | k | v" in r.text for r in plan.remarks) for plan in plans] == [False, True]
