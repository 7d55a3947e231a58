"""What optimizers keep for each parameter: by name before there is one, or as one that is there keeps it."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spcompile.diagnostics import IllegalOption

if TYPE_CHECKING:
    import torch

_SIDE = 64  # of the square parameter on which an optimizer is tried


@dataclass(frozen=True)
class Optimizer:
    """states: tensors of the size of a parameter. itemsize: bytes of an element of them; None: as the parameter's."""

    states: int
    itemsize: int | None = None

    def bytes(self, elements: int, itemsize: int) -> int:
        """Of the states of a parameter with so many elements of so many bytes."""
        return self.states * elements * (self.itemsize or itemsize)


OPTIMIZERS = {
    "adamw": Optimizer(2),
    "adamw-float32": Optimizer(2, 4),
    "adamw-master": Optimizer(3, 4),  # its two states and a copy of the parameter, in float32
    "momentum": Optimizer(1),
    "none": Optimizer(0),
}


def optimizer_of(text: str) -> Optimizer | None:
    """By its name, or as `text_of_states` says it; None for any other text."""
    found = re.fullmatch(r"(\d+) bytes an element", text)
    if found is None:
        return OPTIMIZERS.get(text)
    return Optimizer(1, int(found[1])) if int(found[1]) else OPTIMIZERS["none"]


def text_of_states(optimizer: torch.optim.Optimizer) -> str:
    """Bytes that an optimizer keeps for an element of its parameters, as `8 bytes an element`.

    Those of its states, once it has any. Before, those that one of its class with the same settings has behind a step
    on a small matrix of each of its dtypes: the most.

    Raises:
        IllegalOption: it has no states yet and cannot be tried.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    counted = [(_bytes_kept_for(optimizer, p), p.numel()) for p in parameters if optimizer.state.get(p)]
    if counted:
        each = round(sum(size for size, _ in counted) / max(1, sum(count for _, count in counted)))
    else:
        each = max((_tried(optimizer, dtype) for dtype in dict.fromkeys(p.dtype for p in parameters)), default=0)
    return f"{each} bytes an element"


def _bytes_kept_for(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> int:
    import torch

    return sum(x.nbytes for x in optimizer.state[parameter].values() if isinstance(x, torch.Tensor))


def _tried(optimizer: torch.optim.Optimizer, dtype: torch.dtype) -> int:
    """Bytes for an element."""
    import torch

    kind = type(optimizer)
    accepted = inspect.signature(kind).parameters
    settings = {name: value for name, value in optimizer.defaults.items() if name in accepted}
    parameter = torch.zeros(_SIDE, _SIDE, dtype=dtype, device="cpu", requires_grad=True)
    parameter.grad = torch.zeros_like(parameter)
    try:
        trial = kind([parameter], **settings)
        trial.step()
    except Exception as error:
        found = f"optimizer={kind.__name__}: it has no states yet, and trying it ended in {type(error).__name__}"
        raise IllegalOption(found, legal=f"one that has made a step, or a name: {', '.join(OPTIMIZERS)}") from error
    return round(_bytes_kept_for(trial, parameter) / parameter.numel()) if parameter in trial.state else 0
