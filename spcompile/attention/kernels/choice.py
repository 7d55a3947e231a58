"""Which kernel takes an attention on a GPU, best first: a table that `explain` reads and that decides at run time.

What it asks is known from the graph and the device alone, so all ranks with one kind of device choose alike. Speeds are
those published for H100, in TFLOP/s of bfloat16 forward, causal, head size 128, 8k tokens: cuDNN 540 to 590, flash
(FlashAttention-2) 350; Triton kernels of others reach 370 (SandAI-org/MagiAttention, kernel benchmark). Ours are not
measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from spcompile.attention.kernels.triton.configs import HEAD_SIZES
from spcompile.attention.scores.mask import AttentionMask

HALVES = (torch.bfloat16, torch.float16)
LITTLE_SHARED_MEMORY = (86, 87, 89, 120, 121)  # compute capabilities with about 100 KiB for one program
MOST_HEAD = HEAD_SIZES[-1]


@dataclass(frozen=True)
class Wanted:
    """An attention, and what is to compute it.

    capability: of the device, such as 90. is_plain: nothing happens to scores but scale and mask. in_hops: keys come
    hop by hop, or rows and keys are not in their natural order. square: as many rows as keys.
    """

    capability: int
    dtype: torch.dtype
    head_size: int
    v_size: int
    mask: AttentionMask
    is_plain: bool
    in_hops: bool
    square: bool
    scale: float


@dataclass(frozen=True)
class Row:
    """A kernel. takes: which attentions, and why these; accepts: whether this one is among them."""

    name: str
    takes: str
    accepts: Callable[[Wanted], bool]


def _is_one_kernels(wanted: Wanted) -> bool:
    """Full or causal attention of whole rows in halves, with head sizes that kernels of others take."""
    causal = wanted.mask == AttentionMask(causal=True) and wanted.square
    sizes = (wanted.head_size, wanted.v_size)
    return (
        wanted.is_plain
        and not wanted.in_hops
        and (causal or wanted.mask == AttentionMask())
        and wanted.dtype in HALVES
        and all(size % 8 == 0 for size in sizes)
    )


def _cudnn(wanted: Wanted) -> bool:
    return (
        _is_one_kernels(wanted) and wanted.capability in (90, 100, 103) and max(wanted.head_size, wanted.v_size) <= 128
    )


def _flash(wanted: Wanted) -> bool:
    most = 128 if wanted.capability in LITTLE_SHARED_MEMORY else 256
    fits = wanted.head_size == wanted.v_size <= most
    return _is_one_kernels(wanted) and wanted.capability >= 80 and fits


def _triton(wanted: Wanted) -> bool:
    fits = max(wanted.head_size, wanted.v_size) <= MOST_HEAD and wanted.scale > 0
    has_memory = wanted.capability >= 80 and wanted.capability not in LITTLE_SHARED_MEMORY
    return has_memory and fits and wanted.dtype in (*HALVES, torch.float32)


TABLE = (
    Row("cudnn", "full and causal attention on Hopper and later, on one rank's heads: the fastest there", _cudnn),
    Row("flash", "the same on other GPUs from sm_80 on, the fastest there; also where cuDNN declines", _flash),
    Row("triton", "any mask, hops of rings, biases, softcap, sinks, ALiBi, dropout; also float32", _triton),
    Row(
        "tiles", "all else: float64, head sizes over 256, GPUs with less shared memory; exact, and slow", lambda _: True
    ),
)


def kernels_for(wanted: Wanted) -> list[Row]:
    """The rows that accept an attention, best first."""
    return [row for row in TABLE if row.accepts(wanted)]
