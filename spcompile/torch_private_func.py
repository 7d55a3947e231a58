"""Private names of torch.func and of ops of higher order, each with the version it was read from."""

from __future__ import annotations

from typing import Any

import torch

# torch 2.13: torch/_decomp/__init__.py
from torch._decomp import get_decompositions

# torch 2.13: torch/_functorch/predispatch.py. What begins and ends a level, and what a vmap leaves besides.
from torch._functorch import predispatch

# torch 2.13: torch/_functorch/eager_transforms.py. How torch.func asks for gradients.
from torch._functorch.eager_transforms import _autograd_grad as autograd_grad_of_level
from torch._functorch.predispatch import _vmap_decrement_nesting, _vmap_increment_nesting, lazy_load_decompositions
from torch._ops import _higher_order_ops

# torch 2.13: torch/csrc/functorch/init.cpp and autograd/init.cpp, which have no types.
_functorch: Any = torch._C._functorch
_autograd: Any = torch._C._autograd
_jvp_increment_nesting, _jvp_decrement_nesting = (  # torch 2.11 has none of its own
    getattr(predispatch, name, getattr(_functorch, name))
    for name in ("_jvp_increment_nesting", "_jvp_decrement_nesting")
)

LEVELS = (
    (_vmap_increment_nesting, _vmap_decrement_nesting),
    (_functorch._grad_increment_nesting, _functorch._grad_decrement_nesting),
    (_jvp_increment_nesting, _jvp_decrement_nesting),
)
FORWARD_LEVEL = _jvp_increment_nesting
SAVING_SWITCHES = (_autograd._saved_tensors_hooks_disable, _autograd._saved_tensors_hooks_enable)  # around a level
VMAP_SWITCHES = (_vmap_increment_nesting, _vmap_decrement_nesting, lazy_load_decompositions)

__all__ = [
    "FORWARD_LEVEL",
    "LEVELS",
    "SAVING_SWITCHES",
    "VMAP_SWITCHES",
    "autograd_grad_of_level",
    "get_decompositions",
    "treat_alike",
]


def treat_alike(mode: type, known: type) -> None:
    """Of torch 2.13: torch/_ops.py. Ops of higher order look a mode up by its class: give `mode` what `known` has."""
    for op in list(_higher_order_ops.values()):
        if known in op.python_key_table:
            op.python_key_table.setdefault(mode, op.python_key_table[known])
