"""Weights put together again: the state of a sharded model on one rank, and `save_pretrained` that writes it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def gathered_state(model: nn.Module) -> dict[str, Tensor]:
    """The whole state dict on CPU, on the first rank of the mesh; {} on the others, which help to gather it.

    One parameter after the other is gathered, so that no accelerator holds more than the largest. Tied ones stay tied.
    """
    state = model.state_dict(keep_vars=True)
    first = all(_is_on_first_rank(value) for value in state.values() if isinstance(value, DTensor))
    gathered: dict[int, Tensor] = {}
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, value in state.items():
            if id(value) not in gathered:
                whole = value.detach()
                whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
                gathered[id(value)] = whole.cpu() if first else torch.empty(0)
            found[name] = gathered[id(value)]
    return found if first else {}


def save_whole(model: nn.Module) -> None:
    """Where a model has a `save_pretrained`, let it write whole weights, once."""
    base: Any = type(model)
    if hasattr(base, "save_pretrained"):
        model.__class__ = _saving_whole(base)


def _is_on_first_rank(value: DTensor) -> bool:
    return not any(value.device_mesh.get_coordinate() or ())


@functools.cache
def _saving_whole(base: Any) -> type[nn.Module]:
    @functools.wraps(base.save_pretrained)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        if not args and kwargs.get("state_dict") is None:
            kwargs["state_dict"] = gathered_state(self)
            if not kwargs["state_dict"]:
                return None
        return base.save_pretrained(self, save_directory, *args, **kwargs)

    kept = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (base,), {**kept, "save_pretrained": save_pretrained})
