"""Drawings for docs/how-it-works.md, made from graphs that the compiler makes and from the layouts that it uses.

A drawing of a block has one line for each op that computes or sends, with the shape that one rank holds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spcompile.explain import explain
from spcompile.machine.sequence import positions

ROWS, WIDTH, HEADS, RANKS = 16, 16, 4, 4
_LINE = re.compile(r'^\w+: "\(?(\w+\[[\d, ]+\]).*?" = (aten|spx)\.(\w+)\((\w+)')
_COMPUTES = {"linear", "layer_norm", "gelu", "add", "attention", "ring_attention"}
_SENDS = {"all_gather", "reduce_scatter", "all_reduce", "all_to_all"}


class DrawnBlock(nn.Module):
    """Attention and an MLP, as everybody writes them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """x_BSD: [B, S, D]."""
        heads = self.qkv(self.norm(x_BSD)).unflatten(-1, (3, HEADS, WIDTH // HEADS))
        q_BNSH, k_BNSH, v_BNSH = heads.permute(2, 0, 3, 1, 4)
        y_BNSH = F.scaled_dot_product_attention(q_BNSH, k_BNSH, v_BNSH, is_causal=True)
        x_BSD = x_BSD + self.out(y_BNSH.transpose(1, 2).flatten(2))
        return x_BSD + self.down(F.gelu(self.up(self.norm(x_BSD))))


def block_drawing(mesh: Mapping[str, int], behind: str, **options: Any) -> str:
    """What one rank of a mesh computes and sends for a block, behind a pass."""
    plan = explain(DrawnBlock(), (torch.empty(1, ROWS, WIDTH),), mesh, **options)
    return "\n".join(_lines(plan.graph(behind)))


def _lines(text: str) -> Iterator[str]:
    for shape, _, op, _ in (match.groups() for line in text.splitlines() if (match := _LINE.match(line))):
        if op in _COMPUTES:
            yield f"   {op:<16} {shape}"
        elif op in _SENDS:
            yield f"=> {op:<16} {shape}"


def layout_drawing(order: str) -> str:
    """Which of 16 tokens each of four ranks holds."""
    rows = []
    for rank in range(RANKS):
        held = {int(p) for p in positions(ROWS, rank, RANKS, order)}
        rows.append(f"rank {rank}  " + " ".join(f"{p:2}" if p in held else " ." for p in range(ROWS)))
    return "\n".join(rows)


def hops_drawing(order: str) -> str:
    """Scores under a causal mask that each rank computes at each hop of a ring, and their sum."""
    own = [positions(ROWS, rank, RANKS, order) for rank in range(RANKS)]
    table = [
        [int((own[rank][:, None] >= own[(rank - hop) % RANKS]).sum()) for hop in range(RANKS)] for rank in range(RANKS)
    ]
    head = "        " + "".join(f"{f'hop {hop}':>7}" for hop in range(RANKS)) + "    all"
    rows = [f"rank {rank}  " + "".join(f"{n:>7}" for n in row) + f"{sum(row):>7}" for rank, row in enumerate(table)]
    return "\n".join([head, *rows])


HOW_DRAWINGS: Mapping[str, Callable[[], str]] = {
    "all-reduce": partial(block_drawing, {"tp": 2}, "lower-tensor-parallel", passes={"split-all-reduce": False}),
    "sequence-parallel": partial(block_drawing, {"tp": 2}, "lower-tensor-parallel"),
    "ring": partial(block_drawing, {"cp": 2}, "parallelize-attention", attention="ring"),
    "ulysses": partial(block_drawing, {"cp": 2}, "parallelize-attention", attention="ulysses"),
    "contiguous": partial(layout_drawing, "contiguous"),
    "zigzag": partial(layout_drawing, "zigzag"),
    "contiguous-hops": partial(hops_drawing, "contiguous"),
    "zigzag-hops": partial(hops_drawing, "zigzag"),
}
