"""What optimizers keep for each parameter, before there is one to look at."""

from __future__ import annotations

from dataclasses import dataclass


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
