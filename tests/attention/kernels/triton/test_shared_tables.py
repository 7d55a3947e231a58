"""Tables of tiles for all hops together: they say what each hop finds alone, and layers and masks cost no more."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from example_numerics import after_pass, check_pipeline, nodes_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from spcompile import explain
from spcompile.attention.kernels import hop_state
from spcompile.attention.kernels.table_op import _tile_tables
from spcompile.attention.kernels.triton import configs as config_table
from spcompile.attention.kernels.triton.configs import Config, Configs, variant_of
from spcompile.attention.kernels.triton.hop_provider import Triton, _shared
from spcompile.attention.kernels.triton.launch import Hop, Launch
from spcompile.attention.kernels.triton.shared_tables import KERNELS, SEGMENTS
from spcompile.attention.kernels.triton.tile_tables import cut_short, segments, tile_kinds
from spcompile.attention.ring.ring import Ring, ring_backward, ring_forward
from spcompile.attention.scores.mask import WITHOUT_KEYS, AttentionMask
from spcompile.attention.scores.provider import Rows, Scores
from spcompile.collectives.point_to_point import Requests, Shift
from spcompile.machine import sequence

TILES = Configs(Config(16, 32, 4, 1), Config(32, 16, 4, 1), Config(16, 16, 4, 1))
HEAD = 16


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in config_table.TABLE:
        monkeypatch.setitem(config_table.TABLE, key, TILES)


def chosen(table: Tensor, count: Tensor, tiles: int) -> Tensor:
    """How often each tile is in a segment, [..., tiles]."""
    found = torch.zeros(*count.shape, tiles, dtype=torch.int64)
    for line in torch.cartesian_prod(*[torch.arange(n) for n in count.shape]).tolist():
        at = tuple(line)
        for first, stop in table[at][: int(count[at])].tolist():
            found[at][first:stop] += 1
    return found


@pytest.mark.parametrize("most", [2, 3, 16])
def test_rows_that_are_cut_short_lose_nothing(most: int) -> None:
    """Every tile that is not empty is computed once; what is asked without need is PARTIAL, behind the others."""
    torch.manual_seed(most)
    for share in (0.1, 0.5, 0.9):
        kind = torch.rand(3, 4, 40)
        full, partial = kind < share / 2, (kind >= share / 2) & (kind < share)
        short = cut_short(full, partial, most)
        found = segments(*short, most)
        assert found.full.shape == found.partial.shape == (3, 4, most, 2)
        as_full, as_partial = chosen(found.full, found.full_count, 40), chosen(found.partial, found.partial_count, 40)
        once = as_full + as_partial
        assert bool((once[full | partial] == 1).all())
        assert int(once.max()) <= 1
        assert not bool((as_full.bool() & ~full).any())
        assert int(torch.maximum(found.full_count, found.partial_count).max()) <= most
    assert all(torch.equal(a, b) for a, b in zip(cut_short(full, partial, 40), (full, partial), strict=True))


MASKS = ["documents", "causal documents", "key_padding", "causal window=1000 documents key_padding"]
MASKS += ["causal window=20 documents fill=-1e+30"]
LAYOUTS = [  # queries, keys, ranks, order, inner
    (150, 150, 3, "zigzag", 1),
    (130, 130, 4, "contiguous", 1),
    (96, 50, 2, "zigzag", 2),
    (70, 70, 1, "contiguous", 1),
]


def data_of(mask: AttentionMask, S: int, T: int, batch: int = 2) -> dict[str, Tensor | None]:
    torch.manual_seed(S)
    ids = [torch.randint(0, 4, (batch, n)).sort(-1).values * 2**33 for n in (S, T)]
    if mask.fill is not None:
        ids = [(x >> 33).int() for x in ids]
        ids[0][:, S // 3 : S // 2] = WITHOUT_KEYS
    valid = (torch.arange(T) >= torch.tensor([[0], [T // 3]]))[:batch]
    return {
        "q_documents": ids[0] if mask.documents else None,
        "k_documents": (ids[0] if S == T and mask.fill is None else ids[1]) if mask.documents else None,
        "key_valid": valid if mask.key_padding else None,
    }


def tables_of(mask: AttentionMask, data: dict[str, Any], ring: Ring, rank: int, make: Any = None) -> Tensor:
    layout = (ring.q_length, ring.k_length, ring.degree, ring.order, ring.inner)
    at = sequence.positions(ring.q_length, rank, ring.degree, ring.order, inner=ring.inner)
    make = make or torch.ops.spx.tile_tables
    return make(at, None, *data.values(), str(mask), *layout, 4, HEAD, HEAD, "rich")


@pytest.mark.thinned(4)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("text", MASKS)
def test_every_hop_finds_what_it_would_find_alone(text: str, layout: Any) -> None:
    mask, ring = AttentionMask.parse(text), Ring(*layout)
    data = data_of(mask, ring.q_length, ring.k_length)
    for rank in range(ring.degree):
        S, T = (
            ring.inner * sequence.local_length(n, ring.inner * ring.degree, ring.order)
            for n in (ring.q_length, ring.k_length)
        )
        q, k = torch.empty(2, 1, S, HEAD), torch.empty(2, 1, T, HEAD)
        scores = Scores(mask, 1.0, **data, tables=tables_of(mask, data, ring, rank))
        assert variant_of(scores) == "rich"
        for part in range(ring.degree):
            alone = Hop(q, k, k, ring.q_runs(rank), ring.k_runs(part), scores, TILES)
            shared = Hop(q, k, k, (), (), scores, TILES, _shared(q, k, k, scores, TILES, part))
            assert torch.equal(shared.columns, alone.columns)
            for mine, other in zip(shared.places, alone.places, strict=True):
                assert torch.equal(mine.positions, other.positions.expand_as(mine.positions))
                if mine.documents is not None and other.documents is not None:  # numbers may differ, order may not
                    seen = (mine.positions >= 0).expand_as(mine.documents)
                    ids, others = mine.documents[seen], other.documents[seen]
                    assert torch.equal(ids[1:] > ids[:-1], others[1:] > others[:-1])
            for kernel in KERNELS:
                config = getattr(TILES, kernel)
                kinds = tile_kinds(mask, *alone.places, config.block_m, config.block_n)
                kinds = [x.mT if kernel == "keys" else x for x in kinds]
                kinds = [x.expand(shared.places[1].positions.shape[0], -1, -1) for x in kinds]
                found = shared.segments(kernel)
                assert found.most == SEGMENTS
                for table, count, expected in zip(
                    (found.full, found.partial), (found.full_count, found.partial_count), kinds, strict=True
                ):
                    assert torch.equal(chosen(table, count, expected.shape[-1]).bool(), expected)


def test_slices_of_parts_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    mask, ring = AttentionMask.parse("causal documents"), Ring(150, 150, 3, "zigzag")
    data = data_of(mask, 150, 150)
    together = tables_of(mask, data, ring, 1)
    monkeypatch.setattr("spcompile.attention.kernels.triton.shared_tables.MOST_TILES", 1)
    assert torch.equal(tables_of(mask, data, ring, 1), together)


@pytest.mark.thinned(2)
def test_the_op_is_well_behaved() -> None:
    ids, at = torch.tensor([[0, 0, 1, 1, 1, 2, 2]]), torch.tensor([0, 1, 6, 7], dtype=torch.int32)
    for more in (("causal documents", 7, 7, 2, "zigzag", 1), ("documents", 7, 7, 2, "contiguous", 1)):
        args = (at, None, ids, ids, None, *more, 2, 64, 128, "rich")
        torch.library.opcheck(torch.ops.spx.tile_tables.default, args)


class Counted(TorchDispatchMode):
    """How many ops run that are more than views or new memory: launches of kernels, on a GPU."""

    FREE = ("view", "slice", "select", "expand", "transpose", "split", "unsqueeze", "narrow", "empty", "detach", "t.")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        if not name.startswith(self.FREE):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def alone(requests: Requests[Any]) -> Any:
    """The result of one rank, to which every message is its own: only what it launches is looked at."""
    answer: Any = None
    while True:
        try:
            request = requests.send(answer)
        except StopIteration as stop:
            return stop.value
        answer = request.message if isinstance(request, Shift) else request.handle


def counts(text: str, degree: int, layers: int, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int, int]:
    """(kernels of attention, other launches of the layers, launches of the tables) on rank 0; kernels do nothing."""
    mask, ring = AttentionMask.parse(text), Ring(64 * degree, 64 * degree, degree, "zigzag")
    data = data_of(mask, ring.q_length, ring.k_length)
    q, k, launched = torch.randn(2, 2, 64, HEAD), torch.randn(2, 1, 64, HEAD), list[str]()
    with monkeypatch.context() as patch:
        patch.setattr(hop_state, "_whole_hops", lambda *_: Triton())
        patch.setattr(Launch, "run", lambda self: launched.append(self.kernel.fn.__name__))
        for _ in range(2):  # what masks of positions need is cached
            launched.clear()
            making, running = Counted(), Counted()
            with making:
                scores = Scores(mask, 1.0, **data)
                if mask.needs_data:
                    scores = replace(
                        scores, tables=tables_of(mask, data, ring, 0, _tile_tables)
                    )  # its inside is counted
            with running:
                for _ in range(layers):
                    out, lse = alone(ring_forward(q, k, k, scores, ring, 0))
                    alone(ring_backward(Rows(q, out, q, lse, None), k, k, scores, ring, 0, False))
    return len(launched), len(running.names), len(making.names)


@pytest.mark.thinned(2)
def test_layers_and_hops_launch_as_many_kernels_under_any_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = counts("causal", 4, 3, monkeypatch)
    assert plain[0] == 3 * (4 + 1 + 2 * 4)  # forward, delta, and two kernels of the backward
    for text in MASKS:
        found = counts(text, 4, 3, monkeypatch)
        assert found[:2] == plain[:2], text
        assert found[2] == counts(text, 4, 1, monkeypatch)[2] == counts(text, 8, 1, monkeypatch)[2], text
        assert found[2] < 400


class Layers(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4, 4, dtype=torch.float64))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        return packed(q @ self.weight, k, v, ids)


def packed(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    at = torch.arange(q.shape[2])
    keep = (ids[:, None, :, None] == ids[:, None, None, :]) & (at[:, None] >= at)
    near = keep & (at[:, None] - at < 5)
    for mask in (keep, near, keep, near, keep):
        q = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return q


def inputs_for(S: int) -> list[Tensor]:
    torch.manual_seed(S)
    shapes = ((2, 4, S, 4), (2, 2, S, 4), (2, 2, S, 4))
    ids = torch.randint(0, 3, (2, S)).sort(-1).values
    return [*(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes), ids]


ALWAYS = {"share-tile-tables": {"always": True}}


@pytest.mark.thinned(5)
@pytest.mark.parametrize("attention", ["ring", "ulysses", {"ulysses": 2, "ring": 2}], ids=str)
def test_layers_of_one_mask_share_one_table(attention: Any) -> None:
    program = check_pipeline(packed, inputs_for(21), {"cp": 4}, attention=attention, passes=ALWAYS)
    made = nodes_of(program, "spx.tile_tables")
    name = "spx.attention" if attention == "ulysses" else "spx.ring_attention"
    assert len(made) == 2
    assert sorted(len(node.users) for node in made) == [2, 3]
    assert len(nodes_of(program, name)) == 5
    assert len(nodes_of(program, "spx.positions")) == (0 if attention == "ulysses" else 1)


@pytest.mark.thinned(2)
def test_no_tables_where_no_kernel_reads_them() -> None:
    program = after_pass("share-tile-tables", packed, inputs_for(12), attention="ring")
    assert not nodes_of(program, "spx.tile_tables")


@pytest.mark.thinned(2)
def test_the_backward_reads_the_tables_of_the_forward() -> None:
    graphs = explain(Layers(), inputs_for(12), mesh={"cp": 2}, attention="ring", passes=ALWAYS).graphs
    assert [graphs[phase].count("spx.tile_tables(") for phase in ("forward", "backward")] == [2, 0]
