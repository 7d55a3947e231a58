"""Every use of a private name of torch, each with the version it was read from."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch.distributed._functional_collectives  # noqa: F401  torch 2.13: Meta kernels of torch.ops._c10d_functional
from torch.distributed.distributed_c10d import _resolve_process_group  # torch 2.13

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.distributed_c10d import GroupName


def resolve_process_group(name: str) -> ProcessGroup:
    """The process group with this c10d name."""
    return _resolve_process_group(cast("GroupName", name))
