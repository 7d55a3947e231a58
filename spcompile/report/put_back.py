"""What a model keeps besides parameters, put back after a run: attributes, and the dicts and numbers of its buffers."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.utils import _pytree as pytree

_HELD = (dict, list, set)


@contextlib.contextmanager
def numbers_put_back(model: nn.Module, example_inputs: Any) -> Iterator[None]:
    """`put_back`, and the numbers in buffers and inputs that the model writes to; for what has numbers."""
    tensors = [x for x in (*model.buffers(), *pytree.tree_leaves(example_inputs)) if isinstance(x, Tensor)]
    before = [(x, x.detach().clone()) for x in tensors if not x.is_meta and not isinstance(x, FakeTensor)]
    try:
        with put_back(model):
            yield
    finally:
        for x, old in before:
            if not torch.equal(x, old):
                x.data.copy_(old)


@contextlib.contextmanager
def put_back(model: nn.Module) -> Iterator[None]:
    """Leave every module with the attributes that it had, and with what its dicts, lists and sets held.

    A cache beside a buffer, such as how many positions of a table are filled, would else belong to another run. The
    numbers in tensors are the caller's to put back.
    """
    before = [(module, dict(vars(module)), _contents(module)) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes, contents in before:
            vars(module).clear()
            vars(module).update(attributes)
            for name, held in contents.items():
                _refill(attributes[name], held)


def _contents(module: nn.Module) -> dict[str, Any]:
    return {name: copy.copy(value) for name, value in vars(module).items() if type(value) in _HELD}


def _refill(value: Any, held: Any) -> None:
    if isinstance(value, list):
        value[:] = held
    else:
        value.clear()
        value.update(held)
