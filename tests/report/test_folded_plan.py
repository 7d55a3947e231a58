"""Explained with a few of its equal layers, a model takes what it takes with all of them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import sympy
import torch

import spcompile
from spcompile import models
from spcompile.report.folded_plan import bundled
from spcompile.report.line_of_depths import Line, NotAlike
from spcompile.report.plan import AttentionRow, Plan

LAYERS = 7
EXACT = ("saved_activation_bytes", "saved_activation_bytes_one_device", "parameter_bytes", "gradient_bytes")
WITH_OTHERS = (*EXACT, "optimizer_bytes", "host_bytes", "budget_bytes", "fits", "actions", "host_limit_bytes")


def sent(plan: Plan) -> Counter[tuple[Any, ...]]:
    return Counter({(r.op, r.axis, r.phase, r.origin, r.source): int(r.bytes) for r in bundled(plan.collectives)})


@pytest.mark.slow
@pytest.mark.thinned(6)
@pytest.mark.parametrize(
    ("mesh", "shard"), [({"cp": 2}, None), ({"tp": 2}, None), ({"tp": 2, "cp": 2}, ("cp", "tp"))], ids=str
)
def test_what_is_exact_and_what_is_close(mesh: dict[str, int], shard: tuple[str, ...] | None) -> None:
    model, ids_BS = models.build("llama-tiny", layers=LAYERS), torch.zeros(1, 32, dtype=torch.int64)
    batch = {"ids_BS": ids_BS, "labels_BS": ids_BS}
    full, few = (
        spcompile.explain(model, batch, mesh, shard_parameters=shard, fold_layers=fold) for fold in (False, True)
    )
    assert full.folded is None
    assert few.folded is not None
    assert few.folded.count in range(LAYERS - 2, LAYERS + 1)
    assert "equal ones, of which 2 and 4 were compiled" in str(few)
    assert few.to_dict()["folded"]["compiled"] == [2, 4]
    for name in WITH_OTHERS:
        assert getattr(few.memory, name) == getattr(full.memory, name), name
    assert sent(few) == sent(full)
    assert (few.attention, few.sharding, few.symbols) == (full.attention, full.sharding, full.symbols)
    assert few.other_remarks() == full.other_remarks()
    assert [(r.name, r.phase, r.rewrites) for r in few.passes if r.stage != "schedule"] == [
        (r.name, r.phase, r.rewrites) for r in full.passes if r.stage != "schedule"
    ]
    assert few.answers.flops == pytest.approx(full.answers.flops, rel=1e-9)
    assert few.answers.flops_full == pytest.approx(full.answers.flops_full, rel=1e-9)
    for name in ("total_bytes", "peak_bytes"):
        assert float(getattr(few.memory, name)) == pytest.approx(float(getattr(full.memory, name)), rel=0.06)
    assert few.predicted.total("seconds") == pytest.approx(full.predicted.total("seconds"), rel=0.06)


@pytest.mark.slow
@pytest.mark.thinned(22)
def test_layers_are_folded_where_all_is_saved_and_only_there() -> None:
    model, ids_BS = models.build("llama-tiny", layers=LAYERS), torch.zeros(1, 256, dtype=torch.int64)
    batch = {"ids_BS": ids_BS, "labels_BS": ids_BS}
    free = spcompile.explain(model, batch, {"cp": 2}, fold_layers=True, memory="speed")
    for share, is_folded in ((1.04, True), (0.9, False)):
        limit = int(share * int(free.memory.total_bytes))
        plan = spcompile.explain(model, batch, {"cp": 2}, fold_layers=True, memory=str(limit))
        assert (plan.folded is not None) == is_folded
        assert bool(plan.memory.actions) != is_folded
        if is_folded:
            assert plan.memory.total_bytes == free.memory.total_bytes


def test_a_line_through_two_depths() -> None:
    line = Line(sympy.Rational(15))
    assert line.at(3, 5) == 33
    assert line.at(sympy.Integer(2), sympy.Symbol("s") + 2) == 15 * sympy.Symbol("s") + 2
    assert line.at(1.5, 2.0) == 9.0
    few, more = (AttentionRow("ring", n, 4, 4, "causal") for n in (2, 4))
    kind = lambda row: row.strategy  # noqa: E731
    assert [row.count for row in line.rows([few], [more], kind, ["count"])] == [32]
    for wrong in ([few, few], [AttentionRow("ulysses", 1, 4, 4, "causal")]):
        with pytest.raises(NotAlike):
            line.rows(wrong, [more], kind, ["count"])
