"""Warnings of a model do not end its graph, and are given while it is traced, at the user's line."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.fx as fx
from torch import Tensor, nn

import spcompile.capture.dynamo_settings  # noqa: F401  (tells Dynamo)


class OwnWarning(UserWarning):
    """Of the model's."""


def formatted(x: Tensor) -> None:
    warnings.warn(f"{x.shape[0]} rows", FutureWarning, stacklevel=1)


GIVEN: dict[str, tuple[Callable[[Tensor], None], str, type[Warning]]] = {
    "plain": (lambda x: warnings.warn("half is done"), "half is done", UserWarning),  # noqa: B028
    "formatted": (formatted, "3 rows", FutureWarning),
    "own category": (lambda x: warnings.warn("mine", category=OwnWarning, stacklevel=1), "mine", OwnWarning),
    "an instance": (lambda x: warnings.warn(OwnWarning("made"), stacklevel=1), "made", OwnWarning),
}


class Warns(nn.Module):
    def __init__(self, warn: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4))
        self.warn = warn

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        self.warn(x)
        return self.inner(y)


@pytest.mark.parametrize("name", GIVEN)
def test_it_is_given_once_and_ends_no_graph(name: str) -> None:
    warn, text, category = GIVEN[name]
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    model = torch.compile(nn.Sequential(Warns(warn)), backend=backend)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(torch.ones(3, 4))
        model(torch.ones(3, 4))
    (found,) = [one for one in caught if str(one.message) == text]
    assert found.category is category
    assert found.filename == __file__
    lines, first = inspect.getsourcelines(warn)
    assert first <= found.lineno < first + len(lines)
    assert len(graphs) == 1


def caller(x: Tensor) -> Tensor:
    deprecated()
    return x * 2


def deprecated() -> None:
    warnings.warn("use another", DeprecationWarning, stacklevel=2)


def test_stacklevel_names_the_caller() -> None:
    torch._dynamo.reset()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.compile(caller, backend="eager", fullgraph=True)(torch.ones(2))
    (found,) = [one for one in caught if str(one.message) == "use another"]
    assert found.lineno == inspect.getsourcelines(caller)[1] + 1
