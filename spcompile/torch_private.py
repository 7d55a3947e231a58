"""The only place that imports private parts of torch; each function says from which version it was read."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

# Registers the Meta kernels of torch.ops._c10d_functional (torch 2.13, torch/distributed/_functional_collectives.py).
import torch.distributed._functional_collectives  # noqa: F401

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.distributed_c10d import GroupName


def process_group(name: str) -> ProcessGroup:
    """The process group that c10d registered under `name` (torch 2.13, torch/distributed/distributed_c10d.py)."""
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(cast("GroupName", name))
