"""Heads in stages: groups of heads of Ulysses one after the other. Numbers stay, the transient falls.

B batch, S sequence, D width, N query heads, K key heads, H head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import Tensor, nn

import spcompile
from spcompile.machine.accelerators import ACCELERATORS
from spcompile.machine.mesh import MeshShape
from spcompile.memory.account import bytes_alive
from spcompile.memory.planner import MemoryPlan
from spcompile.options import Options
from spcompile.passes import PIPELINE
from spcompile.program import partition
from spcompile.program.trace import compile_for, through_dynamo

N, H = 8, 4
D = N * H
WORST = 0.03


class Attention(nn.Module):
    """Attention behind a norm, with rotated queries and keys.

    fused: one projection. bias: of projections. norms: of each head of q and k.
    """

    def __init__(self, keys: int = N, fused: bool = False, bias: bool = False, norms: bool = False) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(D), nn.Linear(D, D, bias=bias)
        self.sizes = (D, keys * H, keys * H)
        widths = (sum(self.sizes),) if fused else self.sizes
        self.qkv = nn.ModuleList(nn.Linear(D, width, bias=bias) for width in widths)
        self.norms = nn.ModuleList(nn.RMSNorm(H) for _ in range(2)) if norms else None

    def forward(self, x_BSD: Tensor) -> Tensor:
        y_BSD = self.norm(x_BSD)
        parts = [one(y_BSD) for one in self.qkv]
        q, k, v = (t.unflatten(-1, (-1, H)) for t in (parts if len(parts) == 3 else parts[0].split(self.sizes, -1)))
        if self.norms is not None:
            q, k = (norm(t) for norm, t in zip(self.norms, (q, k), strict=True))
        q, k, v = (t.transpose(1, 2) for t in (rotated(q), rotated(k), v))
        z_BNSH = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return x_BSD + self.out(z_BNSH.transpose(1, 2).flatten(2))


def rotated(x_BSNH: Tensor) -> Tensor:
    angles_SH = torch.arange(x_BSNH.shape[1], dtype=x_BSNH.dtype)[:, None] * torch.arange(1, H + 1)
    first, second = x_BSNH.chunk(2, -1)
    return x_BSNH * angles_SH.cos()[:, None] + torch.cat([-second, first], -1) * angles_SH.sin()[:, None]


class Layers(nn.Module):
    """Two attentions; the mean square is the loss."""

    def __init__(self, **kind: Any) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(D, D), Attention(**kind), Attention(**kind))

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.layers(x_BSD).square().mean()


def inputs(length: int = 37) -> tuple[Tensor]:
    return (torch.randn(1, length, D, dtype=torch.float64),)


def options(groups: int, **more: Any) -> dict[str, Any]:
    passes = {"split-all-to-alls": {"groups": groups, "way": "together"}}
    return {"attention": "ulysses", "memory": "min", "host_memory": 0, "passes": passes, **more}


def planned_and_peaks(length: int, **asked: Any) -> tuple[MemoryPlan, dict[str, int]]:
    """The plan of one rank of two, and the most that is alive in each of its final graphs, inputs aside."""
    chosen = Options.parse(asked)
    found: list[tuple[MemoryPlan, dict[str, int]]] = []

    def describe(gm: fx.GraphModule, given: Sequence[Any]) -> None:
        sharded = compile_for(gm, given, MeshShape.of({"cp": 2}), chosen, PIPELINE).sharded
        accelerator, fuses = ACCELERATORS[chosen.accelerator], chosen.compiler == "inductor"
        assert sharded.memory is not None
        peaks = {phase: max(bytes_alive(phase, sharded.graphs, accelerator, fuses)) for phase in sharded.graphs}
        found.append((sharded.memory, peaks))

    through_dynamo(Layers().double(), inputs(length), describe)
    return found[0]


@pytest.fixture
def staged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads run in stages wherever they can, also where the peak would not fall by them."""
    monkeypatch.setattr(partition, "may_lower", lambda *_: True)
    monkeypatch.setattr(partition, "cheaper_plan", lambda whole, staged, least: staged)


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """No heads run in stages."""
    monkeypatch.setattr(partition, "stage_heads", lambda graph: None)


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biased": {"bias": True},
    "grouped": {"keys": 2},
    "normed": {"norms": True},
    "fused": {"fused": True},
    "fused grouped": {"fused": True, "keys": 2, "bias": True},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("mesh", [{"cp": 2}, {"tp": 2, "cp": 2}], ids="-".join)
@pytest.mark.usefixtures("staged")
@pytest.mark.thinned(30)
def test_numbers_stay_what_they_are(kind: str, groups: int, mesh: dict[str, int]) -> None:
    torch.manual_seed(0)
    model = Layers(**KINDS[kind]).double()
    asked = options(groups)
    report = spcompile.verify(model, inputs(), mesh, **asked)
    assert report.ok, report
    assert "stage" in {action.kind for action in spcompile.explain(model, inputs(), mesh, **asked).memory.actions}


@pytest.mark.usefixtures("staged")
@pytest.mark.thinned(29)
def test_the_transient_falls_with_the_number_of_groups() -> None:
    plans = [spcompile.explain(Layers().double(), inputs(2048), {"cp": 2}, **options(groups)) for groups in (1, 2, 4)]
    forward, backward = ([plan.memory.phases[at].transient for plan in plans] for at in (0, 1))
    assert backward[0] > backward[1] > backward[2]
    assert forward[0] > max(forward[1:])  # beside messages that the plan saves, so that the time of the peak differs
    one, two, four = (plan.memory.total_bytes for plan in plans)
    assert one > two > four


@pytest.mark.usefixtures("staged")
@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("memory", ["min", "speed"])
@pytest.mark.thinned(30)
def test_a_plan_with_stages_counts_what_the_final_graphs_hold(groups: int, memory: str) -> None:
    plan, peaks = planned_and_peaks(2048, **options(groups, memory=memory))
    assert (plan.stages is not None) == (memory == "min")
    assert abs(plan.peak.bytes / max(peaks.values()) - 1) <= WORST


@pytest.mark.thinned(24)
def test_stages_are_chosen_where_they_take_less(request: pytest.FixtureRequest) -> None:
    chosen, _ = planned_and_peaks(2048, **options(4))
    request.getfixturevalue("whole")
    without, _ = planned_and_peaks(2048, **options(4))
    assert chosen.stages is not None
    assert chosen.stages.count == 4
    assert chosen.total < without.total


@pytest.mark.thinned(30)
def test_a_budget_that_only_stages_meet_is_met(request: pytest.FixtureRequest) -> None:
    least, _ = planned_and_peaks(2048, **options(4))
    budget = int(least.total / 0.97)
    chosen, _ = planned_and_peaks(2048, **options(4, memory=budget))
    assert chosen.fits
    assert chosen.stages is not None
    request.getfixturevalue("whole")
    assert not planned_and_peaks(2048, **options(4, memory=budget))[0].fits


@pytest.mark.thinned(8)
def test_a_step_that_fits_is_left_alone() -> None:
    plan, _ = planned_and_peaks(2048, **options(4, memory="1GiB"))
    assert plan.stages is None
    assert not plan.changes_anything


def test_what_is_done_is_said() -> None:
    plan = spcompile.explain(Layers().double(), inputs(2048), {"cp": 2}, **options(4))
    (action,) = [action for action in plan.memory.actions if action.kind == "stage"]
    assert action.bytes > 0
    assert "stage mm.default" in str(plan)
    assert "SPR607" in [remark.code for remark in plan.remarks]


@pytest.mark.parametrize("attention", ["ring", "ulysses"])
@pytest.mark.thinned(9)
def test_without_groups_there_are_no_stages(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partition, "stage_heads", lambda graph: pytest.fail("looked for stages"))
    plan, _ = planned_and_peaks(101, **options(1, attention=attention))
    assert plan.stages is None
