"""`spcompile.plan`: its figures are those of a full compile, and its choice is the fastest that fits."""

from __future__ import annotations

import json
from typing import Any

import pytest
import sympy
import torch
from explained import Model

import spcompile
from spcompile import models
from spcompile.diagnostics import IllegalMesh, IllegalModel, IllegalOption, OutOfMemory
from spcompile.report.plan import Plan
from spcompile.report.plan_table import RankedPlans

LAYERS = 8
SECONDS = 0.01  # of the time: what hides at the edges of buckets does not repeat from layer to layer


def llama(layers: int = LAYERS, length: int = 256, batch: int = 1) -> tuple[torch.nn.Module, dict[str, Any]]:
    with torch.device("meta"):
        model = models.build("llama", layers=layers, dim=128, hidden=256, heads=4, kv_heads=2)
        ids = torch.zeros(batch, length, dtype=torch.int64)
    return model, {"ids_BS": ids, "labels_BS": ids}


def planned(world: int, batch: int = 1, layers: int = LAYERS, **options: Any) -> RankedPlans:
    model, inputs = llama(layers, batch=batch)
    return spcompile.plan(model, inputs, world, workers=1, **options)


def explained(plans: RankedPlans, at: int, batch: int = 1) -> Plan:
    """The full compile of a row."""
    one = plans.rows[at].result.candidate
    model, inputs = llama(batch=batch // one.size("dp"))
    return spcompile.explain(
        model, inputs, dict(one.mesh), shard_parameters=one.shard, **plans.options_of(plans.rows[at])
    )


def compare(plans: RankedPlans, at: int, batch: int = 1) -> None:
    found, full = plans.rows[at].figures, explained(plans, at, batch)
    memory = full.memory
    assert found.saved == memory.saved_activation_bytes
    assert (found.parameters, found.gradients) == (memory.parameter_bytes, memory.gradient_bytes)
    assert found.states == memory.optimizer_bytes
    assert found.total == memory.total_bytes
    sent: dict[tuple[str, str, str, str], sympy.Expr] = {}
    for row in full.collectives:
        key = (row.op, row.axis, row.phase, row.origin)
        sent[key] = sent.get(key, 0) + row.bytes
    assert {key: size for key, (_, size) in found.sent.items()} == sent
    assert found.seconds == pytest.approx(full.predicted.total("seconds"), rel=SECONDS)
    assert found.communication == pytest.approx(full.predicted.total("communication"), rel=SECONDS)


def test_figures_of_few_layers_continued_are_those_of_all_layers() -> None:
    """Collectives, saved bytes and the peak to the byte."""
    plans = planned(4, axes=("tp", "cp"), memory="speed")
    assert {dict(row.result.candidate.mesh).get("tp", 1) for row in plans.rows} == {1, 2, 4}
    for at in range(0, len(plans.rows), 2):
        compare(plans, at)


def test_over_dp_too() -> None:
    plans = planned(2, batch=2, axes=("dp",), memory="speed")
    assert [row.result.candidate.mesh for row in plans.rows] == [(("dp", 2),)] * 2
    for at in range(2):
        compare(plans, at, batch=2)


def test_the_choice_is_the_fastest_that_fits() -> None:
    loose = planned(2, axes=("cp",), memory="speed")
    least = min(row.figures.total for row in loose.rows)
    tight = planned(2, axes=("cp",), memory=int(0.8 * least))
    fitting = [row for row in tight.rows if row.fits]
    assert fitting
    assert all(row.figures.total <= 0.8 * least for row in fitting)
    assert all(row.figures.again > 0 for row in fitting)
    best = tight.rows[tight.choice]
    assert best.seconds <= 1.005 * min(row.seconds for row in fitting)
    assert "again" in tight.reason
    assert explained(tight, tight.choice).memory.total_bytes <= 0.8 * least


def test_json_has_what_it_says() -> None:
    plans = planned(2, axes=("cp",))
    found = json.loads(json.dumps(plans.to_dict()))
    assert found["schema_version"] == 1
    assert found["candidates"][found["choice"]]["fits"] is True
    assert found["reason"] == plans.reason
    for one in found["candidates"]:
        assert {"mesh", "options", "shard_parameters", "memory", "fits", "seconds", "tokens_per_second_per_gpu"} <= set(
            one
        )
        assert {"mfu_causal", "mfu_full", "communication_share", "exposed_share"} <= set(one)
        assert one["mesh"] == {"cp": 2}
        assert 0 <= one["exposed_share"] <= one["communication_share"] < 1
        assert 0 < one["mfu_causal"] < one["mfu_full"] < 1
    text = str(plans)
    assert plans.reason in text
    assert "parallelize(model, mesh, inputs" in text


def test_what_is_to_be_pasted_is_the_row() -> None:
    plans = planned(2, axes=("tp",))
    plain = next(row for row in plans.rows if not row.result.candidate.megatron_sp)
    assert "passes={'split-all-reduce': False}" in plans.call(plain)
    assert 'init_device_mesh("cuda", (2,), mesh_dim_names=("tp",))' in plans.call(plain)
    assert "--mesh tp=2" in plans.flags(plain)
    assert any(key[0] == "all_reduce" and key[1] == "tp" for key in plain.figures.sent)


def test_a_model_whose_layers_differ_is_compiled_whole() -> None:
    plans = planned(2, layers=2, axes=("cp",))
    assert not any("equal blocks" in note for note in plans.notes)
    compare_with = spcompile.explain(
        *llama(2), {"cp": 2}, shard_parameters=plans.rows[0].result.candidate.shard, **plans.options_of(plans.rows[0])
    )
    assert plans.rows[0].seconds == compare_with.predicted.total("seconds")


def test_processes_find_the_same_as_one() -> None:
    model, inputs = llama()
    one, two = (spcompile.plan(model, inputs, 2, axes=("cp",), workers=n).to_dict() for n in (1, 2))
    assert one == two


def test_where_nothing_fits_it_says_how_many_ranks_would_do() -> None:
    least = min(row.figures.total for row in planned(2, axes=("cp",), memory="min").rows)
    with pytest.raises(OutOfMemory, match=r"(?s)on 2 ranks .*\d+ ranks would do: cp="):
        planned(2, axes=("cp",), memory=int(0.7 * least))


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"world": 0}, IllegalMesh),
        ({"world": True}, IllegalMesh),
        ({"axes": ("pp",)}, IllegalMesh),
        ({"axes": ()}, IllegalMesh),
        ({"attention": "ring"}, IllegalOption),
        ({"accelerator": "h1000"}, IllegalOption),
        ({"world": 3, "axes": ("tp",)}, IllegalMesh),
    ],
)
def test_bad_input(wrong: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        spcompile.plan(*llama(), **{"world": 2, "workers": 1, **wrong})


def test_a_model_without_attention_has_no_length() -> None:
    with pytest.raises(IllegalModel, match="no attention"):
        spcompile.plan(torch.nn.Linear(4, 4), (torch.rand(2, 4),), 2, workers=1)


def test_any_module_will_do() -> None:
    """Layers are found in the graph: this model has no setting for their number."""
    with torch.device("meta"):
        model, ids = Model(layers=7), torch.zeros(1, 64, dtype=torch.int64)
    plans = spcompile.plan(model, {"ids_BS": ids}, 2, axes=("cp",), workers=1, memory="speed")
    one = plans.rows[0].result.candidate
    full = spcompile.explain(
        model, {"ids_BS": ids}, dict(one.mesh), shard_parameters=one.shard, **plans.options_of(plans.rows[0])
    )
    assert any("equal blocks" in note for note in plans.notes)
    assert plans.rows[0].figures.saved == full.memory.saved_activation_bytes
