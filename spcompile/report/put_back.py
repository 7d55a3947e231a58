"""What a model keeps besides parameters, put back after a run: attributes, and the dicts of its buffers."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

from torch import nn

_HELD = (dict, list, set)


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
