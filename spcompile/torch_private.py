"""The only file that imports private names of torch, each with the version it was read from."""

from __future__ import annotations

# torch 2.13: torch/_functorch/aot_autograd.py, partitioners.py; torch/_dynamo/backends/common.py
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition

# torch 2.13: torch/_guards.py. The context that Dynamo holds while a backend runs.
from torch._guards import TracingContext, detect_fake_mode

# torch 2.13: torch/_subclasses/functional_tensor.py
from torch._subclasses.functional_tensor import (
    FunctionalTensor,
    FunctionalTensorMode,
    disable_functional_mode,
)

__all__ = [
    "FunctionalTensor",
    "FunctionalTensorMode",
    "TracingContext",
    "aot_autograd",
    "detect_fake_mode",
    "disable_functional_mode",
    "min_cut_rematerialization_partition",
]
