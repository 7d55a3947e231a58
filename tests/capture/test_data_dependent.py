"""Numbers and sizes that depend on data stay in the one graph, as they do under fullgraph=True."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import data_models as dm
import pytest
import torch
from oracle import EXACT, Case, assert_same, default_dtype
from torch import Tensor, nn
from worker_pool import WorkerPool

import spcompile
from spcompile.capture.dynamo_settings import as_in_one_graph

MODELS: list[tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = [
    (dm.ChosenTokens, lambda: (dm.states(),)),
    (dm.CountsByItem, lambda: (dm.states(), dm.labels())),
    (dm.ValidRowsOnly, lambda: (dm.states(), dm.labels())),
    (dm.PicturesInText, dm.text_with_pictures),
]


@pytest.mark.parametrize(("build", "inputs"), MODELS, ids=lambda x: getattr(x, "__name__", ""))
@pytest.mark.parametrize("mesh", [{"cp": 2}, {"tp": 2}, {"cp": 3}], ids=str)
@pytest.mark.thinned(3, covers=["mesh"])
def test_verify_goes_on(build: Callable[[], nn.Module], inputs: Any, mesh: dict[str, int]) -> None:
    with default_dtype(torch.float64):
        assert spcompile.verify(build(), inputs(), mesh=mesh, compiler="eager", tolerance=EXACT).ok


def batch(number: int) -> dict[str, Tensor]:
    return {"x_BSD": dm.states(number), "labels_BS": dm.labels()}


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.thinned(15)
def test_so_does_the_backend(worker_pool: Callable[[int], WorkerPool], wrap: bool) -> None:
    for build in (dm.CountsByItem, dm.ValidRowsOnly):
        assert_same(worker_pool(2), Case(partial(build), batch, wrap=wrap))


@pytest.mark.thinned(4)
def test_other_backends_get_what_they_got() -> None:
    graphs: list[Any] = []

    def other(gm: Any, inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    torch.compile(dm.CountsByItem(), backend="spcompile", options={"compiler": "eager"})(**batch(0))
    torch.compile(dm.CountsByItem(), backend=other)(**batch(0))
    assert len(graphs) == 2, "`.item()` ends a graph of a backend that did not ask"
    with as_in_one_graph():
        torch._dynamo.reset()
        torch.compile(dm.CountsByItem(), backend=other)(**batch(0))
    assert len(graphs) == 3
