"""Which values have gradients: floating numbers, and complex ones."""

from __future__ import annotations

from typing import Any

import torch


def takes_gradient(value: Any) -> bool:
    """Whether autograd gives a value gradients, by its dtype."""
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())
