"""Custom autograd functions on real processes: their own gradients, under either compiler."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
from oracle import Case, assert_same
from own_gradients import OwnModel, texts
from worker_pool import WorkerPool

CASE = Case(OwnModel, texts)


@pytest.mark.slow
@pytest.mark.thinned(30)
@pytest.mark.parametrize("compiler", ["eager", "inductor"])
@pytest.mark.parametrize("mesh", [{"cp": 2}, {"tp": 2}], ids=str)
def test_model(worker_pool: Callable[[int], WorkerPool], mesh: Mapping[str, int], compiler: str) -> None:
    options: dict[str, Any] = {"mesh": mesh, "compiler": compiler}
    assert_same(worker_pool(2), replace(CASE, options=options))
