"""Plans of memory on joint graphs of a few layers: blocks, what is alive when, trades, and what is chosen.

B batch, S sequence, D width, F width inside the MLP.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from memory_models import COST, B, D, S, Stack, joint_of, stack
from torch import Tensor

from spcompile.diagnostics import IllegalOption
from spcompile.graph.storage import root_of
from spcompile.machine.byte_sizes import bytes_text, parse_bytes
from spcompile.machine.optimizers import OPTIMIZERS
from spcompile.memory.fusion import fused_away
from spcompile.memory.liveness import Lives, Peak, levels_of, peak_of
from spcompile.memory.plan_search import PlanSearch
from spcompile.memory.planner import Wish, plan_memory
from spcompile.memory.stream_blocks import find_blocks
from spcompile.memory.trades import Savings, Trade, made_again
from spcompile.options import Options


@pytest.mark.thinned(4)
@pytest.mark.parametrize("remembers", [False, True])
def test_blocks_are_what_repeats_along_the_stream(remembers: bool) -> None:
    joint, _ = stack(4, remembers)
    blocks = find_blocks(joint, COST.is_heavy)
    assert blocks.period == 1
    assert len(blocks.inputs) >= 4
    assert all(tuple(node.meta["val"].shape) == (B, S, D) for node in blocks.inputs)
    adds = [node for node in blocks.inputs if node.target is torch.ops.aten.add.Tensor]
    assert len(adds) >= 3


def test_a_model_without_blocks_has_none() -> None:
    weight = torch.randn(D, D, requires_grad=True)
    joint, _ = joint_of(lambda x_BSD: (x_BSD @ weight).square().mean(), torch.randn(B, S, D))
    assert find_blocks(joint, COST.is_heavy).period == 0


def test_what_is_alive_when() -> None:
    """X is 4 bytes wide: a and b are there until their sum, c from there on."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    a, b = (graph.call_function(op, (x,)) for op in (torch.ops.aten.sin.default, torch.ops.aten.cos.default))
    view = graph.call_function(torch.ops.aten.view.default, (a, [2, 2]))
    c = graph.call_function(torch.ops.aten.add.Tensor, (view, b))
    order = [a, b, view, c]
    roots = {a: a, b: b, view: a, c: c, x: x}
    lives = Lives.of(order, (), (), roots.__getitem__)
    sizes = {a: 4, b: 4, c: 4, view: 0}
    assert lives.bytes(sizes.__getitem__, [0, 0, 1, 0]) == [4, 8, 9, 12]
    assert Lives.of(order, (), (b,), roots.__getitem__).bytes(sizes.__getitem__, [0] * 4)[-1] == 12
    assert lives.during(1) == [a, b]


def test_what_is_fused_away_takes_no_memory_and_keeps_what_it_reads() -> None:
    """exp(sin(x)) @ y: sin is inside of the kernel of exp, which reads x and is written since a product reads it."""
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    given = graph.call_function(torch.ops.aten.mm.default, (x, y))
    sin = graph.call_function(torch.ops.aten.sin.default, (given,))
    view = graph.call_function(torch.ops.aten.view.default, (sin, [2, 2]))
    exp = graph.call_function(torch.ops.aten.exp.default, (view,))
    product = graph.call_function(torch.ops.aten.mm.default, (exp, y))
    order = [given, sin, view, exp, product]
    assert fused_away(order, ()) == {sin}
    assert fused_away(order, [sin]) == set()
    lives = Lives.of(order, (), (), root_of, fused_away(order, ()))
    assert sin not in lives.born
    assert lives.dies[given] == order.index(exp)


@pytest.mark.thinned(3)
def test_trades_go_from_cheap_bytes_to_dear_ones_and_keep_the_inputs_of_blocks() -> None:
    joint, _ = stack(4)
    blocks = find_blocks(joint, COST.is_heavy)
    seconds = {True: 1.0, False: 0.0}
    savings = Savings(joint, set(joint.read_by_backward), blocks.inputs, lambda n: seconds[COST.is_heavy(n)])
    trades = savings.trades() + savings.of_block_inputs()
    assert all(trade.bytes > 0 for trade in trades)
    inputs = {joint.storage[node] for node in blocks.inputs}
    gives_inputs = [bool(inputs & {joint.storage[node] for node in trade.given_up}) for trade in trades]
    assert gives_inputs == sorted(gives_inputs), "inputs of blocks go last"
    assert 0 < sum(gives_inputs) <= 3, "and half of them at a time"
    heavy = [any(map(COST.is_heavy, trade.again)) for trade in trades]
    assert any(heavy)
    assert not any(heavy[:4]), "norms and activations come first"
    assert made_again(joint, savings.saved) == savings.again


@pytest.mark.thinned(10)
def test_a_deep_model_keeps_only_every_so_manyth_input_of_a_block() -> None:
    joint, saved = stack(32, length=1024)  # where activations outweigh gradients
    plan = plan_memory(joint, saved, COST, Wish(least=True))
    assert plan.blocks is not None
    inputs = {joint.storage[node] for node in plan.blocks.inputs}
    kept = inputs & {joint.storage[node] for node in plan.saved}
    assert len(kept) < 0.6 * len(inputs)
    with_all = peak_of(joint, [*plan.saved, *(node for node in plan.blocks.inputs if node not in plan.saved)])
    assert plan.peak.bytes < with_all.bytes


def test_what_draws_random_numbers_runs_once() -> None:
    weight = torch.randn(D, D, requires_grad=True)

    def drops(x_BSD: Tensor) -> Tensor:
        return F.dropout(x_BSD @ weight, 0.5, training=True).sin().square().mean()

    joint, saved = joint_of(drops, torch.randn(B, S, D))
    savings = Savings(joint, set(saved), (), lambda node: COST.work(node).seconds)
    savings.trades()
    tag = torch.Tag.nondeterministic_seeded
    assert not [node for node in savings.again if tag in getattr(node.target, "tags", ())]


def test_nothing_changes_where_a_step_fits() -> None:
    joint, saved = stack(3)
    plan = plan_memory(joint, saved, COST, Wish(10**9))
    assert plan.fits
    assert not plan.trades
    assert set(plan.saved) == set(saved)


@pytest.mark.thinned(3)
def test_the_cheapest_plan_that_fits() -> None:
    joint, saved = stack(6)
    speed = plan_memory(joint, saved, COST, Wish())
    least = plan_memory(joint, saved, COST, Wish(least=True))
    assert least.total < speed.total
    middle = (speed.total + least.total) // 2
    plan = plan_memory(joint, saved, COST, Wish(middle))
    assert plan.fits
    assert plan.total <= middle
    assert 0 < plan.seconds < least.seconds
    assert plan.peak == peak_of(joint, plan.saved)
    assert plan.as_it_was == speed.total


@pytest.mark.thinned(2)
def test_a_budget_that_nobody_can_meet() -> None:
    joint, saved = stack(3)
    plan = plan_memory(joint, saved, COST, Wish(1))
    assert not plan.fits


def test_states_of_the_optimizer_count() -> None:
    joint, saved = stack(2)
    none, adamw = (plan_memory(joint, saved, COST, Wish(optimizer=OPTIMIZERS[name])) for name in ("none", "adamw"))
    parameters = sum(p.numel() * p.element_size() for p in Stack(2).parameters())
    assert adamw.total - none.total == 2 * parameters


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("72GiB", 72 * 2**30),
        ("80 GB", 80 * 10**9),
        ("4096", 4096),
        ("1.5KiB", 1536),
        ("7B", 7),
        ("x", None),
        ("1 GiG", None),
    ],
)
def test_bytes_as_people_write_them(text: str, count: int | None) -> None:
    assert parse_bytes(text) == count


def test_bytes_as_people_read_them() -> None:
    assert [bytes_text(n) for n in (0, 1023, 1536, 3 * 2**30)] == ["0 B", "1023 B", "1.50 KiB", "3.00 GiB"]


@pytest.mark.parametrize("memory", ["72GiG", "-3GiB", 0, True, 1.5, None, "sped"])
def test_what_is_no_budget(memory: Any) -> None:
    with pytest.raises(IllegalOption, match="memory=") as refused:
        Options.parse({"memory": memory})
    assert "'auto', 'speed', 'min'" in str(refused.value)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("fuses", [False, True])
def test_levels_in_numbers_are_those_of_the_lives_of_storages(fuses: bool) -> None:
    joint, saved = stack(3)
    joint = replace(joint, fuses=fuses)
    storage = joint.storage
    kept = {storage[node] for node in (*saved, *joint.returned)}
    order, found = levels_of(joint, saved)["forward"]
    inside = fused_away(order, kept) if fuses else ()
    lives = Lives.of(order, (), kept, root_of, inside)
    assert found == lives.bytes(joint.bytes_of.__getitem__, [0] * len(order))


class Peaks(PlanSearch):
    """Of trades whose peaks are given; notes which are looked at."""

    def __init__(self, peaks: list[int], frees: list[int], before_inputs: int) -> None:
        self.trades = [Trade((), (), (), size, 0.0) for size in frees]
        self.peaks, self.before_inputs, self.looks = peaks, before_inputs, set[int]()

    def peak(self, count: int) -> Peak:
        self.looks.add(count)
        return Peak(self.peaks[count], "backward", None)


@pytest.mark.parametrize("before_inputs", [900, 1000])
@pytest.mark.parametrize("limit", [10, 2_000, 4_321, 9_990, 10_000, 11_000])
def test_the_fewest_trades_that_fit_are_found_in_few_looks(limit: int, before_inputs: int) -> None:
    """Of a thousand that each free ten bytes, and a peak that falls by most of them."""
    peaks = [10_000 - 9 * count + (count % 7 == 3) for count in range(1001)]
    search = Peaks(peaks, [10] * 1000, before_inputs)
    found = search.first_below(limit)
    if limit < min(peaks):
        assert peaks[found] == min(peaks[count] for count in search.looks)
        return
    assert peaks[found] <= limit
    assert found == 0 or peaks[found - 1] > limit
    assert len(search.looks) <= 12


def test_where_making_all_again_takes_more_the_fewest_that_fit_are_found() -> None:
    peaks = [100, 90, 80, 70, 60, 95, 96]
    assert [Peaks(peaks, [10] * 6, 6).first_below(limit) for limit in (85, 60, 50)] == [2, 4, 4]
