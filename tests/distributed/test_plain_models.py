"""Models written without spcompile in mind: the sequence is found in the graph, whatever and wherever it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import plain_models as pm
import pytest
from oracle import Case, assert_same
from worker_pool import WorkerPool

PoolOf = Callable[[int], WorkerPool]

MODELS = {
    "sequence first": Case(pm.SequenceFirst, pm.sequence_first),
    "einsum": Case(pm.Einsum, pm.einsum),
    "two inputs": Case(pm.TwoInputs, pm.two_inputs, pm.first_output),
    "mean pooled": Case(pm.MeanPooled, pm.mean_pooled),
    "first token": Case(pm.FirstToken, pm.first_token),
}


@pytest.mark.thinned(30)
@pytest.mark.parametrize("attention", ["ring", "ulysses"])
@pytest.mark.parametrize(
    "case", [Case(pm.Scored, pm.sequence_first), Case(pm.Translator, pm.translated)], ids=["scores", "cross"]
)
def test_scores_and_cross_attention(worker_pool: PoolOf, case: Case, attention: str) -> None:
    outcomes = assert_same(worker_pool(2), replace(case, options={"attention": attention}))
    assert not {"SPR101", "SPR201", "SPR202"} & set(outcomes[0].remarks)


@pytest.mark.thinned(6)
def test_attention_that_cannot_be_read_is_split_by_rows(worker_pool: PoolOf) -> None:
    outcomes = assert_same(worker_pool(2), Case(pm.TalkingHeads, pm.sequence_first))
    assert "SPR202" in outcomes[0].remarks
    assert "SPR101" not in outcomes[0].remarks


@pytest.mark.thinned(25)
@pytest.mark.parametrize("name", MODELS)
def test_model(worker_pool: PoolOf, name: str) -> None:
    assert_same(worker_pool(2), MODELS[name])


@pytest.mark.thinned(9)
def test_an_op_that_mixes_positions_runs_over_another_dim_with_a_remark(worker_pool: PoolOf) -> None:
    outcomes = assert_same(worker_pool(2), Case(pm.RunningProduct, pm.einsum))
    assert "SPR108" in outcomes[0].remarks


@pytest.mark.thinned(8)
def test_a_running_sum_stays_split(worker_pool: PoolOf) -> None:
    outcomes = assert_same(worker_pool(2), Case(pm.RunningSum, pm.einsum))
    assert "SPR108" not in outcomes[0].remarks


LABELS = {
    "one label in the batch": ((1, 7),),
    "none on the second rank": tuple((row, s) for row in (0, 1) for s in range(8)),
    "at the edges of shards": ((0, 0), (0, 7), (0, 8), (0, 15), (1, 3), (1, 4), (1, 11), (1, 12)),
}


@pytest.mark.thinned(20)
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_labels(worker_pool: PoolOf, reduction: str, labels: str) -> None:
    arguments = partial(pm.labelled_at, places=LABELS[labels], length=16)
    options = {"attention": "ulysses"}  # ranks hold contiguous halves, so that these places are edges
    assert_same(worker_pool(2), Case(partial(pm.Reduced, reduction), arguments, options=options))


@pytest.mark.thinned(4)
def test_one_position_a_rank(worker_pool: PoolOf) -> None:
    arguments = partial(pm.labelled_at, places=((0, 0), (0, 1), (1, 1), (2, 0)), length=2, batch=3)
    assert_same(worker_pool(2), Case(partial(pm.Reduced, "mean"), arguments))


@pytest.mark.thinned(10)
@pytest.mark.parametrize("length", [63, 65, 1000])
def test_uneven_lengths(worker_pool: PoolOf, length: int) -> None:
    places = tuple((row, s) for row in (0, 1) for s in range(0, length, 2))
    arguments = partial(pm.labelled_at, places=places, length=length)
    assert_same(worker_pool(2), Case(partial(pm.Reduced, "mean"), arguments))


@pytest.mark.slow
def test_uneven_length_on_four_ranks(worker_pool: PoolOf) -> None:
    places = tuple((row, s) for row in (0, 1) for s in range(65))
    assert_same(worker_pool(4), Case(partial(pm.Reduced, "mean"), partial(pm.labelled_at, places=places, length=65)))
