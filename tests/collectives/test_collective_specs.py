"""The specs say what the drawings say; kernels that know their rank, lowered forms and byte counts agree with them."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from spcompile import collectives
from spcompile.check.simulate import Simulator
from spcompile.collectives import COLLECTIVES, Call, Collective, erase_identities
from spcompile.machine.mesh import MeshShape
from spcompile.report.collectives_page import collectives_markdown

T = torch.tensor
ZIGZAG = {"axis": "cp", "degree": 2, "order": "zigzag"}
CONTIGUOUS = {"axis": "cp", "degree": 3, "order": "contiguous"}
WIDE = [(2, 5), (3, 7), (4, 5), (8, 5), (8, 32)]


def test_shard() -> None:
    whole = [T([1, 2, 3, 4, 5])] * 3
    parts = collectives.SHARD.spec(whole, 0, **CONTIGUOUS, fill=-1.0)
    assert [p.tolist() for p in parts] == [[1, 2], [3, 4], [5, -1]]
    parts = collectives.SHARD.spec(whole[:2], 0, **ZIGZAG, fill=-1.0)
    assert [p.tolist() for p in parts] == [[1, 2, -1, -1], [3, 4, 5, -1]]


def test_all_gather() -> None:
    wholes = collectives.ALL_GATHER.spec([T([1, 2]), T([3, 4]), T([5, 9])], 0, 5, **CONTIGUOUS, to="R")
    assert [w.tolist() for w in wholes] == [[1, 2, 3, 4, 5]] * 3
    wholes = collectives.ALL_GATHER.spec([T([1, 2, 9, 9]), T([3, 4, 5, 9])], 0, 5, **ZIGZAG, to="I")
    assert [w.tolist() for w in wholes] == [[1, 2, 3, 4, 5]] * 2


def test_reduce_scatter() -> None:
    parts = collectives.REDUCE_SCATTER.spec([T([1, 2, 3, 4, 5]), T([10, 20, 30, 40, 50]), T([0] * 5)], 0, **CONTIGUOUS)
    assert [p.tolist() for p in parts] == [[11, 22], [33, 44], [55, 0]]
    parts = collectives.REDUCE_SCATTER.spec([T([1, 2, 3, 4]), T([10, 20, 30, 40])], 0, **ZIGZAG)
    assert [p.tolist() for p in parts] == [[11, 44], [22, 33]]


def test_all_reduce_and_vary() -> None:
    parts = [T([1, 2]), T([10, 20])]
    for to in "IR":
        results = collectives.ALL_REDUCE.spec(parts, axis="cp", degree=2, to=to)
        assert [r.tolist() for r in results] == [[11, 22]] * 2
    assert [r.tolist() for r in collectives.VARY.spec(parts, axis="cp", degree=2)] == [[1, 2], [10, 20]]


def test_all_to_all() -> None:
    results = collectives.ALL_TO_ALL.spec([T([1, 2, 3]), T([4, 5, 6]), T([7, 8, 9])], axis="cp", degree=3)
    assert [r.tolist() for r in results] == [[1, 4, 7], [2, 5, 8], [3, 6, 9]]


@pytest.mark.parametrize(
    ("dtype", "fill"), [(torch.int64, -100), (torch.bool, 1), (torch.float32, -torch.inf), (torch.int32, 0)]
)
def test_mask_padding(dtype: torch.dtype, fill: float) -> None:
    parts = [T([1, 0]).to(dtype), T([0, 1]).to(dtype), T([0, 0]).to(dtype)]
    results = collectives.MASK_PADDING.spec(parts, 0, 5, **CONTIGUOUS, fill=fill)
    expected = [[1, 0], [0, 1], [0, fill]]
    assert [r.tolist() for r in results] == [T(row).to(dtype).tolist() for row in expected]
    assert all(r.dtype == dtype for r in results)


def test_padding_that_is_not_a_number_is_masked() -> None:
    parts = [T([1.0, 2.0]), T([3.0, torch.nan])]
    results = collectives.MASK_PADDING.spec(parts, 0, 3, "cp", 2, "contiguous", 0.0)
    assert [r.tolist() for r in results] == [[1, 2], [3, 0]]


def test_reorder() -> None:
    orders = {"from_order": "contiguous", "to_order": "zigzag"}
    results = collectives.REORDER.spec([T([1, 2, 3]), T([4, 5, 9])], 0, 5, "cp", 2, **orders)
    assert [r.tolist() for r in results] == [[1, 2, 0, 0], [3, 4, 5, 0]]


def test_halo() -> None:
    """Windows of 3 over five elements; and every second element with its right neighbour, in zigzag order."""
    windows = {"count": 5, "length": 5, "unit": 1, "step": 1, "before": 1, "extent": 3, "to_length": 5, "to_unit": 1}
    held = [T([1, 2]), T([3, 4]), T([5, 9])]
    results = collectives.HALO.spec(held, 0, **windows, **CONTIGUOUS)
    assert [r.tolist() for r in results] == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 0, 0]]
    back = collectives.HALO_SUM.spec(results, 0, **windows, **CONTIGUOUS)
    assert [b.tolist() for b in back] == [[1 + 0, 2 + 2], [3 + 3, 4 + 4], [5 + 5, 0]]
    windows |= {"count": 8, "length": 8, "step": 2, "before": 0, "extent": 2, "to_length": 4}
    results = collectives.HALO.spec([T([1, 2, 7, 8]), T([3, 4, 5, 6])], 0, **windows, **ZIGZAG)
    assert [r.tolist() for r in results] == [[1, 2, 7, 8], [3, 4, 5, 6]]
    assert collectives.HALO.sent(results[0], 0, **windows, **ZIGZAG) == 0


@pytest.mark.parametrize("fill", [0.0, -100.0])
@pytest.mark.parametrize("name", ["shard", "mask_padding"])
@pytest.mark.parametrize(("degree", "length"), WIDE)
def test_kernels_that_know_their_rank(
    monkeypatch: pytest.MonkeyPatch, name: str, degree: int, length: int, fill: float
) -> None:
    module = importlib.import_module(f"spcompile.collectives.{name}")
    collective: Collective = getattr(collectives, name.upper())
    for call in collective.examples(length, degree):
        arguments = {**call.arguments, "fill": fill}
        x = torch.randn(call.shape)
        for rank, expected in enumerate(collective.spec([x] * degree, **arguments)):
            monkeypatch.setattr(module, "rank_in", lambda group, rank=rank: rank)
            result = collective.op(x, **arguments)
            assert torch.equal(result, expected)
            assert result.stride() == expected.stride()


@pytest.mark.parametrize(("degree", "length"), WIDE)
@pytest.mark.parametrize("collective", [c for c in COLLECTIVES.values() if c.lowered], ids=lambda c: c.name)
@pytest.mark.parametrize("in_flight", ["poison", "late"])
def test_lowered_is_the_spec(collective: Collective, degree: int, length: int, in_flight: Any) -> None:
    assert collective.lowered is not None
    for call in collective.examples(length, degree):
        parts = [torch.randint(-9, 9, call.shape).double() for _ in range(degree)]
        gm = make_fx(functools.partial(collective.lowered, **call.arguments), tracing_mode="fake")(parts[0])
        results = Simulator(MeshShape((("cp", degree),)), in_flight).run(gm, [[x] for x in parts])
        for result, expected in zip(results, collective.spec(parts, **call.arguments), strict=True):
            assert torch.equal(result, expected)


def sent(collective: Collective, call: Call) -> int:
    return collective.sent(torch.empty(call.shape, dtype=torch.float32), **call.arguments)


def test_bytes() -> None:
    x = torch.empty(6, 4)
    whole = {"dim": 0, "axis": "cp", "degree": 3, "order": "contiguous"}
    assert collectives.REDUCE_SCATTER.sent(x, **whole) == 2 * 2 * 4 * 4
    assert collectives.ALL_GATHER.sent(torch.empty(2, 4), length=6, to="R", **whole) == 2 * 2 * 4 * 4
    assert collectives.ALL_REDUCE.sent(x, "cp", 3, "I") == 4 * 2 * 4 * 4
    assert collectives.ALL_TO_ALL.sent(torch.empty(3, 4), "cp", 3) == 2 * 4 * 4
    assert collectives.REDUCE_SCATTER.sent(torch.empty(5, 4, dtype=torch.bfloat16), **whole) == 2 * 2 * 4 * 2
    for collective in (collectives.SHARD, collectives.VARY, collectives.MASK_PADDING):
        assert all(sent(collective, call) == 0 for call in collective.examples(5, 2))


def test_bytes_of_a_symbolic_length() -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC])
    x = mode.from_tensor(torch.empty(6, 4), symbolic_context=context)
    found = collectives.REDUCE_SCATTER.sent(x, 0, "cp", 2, "contiguous")
    assert str(found) == f"16*((({x.shape[0]} + 1)//2))"
    assert found == 48


@pytest.mark.parametrize("strided", [False, True])
def test_erase_identities(strided: bool) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(2, 3).t() if strided else torch.empty(3, 2)
    y = graph.call_function(torch.ops.spx.vary.default, (x, "cp", 2))
    y.meta["val"] = torch.empty(3, 2)
    graph.output(y)
    assert erase_identities(graph) == 1
    assert erase_identities(graph) == 0
    assert [n.target for n in graph.nodes if n.op == "call_function"] == (
        [torch.ops.aten.clone.default] if strided else []
    )
    result = fx.GraphModule(torch.nn.Module(), graph)(torch.empty_strided((3, 2), x.meta["val"].stride()))
    assert result.stride() == (2, 1)


def test_the_documentation_is_up_to_date() -> None:
    page = Path(__file__).parents[2] / "docs" / "collectives.md"
    assert page.read_text() == collectives_markdown(), "run python -m spcompile.report.docs"
