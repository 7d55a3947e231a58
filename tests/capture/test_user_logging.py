"""Calls of a logger do not end a model's graph, and are given while it is traced."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.fx as fx
from torch import Tensor, nn

import spcompile.capture.dynamo_settings  # noqa: F401  (tells Dynamo)

log = logging.getLogger(__name__)


def only_if_asked(x: Tensor) -> None:
    if log.isEnabledFor(logging.INFO):
        log.info("asked for")


GIVEN: dict[str, tuple[Callable[[Tensor], None], str]] = {
    "warning": (lambda x: log.warning("half is done"), "half is done"),
    "formatted": (lambda x: log.info("%d rows of %s", x.shape[0], "x"), "3 rows of x"),
    "written": (lambda x: log.error(f"{x.shape[0]} rows"), "3 rows"),
    "with a level": (lambda x: log.log(logging.WARNING, "level"), "level"),
    "with more": (lambda x: log.warning("more", extra={"rows": 3}), "more"),
    "only if asked": (only_if_asked, "asked for"),
    "of the root": (lambda x: logging.warning("root %s", "here"), "root here"),
}


class Logs(nn.Module):
    def __init__(self, give: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.give = give

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        self.give(x)
        return self.inner(y)


def graphs_of(give: Callable[[Tensor], None]) -> int:
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    model = torch.compile(Logs(give), backend=backend)
    model(torch.ones(3, 4))
    model(torch.ones(3, 4))
    return len(graphs)


@pytest.mark.parametrize("name", GIVEN)
def test_it_is_given_once_and_ends_no_graph(name: str, caplog: pytest.LogCaptureFixture) -> None:
    give, text = GIVEN[name]
    with caplog.at_level("INFO"):
        assert graphs_of(give) == 1
    assert [record.getMessage() for record in caplog.records if record.name in (__name__, "root")] == [text]


def test_a_text_of_a_tensors_values_ends_the_graph(caplog: pytest.LogCaptureFixture) -> None:
    assert graphs_of(lambda x: log.warning("sum %s", x.sum())) > 1
    assert len([record for record in caplog.records if record.name == __name__]) == 2
