"""Which meshes and ways of attention are tried for so many ranks."""

from __future__ import annotations

import math

import pytest

from spcompile.diagnostics import IllegalMesh
from spcompile.planning.candidates import Candidate, Heads, attentions, first_round, meshes, second_round

LLAMA = Heads((32,), 131072, 1)


@pytest.mark.parametrize("world", [1, 8, 64, 1024])
def test_every_mesh_has_all_ranks_and_tp_stays_inside_a_node(world: int) -> None:
    shapes = meshes(world, ("tp", "cp", "dp"), Heads((32,), 131072, 16))
    assert len(set(shapes)) == len(shapes)
    for shape in map(dict, shapes):
        assert math.prod(shape.values()) == world
        assert shape.get("tp", 1) in (1, 2, 4, 8)
        assert 16 % shape.get("dp", 1) == 0
        assert list(shape) == [axis for axis in ("dp", "cp", "tp") if axis in shape]


def test_with_one_entry_there_is_no_dp() -> None:
    found = meshes(8, ("tp", "cp", "dp"), LLAMA)
    assert set(found) == {(("tp", 8),), (("cp", 2), ("tp", 4)), (("cp", 4), ("tp", 2)), (("cp", 8),)}


@pytest.mark.parametrize(
    ("world", "axes", "found"),
    [(7, ("tp",), LLAMA), (16, ("tp",), LLAMA), (2, ("dp",), LLAMA), (8, ("tp", "cp"), Heads((6,), 1, 1))],
)
def test_a_world_that_no_mesh_divides(world: int, axes: tuple[str, ...], found: Heads) -> None:
    with pytest.raises(IllegalMesh, match=r"(?s)no mesh has that many.*tp divides .* heads.*dp divides 1"):
        meshes(world, axes, found)


def test_attention_divides_heads_and_ulysses_of_a_hybrid_stays_inside_a_node() -> None:
    assert attentions({"cp": 8}, LLAMA) == [
        "ring",
        "ulysses",
        (("ulysses", 2), ("ring", 4)),
        (("ulysses", 4), ("ring", 2)),
    ]
    assert attentions({"cp": 32, "tp": 4}, LLAMA) == ["ring", (("ulysses", 2), ("ring", 16))]
    assert attentions({"tp": 8}, LLAMA) == ["auto"]
    assert attentions({"cp": 4}, Heads((6,), 64, 1)) == ["ring", (("ulysses", 2), ("ring", 2))]


def test_rounds_try_parameters_whole_and_plain_megatron_of_the_best() -> None:
    first = first_round([(("cp", 4), ("tp", 2)), (("tp", 8),)], LLAMA)
    assert {(one.attention_text, one.shard) for one in first if one.size("cp") > 1} == {
        ("ring", ("cp",)),
        ("ulysses", ("cp",)),
        ("ulysses 2 x ring 2", ("cp",)),
    }
    further = list(second_round([first[1], first[-1]]))
    assert [(one.mesh, one.megatron_sp, one.shard) for one in further] == [
        (first[1].mesh, True, ()),
        (first[1].mesh, False, ("cp",)),
        ((("tp", 8),), False, ()),
    ]
    assert further[1].options == {"attention": "ulysses", "passes": {"split-all-reduce": False}}


def test_more_ranks_are_a_longer_ring() -> None:
    assert Candidate((("tp", 8),)).with_more_ranks() == Candidate((("cp", 2), ("tp", 8)), "ring", True, ("cp",))
