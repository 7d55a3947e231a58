"""Megatron sequence parallelism is derived one rewrite at a time: behind each one all ranks are right.

B batch, S sequence, D width, F hidden width of the MLP.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from example_numerics import assert_equal, on_all_ranks, on_one_device
from torch import Tensor

from spcompile.machine.mesh import MeshShape
from spcompile.options import Options
from spcompile.passes import PIPELINE
from spcompile.passes_api import RewritePass
from spcompile.program.build import build
from spcompile.report.example_runs import with_dynamo_graph

DERIVATION = [p for p in PIPELINE if isinstance(p, RewritePass)]
MESH = {"tp": 2}
B, S, D, WIDE = 2, 7, 4, 6


def block(x_BSD: Tensor, table_TD: Tensor, norm_D: Tensor, up_DF: Tensor, down_FD: Tensor) -> Tensor:
    """Attention, a norm of its heads, position lookups, a norm, dropout, residuals, and an MLP that tp splits."""
    h_B1SD = x_BSD.unsqueeze(1)
    x_BSD = x_BSD + F.scaled_dot_product_attention(h_B1SD, h_B1SD, h_B1SD, is_causal=True).squeeze(1)
    h_BNSH = F.layer_norm(x_BSD, (D,)).unflatten(-1, (2, -1)).transpose(1, 2)
    x_BSD = x_BSD + F.layer_norm(
        F.scaled_dot_product_attention(h_BNSH, h_BNSH, h_BNSH).transpose(1, 2).flatten(2), (D,)
    )
    y_BSD = F.dropout(F.gelu(F.layer_norm(x_BSD, (D,), norm_D) @ up_DF) @ down_FD, 0.2)
    places_SD = F.embedding(torch.arange(S), table_TD).tanh()
    return F.layer_norm(x_BSD + places_SD + y_BSD, (D,)) @ norm_D


def inputs() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    shapes = ((B, S, D), (9, D), (D,), (D, WIDE), (WIDE, D))
    return tuple(torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes)


def check(name: str, limit: int) -> int:
    """All ranks against one device with `limit` rewrites of the pass; returns how many it made."""
    names = [p.name for p in PIPELINE]
    later = {p.name for p in DERIVATION if names.index(p.name) > names.index(name)}
    chosen = [replace(p, limit=limit) if p.name == name else p for p in PIPELINE if p.name not in later]

    def work(gm: torch.fx.GraphModule, given: list[Tensor]) -> int:
        program = build(gm, given, MeshShape.of(MESH), Options(), chosen)
        expected = on_one_device(gm.forward, given)
        for rank in on_all_ranks(program.gm, given, MESH):
            assert_equal(rank, expected)
        return next(s.report.rewrites for s in program.history.snapshots if s.name == name)

    made: int = with_dynamo_graph(block, inputs(), work)
    return made


@pytest.mark.thinned(14)
@pytest.mark.parametrize("name", [p.name for p in DERIVATION])
def test_right_behind_every_single_rewrite(name: str) -> None:
    limit = 0
    while check(name, limit) == limit:
        limit += 1
    assert limit > 1, "the pass made no rewrite"


def test_the_derivation_is_made_of_single_rewrites() -> None:
    gathers = ["split-all-reduce", "sink-all-gather", "split-all-gather"]
    assert [p.name for p in DERIVATION] == [*gathers, "hoist-shard", "cancel-collectives"]
