"""`spcompile.plan`: its figures are those of a full compile, and its choice is the fastest that fits."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from explained import Model

import spcompile
from spcompile import models
from spcompile.diagnostics import IllegalMesh, IllegalModel, IllegalOption, OutOfMemory
from spcompile.report.plan import Plan
from spcompile.report.plan_table import RankedPlans

LAYERS = 8
# What hides at the edges of buckets, and what is alive there, does not repeat from layer to layer.
SECONDS = 0.05
PEAK = 0.07


def small(layers: int = LAYERS, length: int = 256, batch: int = 1) -> tuple[torch.nn.Module, dict[str, Any]]:
    """No setting says how many layers it has."""
    with torch.device("meta"):
        return Model(layers), {"ids_BS": torch.zeros(batch, length, dtype=torch.int64)}


def llama(layers: int = LAYERS, length: int = 256, batch: int = 1) -> tuple[torch.nn.Module, dict[str, Any]]:
    with torch.device("meta"):
        model = models.build("llama", layers=layers, dim=128, hidden=256, heads=4, kv_heads=2)
        ids = torch.zeros(batch, length, dtype=torch.int64)
    return model, {"ids_BS": ids, "labels_BS": ids}


def planned(world: int, build: Callable[..., Any] = small, batch: int = 1, **options: Any) -> RankedPlans:
    return spcompile.plan(*build(batch=batch), world, workers=1, **options)


def explained(plans: RankedPlans, at: int, build: Callable[..., Any] = small, batch: int = 1) -> Plan:
    """The full compile of a row."""
    one = plans.rows[at].result.candidate
    options = plans.options_of(plans.rows[at])
    given = build(batch=batch // one.size("dp"))
    return spcompile.explain(*given, dict(one.mesh), shard_parameters=one.shard, **options)


def compare(plans: RankedPlans, at: int, build: Callable[..., Any] = small, batch: int = 1) -> None:
    found, full = plans.rows[at].figures, explained(plans, at, build, batch)
    memory = full.memory
    assert found.saved == int(memory.saved_activation_bytes)
    assert (found.parameters, found.gradients) == (int(memory.parameter_bytes), int(memory.gradient_bytes))
    assert found.states == int(memory.optimizer_bytes)
    assert found.total == pytest.approx(int(memory.total_bytes), rel=PEAK)
    sent: dict[tuple[str, str, str, str], int] = {}
    for row in full.collectives:
        key = (row.op, row.axis, row.phase, row.origin)
        sent[key] = sent.get(key, 0) + int(row.bytes)
    assert {key: size for key, (_, size) in found.sent.items()} == sent
    assert found.seconds == pytest.approx(full.predicted.total("seconds"), rel=SECONDS)
    assert found.communication == pytest.approx(full.predicted.total("communication"), rel=SECONDS)


@pytest.mark.slow
@pytest.mark.thinned(30)
@pytest.mark.parametrize("build", [small, llama])
@pytest.mark.parametrize(
    ("world", "axes", "batch"), [(2, ("cp",), 1), (2, ("tp",), 1), (4, ("tp", "cp"), 1), (2, ("dp",), 2)]
)
def test_figures_of_few_layers_continued_are_those_of_all_layers(
    build: Callable[..., Any], world: int, axes: tuple[str, ...], batch: int
) -> None:
    """Collectives and saved bytes to the byte; on the best mesh and the last one."""
    plans = planned(world, build, batch, axes=axes, memory="speed")
    assert any("equal blocks" in note for note in plans.notes)
    compare(plans, 0, build, batch)
    compare(plans, len(plans.rows) - 1, build, batch)


@pytest.mark.thinned(30)
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


@pytest.mark.thinned(22)
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


@pytest.mark.thinned(6)
def test_what_is_to_be_pasted_is_the_row() -> None:
    plans = planned(2, axes=("tp",))
    plain = next(row for row in plans.rows if not row.result.candidate.megatron_sp)
    assert "passes={'split-all-reduce': False}" in plans.call(plain)
    assert 'init_device_mesh("cuda", (2,), mesh_dim_names=("tp",))' in plans.call(plain)
    assert "--mesh tp=2" in plans.flags(plain)
    assert any(key[0] == "all_reduce" and key[1] == "tp" for key in plain.figures.sent)


@pytest.mark.thinned(8)
def test_a_model_of_few_layers_is_compiled_whole() -> None:
    plans = spcompile.plan(*small(2), 2, axes=("cp",), workers=1)
    assert not any("equal blocks" in note for note in plans.notes)
    one, options = plans.rows[0].result.candidate, plans.options_of(plans.rows[0])
    full = spcompile.explain(*small(2), {"cp": 2}, shard_parameters=one.shard, **options)
    assert plans.rows[0].seconds == full.predicted.total("seconds")


@pytest.mark.slow
@pytest.mark.thinned(6)
def test_processes_find_the_same_as_one() -> None:
    one, two = (spcompile.plan(*small(), 2, axes=("cp",), workers=n).to_dict() for n in (1, 2))
    assert one == two


@pytest.mark.thinned(6)
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
        spcompile.plan(*small(), **{"world": 2, "workers": 1, **wrong})


def test_a_model_without_attention_has_no_length() -> None:
    with pytest.raises(IllegalModel, match="no attention"):
        spcompile.plan(torch.nn.Linear(4, 4), (torch.rand(2, 4),), 2, workers=1)
