"""Hops of rings that documents leave empty: which are found, that only they are left out, and what is then sent."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from example_numerics import after_pass, check_pipeline, nodes_of, remarks_of
from ring_requests import noted
from torch import Tensor

from spcompile import explain
from spcompile.attention import op
from spcompile.attention.ring.hops import needed_hops, spec_agree_on_hops
from spcompile.attention.ring.ring import Ring
from spcompile.attention.scores.mask import WITHOUT_KEYS, AttentionMask
from spcompile.collectives import point_to_point
from spcompile.collectives.point_to_point import Requests, Shift
from spcompile.diagnostics import IllegalOption, RanksDisagree, Remarks
from spcompile.machine import sequence
from spcompile.machine.mesh import MeshShape
from spcompile.options import Options
from spcompile.passes.placement.parallelize_attention import ParallelizeAttention, _is_worth_asking
from spcompile.passes_api import Context
from spcompile.program.build import LocalProgram

MASKS = ["documents", "causal documents", "causal documents window=9", "documents chunk=10 window_right=6"]
MASKS += ["causal documents window=9 fill=-1e+30"]


def lengths_to_ids(*rows: list[int]) -> Tensor:
    """Document ids [B, S] of documents of these lengths, one after the other."""
    return torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in rows])


def by_looking(q_documents: Tensor, k_documents: Tensor, mask: AttentionMask, ring: Ring) -> list[bool]:
    """Every pair of ranks, in the dense mask."""
    at = [torch.arange(n) for n in (ring.q_length, ring.k_length)]
    keep = mask.allowed(*at, q_documents, k_documents)[:, 0]
    found = [False] * ring.degree
    for q_rank in range(ring.degree):
        for k_rank in range(ring.degree):
            rows, keys = (
                torch.cat([torch.arange(run.first, run.last + 1) for run in runs] or [torch.arange(0)])
                for runs in (ring.q_runs(q_rank), ring.k_runs(k_rank))
            )
            found[(q_rank - k_rank) % ring.degree] |= bool(keep[:, rows][:, :, keys].any())
    return found


@pytest.mark.parametrize("order", sequence.ORDERS)
@pytest.mark.parametrize("text", MASKS)
def test_hops_are_those_with_a_pair_that_the_mask_leaves(text: str, order: str) -> None:
    mask, random = AttentionMask.parse(text), torch.Generator().manual_seed(len(text))
    for degree, inner, S, T in ((8, 1, 64, 64), (5, 1, 61, 61), (4, 2, 60, 60), (3, 1, 9, 20), (4, 1, 21, 5)):
        ring = Ring(S, T, degree, order, inner)
        for most in (1, 4, 12):
            ids = [torch.randint(0, most, (2, n), generator=random).sort(-1).values for n in (S, T)]
            if S == T:
                ids[1] = ids[0]
            if mask.fill is not None and most > 1:
                ids[0] = ids[0].masked_fill(torch.arange(S) == S // 2, WITHOUT_KEYS)
            found = needed_hops(*ids, mask, ring).tolist()
            assert found == by_looking(*ids, mask, ring)
            assert {d for d in range(1, degree) if found[d]} <= set(ring.distances(mask))


@pytest.mark.parametrize("order", sequence.ORDERS)
@pytest.mark.parametrize("text", MASKS)
def test_no_hop_is_left_out_that_scattered_documents_need(text: str, order: str) -> None:
    mask, random = AttentionMask.parse(text), torch.Generator().manual_seed(len(text))
    for _ in range(20):
        ids = torch.randint(-3, 9, (2, 48), generator=random)
        ring = Ring(48, 48, 6, order)
        found, needed = needed_hops(ids, ids, mask, ring).tolist(), by_looking(ids, ids, mask, ring)
        assert all(a or not b for a, b in zip(found, needed, strict=True))


def test_ids_of_any_dtype() -> None:
    ids, ring = lengths_to_ids([8, 8]), Ring(16, 16, 4, "contiguous")
    for dtypes in ((torch.bool, torch.bool), (torch.int32, torch.int64), (torch.float32, torch.float32)):
        found = needed_hops(*(ids.to(dtype) for dtype in dtypes), AttentionMask.parse("causal documents"), ring)
        assert found.tolist() == [True, True, False, False]


PACKED = [  # documents of 64 tokens on 8 ranks, and the distances that causal rings need in contiguous and zigzag order
    ([8] * 8, (), (1, 7)),
    ([16] * 4, (1,), (1, 2, 3, 5, 6, 7)),
    ([5, 7, 4, 9, 7, 8, 8, 8, 8], (1,), (1, 2, 7)),
    ([40, 24], (1, 2, 3, 4), (1, 2, 3, 4, 5, 6, 7)),
    ([64], (1, 2, 3, 4, 5, 6, 7), (1, 2, 3, 4, 5, 6, 7)),
]


@pytest.mark.parametrize(("documents", "contiguous", "zigzag"), PACKED)
def test_how_far_packed_documents_reach(documents: list[int], contiguous: Any, zigzag: Any) -> None:
    ids, mask = lengths_to_ids(documents), AttentionMask.parse("causal documents")
    for order, expected in (("contiguous", contiguous), ("zigzag", zigzag)):
        hops = torch.ops.spx.ring_hops(ids, ids, str(mask), 8, order, 1)
        assert Ring(64, 64, 8, order).stops(mask, hops) == (0, *expected)


def test_the_op_is_well_behaved() -> None:
    ids = lengths_to_ids([5, 7], [3, 9])
    torch.library.opcheck(torch.ops.spx.ring_hops.default, (ids, ids[:1], "causal documents", 3, "zigzag", 1))


def test_ranks_that_were_given_other_documents_are_told_so() -> None:
    hops = torch.tensor([True, True, False])
    assert all(torch.equal(found, hops) for found in spec_agree_on_hops([(hops, "cp")] * 3))
    with pytest.raises(RanksDisagree, match="document ids"):
        spec_agree_on_hops([(hops, "cp"), (hops, "cp"), (~hops, "cp")])


def packed(q: Tensor, k: Tensor, v: Tensor, ids: Tensor, layers: int = 2, causal: bool = True) -> Tensor:
    at = torch.arange(q.shape[2])
    keep = ids[:, None, :, None] == ids[:, None, None, :]
    keep = keep & (at[:, None] >= at) if causal else keep
    for _ in range(layers):
        q = F.scaled_dot_product_attention(q, k, v, attn_mask=keep, enable_gqa=True)
    return q


def inputs_for(ids: Tensor) -> list[Tensor]:
    B, S = ids.shape
    shapes = ((B, 4, S, 4), (B, 2, S, 4), (B, 2, S, 4))
    return [*((0.5 * torch.randn(shape, dtype=torch.float64)).requires_grad_() for shape in shapes), ids]


@pytest.fixture
def shifts(monkeypatch: pytest.MonkeyPatch) -> list[list[Shift]]:
    """All shifts of rank 0, one list for each ring that the simulator runs."""
    found: list[list[Shift]] = []

    def counting(ranks: list[Requests[Any]]) -> list[Any]:
        found.append([])
        return point_to_point.drive_all([noted(ranks[0], found[-1]), *ranks[1:]])

    monkeypatch.setattr(op, "drive_all", counting)
    return found


def ops_of(program: LocalProgram) -> tuple[int, int]:
    return len(nodes_of(program, "spx.agree_on_hops")), len(nodes_of(program, "spx.ring_attention"))


@pytest.mark.thinned(8)
@pytest.mark.parametrize("balance", ["contiguous", "zigzag"])
@pytest.mark.parametrize(
    ("lengths", "forward"),
    [
        ([[4] * 4, [8, 8]], {"contiguous": [1], "zigzag": [1, 1, 1]}),
        ([[4] * 4, [4, 4, 4, 2, 2]], {"contiguous": [], "zigzag": [1, 2]}),
        ([[2, 2, 4, 2, 2, 4]] * 2, {"contiguous": [], "zigzag": [1, 2]}),
        ([[16], [16]], {"contiguous": [1, 1, 1], "zigzag": [1, 1, 1]}),
    ],
)
def test_only_the_hops_that_documents_need_are_made(
    lengths: list[list[int]], forward: dict[str, list[int]], balance: str, shifts: list[list[Shift]]
) -> None:
    """Outputs and gradients of whole graphs on four ranks; how far rank 0 sends, in every ring of the run."""
    program = check_pipeline(packed, inputs_for(lengths_to_ids(*lengths)), {"cp": 4}, attention="ring", balance=balance)
    assert ops_of(program) == (1, 2)  # one for both layers
    way = forward[balance]
    home = [*(d for d in way for _ in range(2)), 4 - sum(way)] if way else []  # keys, and gradients one hop behind
    assert [[shift.distance for shift in ring] for ring in shifts] == [way, way, home, home]


@pytest.mark.thinned(2)
def test_uneven_lengths_two_masks_and_a_bidirectional_one() -> None:
    def two(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        return packed(q, k, v, ids, 2) + packed(q, k, v, ids, 1, causal=False)

    for balance in sequence.ORDERS:
        ids = lengths_to_ids([3, 5, 5], [6, 1, 6])
        program = check_pipeline(two, inputs_for(ids), {"cp": 3}, attention="ring", balance=balance)
        assert ops_of(program) == (2, 3)  # one for each mask


@pytest.mark.thinned(2)
def test_hybrids_ask_for_the_hops_of_their_groups() -> None:
    ids = lengths_to_ids([6, 7], [13])
    program = check_pipeline(packed, inputs_for(ids), {"cp": 4}, attention={"ulysses": 2, "ring": 2})
    (asked,) = nodes_of(program, "spx.ring_hops")
    assert asked.args[3:] == (2, "zigzag", 2)


@pytest.mark.thinned(2)
def test_remarks_say_which_order_documents_get() -> None:
    for balance in sequence.ORDERS:
        program = after_pass(
            "parallelize-attention", packed, inputs_for(lengths_to_ids([8, 8])), attention="ring", balance=balance
        )
        texts = [remark.text for remark in remarks_of(program, "SPR203")]
        assert any(f"in {balance} order" in text and "documents" in text for text in texts)


def test_on_a_gpu_it_is_asked_where_the_tables_say_so() -> None:
    """Ids on a GPU, a length of which one hop takes long, and one of which all take less than waiting for them."""
    asked = {}
    for length in (512, 2**20):
        q, ids = (torch.empty(shape, device="meta") for shape in ((1, 1, length // 8, 64), (1, length)))
        graph = torch.fx.Graph()
        nodes = [graph.placeholder(name) for name in ("q", "ids")]
        for node, value in zip(nodes, (q, ids.long()), strict=True):
            node.meta["val"] = value
        layout = ("causal documents", 1.0, length, length, "cp", 8, "zigzag")
        args = (nodes[0], nodes[0], nodes[0], nodes[1], nodes[1], None, None, *layout)
        ring = graph.call_function(torch.ops.spx.ring_attention.default, args)
        ring.meta["val"] = (q, q)
        context = Context(MeshShape.of({"cp": 8}), Options(), Remarks())
        asked[length] = _is_worth_asking([ring], context)
    assert asked == {512: False, 2**20: True}


@pytest.mark.thinned(3)
def test_explain_says_at_most() -> None:
    class Packed(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
            return packed(q, k, v, ids, 1)

    tensors = [x.detach().float().requires_grad_(x.requires_grad) for x in inputs_for(lengths_to_ids([8, 8]))[:3]]
    found = {}
    for skip in ("always", "never"):
        plan = explain(
            Packed(), [*tensors, lengths_to_ids([8, 8])], mesh={"cp": 4}, attention="ring",
            passes={"parallelize-attention": {"skip_hops": skip}},
        )  # fmt: skip
        rows = [row for row in plan.collectives if row.op.startswith("ring")]
        found[skip] = [(row.op, row.bytes) for row in rows]
        assert {row.at_most for row in rows} == {skip == "always"}
        assert ("at most" in str(plan)) == (skip == "always")
        dicts = [row for row in plan.to_dict()["collectives"] if row["op"].startswith("ring")]
        assert all(("at_most" in row) == (skip == "always") for row in dicts)
    assert found["always"] == found["never"]


@pytest.mark.thinned(2)
def test_the_pass_may_be_told() -> None:
    run: Callable[..., LocalProgram] = functools.partial(after_pass, "parallelize-attention", packed, attention="ring")
    inputs = inputs_for(lengths_to_ids([8, 8], [16]))
    assert ops_of(run(inputs)) == (1, 2)
    assert ops_of(run(inputs, passes={"parallelize-attention": {"skip_hops": "never"}})) == (0, 2)
    with pytest.raises(IllegalOption, match="always"):
        ParallelizeAttention(skip_hops="sometimes")
