"""The only file that imports private names of torch, each with the version it was read from."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch.distributed._functional_collectives  # noqa: F401  torch 2.13: Meta kernels of torch.ops._c10d_functional

# torch 2.13: torch/_dispatch/python.py
from torch._dispatch.python import no_python_dispatcher

# torch 2.13: torch/_functorch/aot_autograd.py, partitioners.py; torch/_dynamo/backends/common.py
from torch._dynamo.backends.common import aot_autograd

# torch 2.13: torch/_dynamo/exc.py. Asks Dynamo to trace again, as with numbers in place of symbolic floats.
from torch._dynamo.exc import RestartAnalysis
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition

# torch 2.13: torch/_functorch/predispatch.py. What a traced vmap leaves besides its operations.
from torch._functorch.predispatch import (
    _vmap_decrement_nesting,
    _vmap_increment_nesting,
    lazy_load_decompositions,
)

# torch 2.13: torch/_guards.py. The context that Dynamo holds while a backend runs.
from torch._guards import TracingContext, detect_fake_mode

# torch 2.13: torch/_inductor/compile_fx.py, custom_graph_pass.py
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

# torch 2.13: torch/_inductor/decomposition.py. What compile_fx hands to AOTAutograd.
from torch._inductor.decomposition import select_decomp_table as inductor_decompositions

# torch 2.13: torch/_inductor/fx_passes/control_dependencies.py
from torch._inductor.fx_passes.control_dependencies import preserve_node_ordering

# torch 2.13: torch/_subclasses/fake_tensor.py
from torch._subclasses.fake_tensor import unset_fake_temporarily

# torch 2.13: torch/_subclasses/functional_tensor.py
from torch._subclasses.functional_tensor import (
    FunctionalTensor,
    FunctionalTensorMode,
    disable_functional_mode,
)
from torch.distributed.distributed_c10d import _resolve_process_group  # torch 2.13
from torch.utils._ordered_set import OrderedSet  # torch 2.13

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.distributed_c10d import GroupName

VMAP_SWITCHES = (_vmap_increment_nesting, _vmap_decrement_nesting, lazy_load_decompositions)

__all__ = [
    "VMAP_SWITCHES",
    "CustomGraphPass",
    "FunctionalTensor",
    "FunctionalTensorMode",
    "OrderedSet",
    "RestartAnalysis",
    "TracingContext",
    "aot_autograd",
    "compile_fx",
    "compile_fx_inner",
    "detect_fake_mode",
    "disable_functional_mode",
    "get_hash_for_files",
    "inductor_decompositions",
    "make_boxed_func",
    "min_cut_rematerialization_partition",
    "no_python_dispatcher",
    "preserve_node_ordering",
    "resolve_process_group",
    "unset_fake_temporarily",
]


def resolve_process_group(name: str) -> ProcessGroup:
    """The process group with this c10d name."""
    return _resolve_process_group(cast("GroupName", name))
