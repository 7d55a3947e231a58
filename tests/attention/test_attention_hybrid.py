"""Ulysses for any heads, and inside a ring: numbers of whole graphs, all ranks in one process, against one device.

N query heads, G key/value heads; float64, outputs and gradients of every input.
"""

from __future__ import annotations

from typing import Any

import pytest
from attention_functions import DATA, causal, dropped, full, qkv
from example_numerics import after_pass, assert_equal, check_pipeline, compiled_locally, nodes_of, on_all_ranks

from spcompile.machine.mesh import axis_part
from spcompile.program.build import LocalProgram


def check(
    name: str, n: int, g: int, length: int, mesh: dict[str, int], attention: Any, balance: str = "zigzag"
) -> LocalProgram:
    function, data = DATA[name]
    inputs = [*qkv(n, g, length), *data(n, length)]
    program = check_pipeline(function, inputs, mesh, attention=attention, balance=balance)
    rings, axes = nodes_of(program, "spx.ring_attention"), axes_of_all_to_alls(program)
    if attention == "ulysses":
        assert not rings
        assert axes == {"cp"}
    else:
        assert len(rings) == 1
        assert axes == {f"cp.inner{attention['ulysses']}"}
    return program


def axes_of_all_to_alls(program: LocalProgram) -> set[Any]:
    return {node.args[1] for node in nodes_of(program, "spx.all_to_all")}


UNEVEN_HEADS = [(3, 3), (12, 3), (6, 2), (5, 1), (1, 1), (6, 6)]


@pytest.mark.thinned(6, covers=["degree"])
@pytest.mark.parametrize(("n", "g"), UNEVEN_HEADS)
@pytest.mark.parametrize(("degree", "length"), [(2, 7), (4, 6)])
def test_ulysses_with_heads_that_do_not_divide(n: int, g: int, degree: int, length: int) -> None:
    check("causal", n, g, length, {"cp": degree}, "ulysses")


@pytest.mark.thinned(10)
@pytest.mark.parametrize("name", DATA)
def test_what_belongs_to_heads_goes_with_them(name: str) -> None:
    """Three ranks share six heads of two key heads: the heads of a rank are not neighbours."""
    check(name, 6, 2, 5, {"cp": 3}, "ulysses")
    check(name, 3, 3, 7, {"cp": 2}, "ulysses")


@pytest.mark.thinned(6, covers=["balance"])
@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("balance", ["zigzag", "contiguous"])
def test_every_kind_of_attention_in_a_hybrid(name: str, balance: str) -> None:
    check(name, 4, 2, 13, {"cp": 4}, {"ulysses": 2, "ring": 2}, balance)


@pytest.mark.thinned(10)
@pytest.mark.parametrize(("inner", "outer"), [(2, 3), (3, 2), (2, 4), (4, 2)])
@pytest.mark.parametrize(("n", "g", "length"), [(4, 4, 24), (3, 1, 11), (4, 2, 5)])
def test_every_factorisation(inner: int, outer: int, n: int, g: int, length: int) -> None:
    check("causal", n, g, length, {"cp": inner * outer}, {"ulysses": inner, "ring": outer})


@pytest.mark.slow
@pytest.mark.thinned(10, covers=["name", "factors", "balance"])
@pytest.mark.parametrize("balance", ["zigzag", "contiguous"])
@pytest.mark.parametrize("factors", [(2, 2), (2, 3), (3, 2), (2, 4), (4, 2), (3, 3)], ids=str)
@pytest.mark.parametrize("name", DATA)
def test_every_kind_on_every_factorisation(name: str, factors: tuple[int, int], balance: str) -> None:
    inner, outer = factors
    for (n, g), length in (((4, 2), 24), ((6, 3), 17), ((5, 5), 3)):
        check(name, n, g, length, {"cp": inner * outer}, {"ulysses": inner, "ring": outer}, balance)


@pytest.mark.slow
@pytest.mark.thinned(10, covers=["degree"])
@pytest.mark.parametrize("degree", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("name", DATA)
def test_every_kind_with_any_heads(name: str, degree: int) -> None:
    for n, g in ((3, 3), (12, 3), (6, 2), (5, 1), (6, 6)):
        check(name, n, g, 9, {"cp": degree}, "ulysses")


@pytest.mark.thinned(4)
@pytest.mark.parametrize("order", ["tp first", "cp first"])
def test_a_hybrid_beside_tensor_parallelism(order: str) -> None:
    mesh = {"tp": 2, "cp": 4} if order == "tp first" else {"cp": 4, "tp": 2}
    check("softcap and sinks", 4, 2, 9, mesh, {"ulysses": 2, "ring": 2})


@pytest.mark.thinned(2)
def test_keys_of_another_length() -> None:
    hybrid = {"ulysses": 2, "ring": 2}
    for attention in ("ulysses", hybrid):
        check_pipeline(full, qkv(4, 2, 9, 6), {"cp": 4}, attention=attention)


@pytest.mark.thinned(2)
def test_dropout_of_a_hybrid_is_that_of_one_device() -> None:
    program, _, given = compiled_locally(dropped, qkv(3, 3, 13), {"cp": 4}, attention={"ulysses": 2, "ring": 2})
    before = after_pass("recognize-loss", dropped, qkv(3, 3, 13))
    (alone,) = on_all_ranks(before.gm, given, {})
    for rank in on_all_ranks(program.gm, given, {"cp": 4}):
        assert_equal(rank, alone)


def test_keys_that_several_ranks_need_are_copied_once() -> None:
    """Into the message: nothing is repeated before it."""
    program = after_pass("parallelize-attention", causal, qkv(8, 2, 8), 8, attention="ulysses")
    _, keys, _ = nodes_of(program, "spx.all_to_all")
    message = keys.args[0]
    assert tuple(message.meta["val"].shape) == (8, 2, 1, 5)
    assert not nodes_of(program, "aten.repeat_interleave")


@pytest.mark.thinned(2)
def test_one_message_each_way_where_no_key_goes_to_two_ranks() -> None:
    for n, g, attention in ((3, 3, "ulysses"), (4, 4, {"ulysses": 2, "ring": 2})):
        program = after_pass("parallelize-attention", causal, qkv(n, g, 8), 4, attention=attention)
        assert len(nodes_of(program, "spx.all_to_all")) == 2


def test_a_hybrid_communicates_on_parts_of_the_axis() -> None:
    program = after_pass("parallelize-attention", causal, qkv(4, 4, 13), 8, attention={"ulysses": 4, "ring": 2})
    (ring,) = nodes_of(program, "spx.ring_attention")
    part = axis_part(str(ring.args[11]))
    assert part is not None
    assert (part.axis, part.is_inner, part.size) == ("cp", False, 2)
    assert tuple(ring.args[0].meta["val"].shape) == (2, 1, 8, 2)  # four ranks' two rows, of one head
