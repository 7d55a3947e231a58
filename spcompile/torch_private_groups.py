"""Private names of torch that have to do with process groups. No file but torch_private.py imports others.

All were read from torch 2.13, torch/distributed/distributed_c10d.py.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch.distributed.distributed_c10d import _get_default_store, _resolve_process_group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.distributed_c10d import GroupName


def resolve_process_group(name: str) -> ProcessGroup:
    """The process group with this c10d name."""
    return _resolve_process_group(cast("GroupName", name))


def default_store() -> dist.Store:
    """The store of the default process group, through a connection of its own, where its kind has connections."""
    store = _get_default_store()
    return store.clone() if hasattr(store, "clone") else store


def group_timeout(device_type: str) -> timedelta:
    """How long the default process group waits on a device: what `init_process_group` was given, or its default."""
    world = dist.group.WORLD
    assert world is not None
    backend: Any = world._get_backend(torch.device(device_type))
    backend = getattr(backend, "wrapped_pg", backend)  # TORCH_DISTRIBUTED_DEBUG=DETAIL wraps it
    return cast("timedelta", backend.options._timeout)


def local_group(name: str, ranks: Sequence[int], timeout: timedelta) -> dist.ProcessGroup:
    """A group of some ranks of the world, made by its members alone under a name that they all know.

    `dist.new_group(use_local_synchronization=True)` names a group after the number of groups that this process is in.
    Members that differ in it, as after a mesh over some of them, would wait for each other until the timeout.
    """
    world = c10d._get_default_group()
    backend, store = c10d._world.pg_map[world]
    members = list(ranks)
    own = members.index(dist.get_rank())
    make: Any = c10d._new_process_group_helper
    group, _ = make(len(members), own, members, c10d.Backend(backend), store, name, timeout=timeout, group_desc=name)
    c10d._world.pg_group_ranks[group] = {rank: place for place, rank in enumerate(members)}
    return cast("dist.ProcessGroup", group)


def keep_for_ever(value: Any) -> None:
    """Never destroy an object: a group with an operation in flight would wait for it when the process ends."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))
