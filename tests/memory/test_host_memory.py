"""Values that wait in the memory of the host: when they are copied, what is planned, and that numbers stay.

B batch, S sequence, D width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from memory_models import COST, D, Decoder, stack
from torch import Tensor, nn

import spcompile
from spcompile.diagnostics import IllegalOption
from spcompile.memory.account import host_bytes, saved_bytes
from spcompile.memory.liveness import peak_of
from spcompile.memory.plan_search import PlanSearch
from spcompile.memory.planner import ROOM, Wish, all_trades, plan_memory
from spcompile.memory.stream_blocks import find_blocks
from spcompile.options import Options
from spcompile.program.observed import observed
from spcompile.schedule.host_windows import Window, windows_back, windows_out
from spcompile.schedule.saved_bytes import saved_activation_bytes

LENGTH = 401
HOST = 10**9


def test_a_copy_to_the_host_hides_behind_the_calls_that_follow() -> None:
    """Made by call 0, read by call 1; the copy takes two calls."""
    assert windows_out([1.0] * 6, [(0, 1, 2.0)]) == [Window(1, 3, 0.0)]
    assert windows_out([1.0] * 6, [(0, 4, 2.0)]) == [Window(1, 5, 0.0)], "not before its last reader"


def test_copies_to_the_host_go_one_after_the_other_and_compute_waits_where_they_are_too_slow() -> None:
    found = windows_out([1.0] * 4, [(0, 0, 3.0), (1, 1, 3.0), (2, 2, 3.0)])
    assert [window.end for window in found] == [2, 4, 4], "two at once are on their way"
    assert sum(window.late for window in found) == pytest.approx(6.0)


def test_a_copy_back_starts_ahead_of_its_reader() -> None:
    assert windows_back([1.0] * 9, [(8, 1.0)]) == [Window(6, 8, 0.0)], "twice its own time"
    assert windows_back([1.0] * 9, [(1, 1.0)])[0].late == 0.0
    assert windows_back([1.0] * 9, [(0, 1.0)]) == [Window(0, 0, 1.0)], "nothing to hide behind"


def test_few_copies_are_on_their_way_back_at_once() -> None:
    found = windows_back([1.0] * 9, [(2, 4.0), (4, 4.0), (6, 4.0)])
    assert found[2].start >= 2, "not before the last but one is read"


@pytest.mark.thinned(4)
def test_only_as_much_goes_to_the_host_as_a_budget_needs() -> None:
    joint, saved = stack(8, length=1024)
    least, without = (plan_memory(joint, saved, COST, Wish(least=True, host=host)) for host in (HOST, 0))
    away_bytes = []
    for part in (0.2, 0.5):
        budget = int(part * least.total + (1 - part) * without.total)
        plan = plan_memory(joint, saved, COST, Wish(budget, host=HOST))
        assert plan.fits
        assert plan.host_fits
        assert plan.away is not None
        over_tiles = replace(joint, tiles=plan.tiles.count if plan.tiles is not None else 1)
        assert plan.peak == peak_of(over_tiles, plan.saved, plan.away)
        away_bytes.append(plan.host_bytes)
    assert 0 < away_bytes[0] < away_bytes[1]


@pytest.mark.thinned(4)
def test_nothing_goes_to_the_host_where_all_fits_or_there_is_none() -> None:
    joint, saved = stack(4)
    assert plan_memory(joint, saved, COST, Wish(10**9, host=HOST)).away is None
    assert plan_memory(joint, saved, COST, Wish(10, host=0)).away is None
    assert plan_memory(joint, saved, COST, Wish(least=True)).away is None


@pytest.mark.thinned(6)
def test_as_little_as_can_be_is_found_over_all_levers_and_whatever_is_more_has_a_plan() -> None:
    joint, saved = stack(8, length=1024)
    _, trades = all_trades(joint, saved, COST)
    search = PlanSearch(joint, tuple(saved), trades, find_blocks(joint, COST.is_heavy), COST.of_one_graph())
    again = search.peak(search.least()).bytes
    without, least = (plan_memory(joint, saved, COST, Wish(least=True, host=host)) for host in (0, HOST))
    assert least.peak.bytes < without.peak.bytes < again
    assert least.away is not None
    assert least.tiles is not None
    for budget in (least.total, (least.total + without.total) // 2, without.total, without.state_bytes + again):
        plan = plan_memory(joint, saved, COST, Wish(int(budget / ROOM) + 2, host=HOST))
        assert plan.fits
        assert plan.host_fits
        assert plan.total <= budget + 2
    assert not plan_memory(joint, saved, COST, Wish(int(0.95 * least.total), host=HOST)).fits


@pytest.mark.thinned(4)
def test_what_the_host_does_not_hold_is_said() -> None:
    joint, saved = stack(8, length=1024)
    least, without = (plan_memory(joint, saved, COST, Wish(least=True, host=host)) for host in (HOST, 0))
    plan = plan_memory(joint, saved, COST, Wish((least.total + without.total) // 2, host=10))
    assert plan.fits
    assert not plan.host_fits


def deep() -> nn.Module:
    torch.manual_seed(0)
    return Decoder(layers=6).double()


def inputs() -> tuple[Tensor]:
    return (torch.randn(1, LENGTH, D, dtype=torch.float64),)


def least_bytes(model: nn.Module, mesh: dict[str, int], **options: Any) -> int:
    return int(spcompile.explain(model, inputs(), mesh, memory="min", optimizer="none", **options).memory.total_bytes)


def needs_the_host(model: nn.Module, mesh: dict[str, int], **options: Any) -> dict[str, Any]:
    """Options with a budget for which the plan takes the memory of the host: the smallest of a few, as explain says."""
    least = least_bytes(model, mesh, **options)
    most = spcompile.explain(model, inputs(), mesh, memory="speed", optimizer="none", **options).memory.total_bytes
    for part in (0.02, 0.1, 0.3, 0.6):
        asked = {"memory": int(least + part * (most - least)), "optimizer": "none", **options}
        found = spcompile.explain(model, inputs(), mesh, **asked).memory
        if found.fits and found.host_bytes:
            return asked
    raise AssertionError("no budget for which the host is wanted")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "attention"),
    [({"cp": 2}, "ring"), ({"cp": 2}, "ulysses"), ({"tp": 2}, "ring"), ({"tp": 2, "cp": 2}, "ulysses")],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)
@pytest.mark.thinned(10)
def test_numbers_stay_what_they_are(mesh: dict[str, int], attention: str) -> None:
    model = deep()
    options = needs_the_host(model, mesh, **({"attention": attention} if "cp" in mesh else {}))
    plan = spcompile.explain(model, inputs(), mesh, **options)
    found = plan.to_dict()["memory"]
    assert found["fits"]
    assert 0 < found["host_bytes"] < found["host_node_bytes"] <= found["host_limit_bytes"]
    assert sum(row["bytes"] for row in found["actions"] if row["kind"] == "offload") == found["host_bytes"]
    assert "SPR604" in [remark.code for remark in plan.remarks]
    assert "in the memory of the host" in str(plan)
    report = spcompile.verify(model, inputs(), mesh, **options)
    assert report.ok, report


@pytest.mark.slow
@pytest.mark.thinned(22)
@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_one_process_saves_and_computes_what_is_planned(compiler: str) -> None:
    model, (x_BSD,) = deep(), inputs()
    model(x_BSD).backward()
    expected = [p.grad for p in model.parameters()]
    options = needs_the_host(model, {"cp": 1}, compiler=compiler)
    compiled = torch.compile(model, backend="spcompile", options=options)
    with observed() as programs:
        loss = compiled(x_BSD)
    ((_, emission),) = programs
    assert emission.memory is not None
    assert emission.memory.host_bytes > 0
    for _ in range(2):  # a backward leaves what is on the host
        model.zero_grad()
        loss.backward(retain_graph=True)
        for p, gradient in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, gradient, rtol=1e-9, atol=1e-12)
    kept = saved_bytes(emission.graphs) + host_bytes(emission.graphs)
    assert saved_activation_bytes(model, lambda: compiled(x_BSD)) == kept + x_BSD.nbytes


@pytest.mark.thinned(30)
def test_too_small_a_host_is_an_error_with_a_code() -> None:
    model, x = deep(), inputs()
    one: dict[str, Any] = {"compiler": "eager"}
    with_host, without = (least_bytes(model, {"cp": 1}, host_memory=host, **one) for host in ("auto", 0))
    budget = int(0.7 * with_host + 0.3 * without)
    options = {"memory": budget, "optimizer": "none", "host_memory": 64, **one}
    assert not spcompile.explain(model, x, {"cp": 1}, **options).memory.fits
    with pytest.raises(Exception, match="SP108") as refused:
        torch.compile(model, backend="spcompile", options=options)(*x)
    assert "host_memory" in str(refused.value)


@pytest.mark.parametrize("host_memory", [-1, True, 1.5, "much", None])
def test_what_is_no_size_of_a_host(host_memory: Any) -> None:
    with pytest.raises(IllegalOption, match="host_memory="):
        Options.parse({"host_memory": host_memory})


def test_a_node_shares_its_host() -> None:
    options = Options.parse({"host_memory": "1000B", "memory": "1GiB"})
    assert [Wish.of(options, world).host for world in (1, 2, 8, 64)] == [1000, 500, 125, 125]
    assert Wish.of(Options(), 8).host == int(0.9 * 2e12) // 8
    assert Wish.of(Options(accelerator="cpu", memory="1GiB"), 8).host == 0
