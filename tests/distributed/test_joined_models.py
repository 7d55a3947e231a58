"""Sequences made of parts, and few queries over long ones, on real processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import joined_models as jm
import pytest
from oracle import Case, assert_same
from worker_pool import WorkerPool

MODELS = {
    "text and image": Case(jm.TextAndImage, jm.text_and_image),
    "class attention": Case(jm.ClassAttention, jm.images),
}


@pytest.mark.thinned(30)
@pytest.mark.parametrize("attention", ["ring", "ulysses"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_model(worker_pool: Callable[[int], WorkerPool], ranks: int, name: str, attention: str) -> None:
    outcomes = assert_same(worker_pool(ranks), replace(MODELS[name], options={"attention": attention}))
    assert set(outcomes[0].remarks) <= {"SPR203", "SPR204"}


@pytest.mark.slow
@pytest.mark.thinned(4)
@pytest.mark.parametrize("name", MODELS)
def test_inductor(worker_pool: Callable[[int], WorkerPool], name: str) -> None:
    assert_same(worker_pool(2), replace(MODELS[name], options={"compiler": "inductor"}))
