"""Options and meshes: what is not legal is an error that names what is."""

from __future__ import annotations

from typing import Any

import pytest
from torch.distributed.device_mesh import DeviceMesh

from spcompile.diagnostics import IllegalMesh, IllegalOption, NoProcessGroup, UnknownOption
from spcompile.machine.links import link_of
from spcompile.machine.mesh import MeshShape, axis_part, inner_part, outer_part, runtime_mesh, whole_axis
from spcompile.options import Options


def test_defaults() -> None:
    options = Options.parse(None)
    assert (options.attention, options.balance, options.outputs) == ("auto", "zigzag", "full")
    assert options == Options.parse({})


@pytest.mark.parametrize(("key", "near"), [("atention", "attention"), ("output", "outputs"), ("mash", "mesh")])
def test_an_unknown_key_names_the_nearest(key: str, near: str) -> None:
    with pytest.raises(UnknownOption, match=rf"SP101 unknown option: '{key}' \(did you mean '{near}'\?\)"):
        Options.parse({key: 1})


def test_a_key_like_none_lists_all() -> None:
    with pytest.raises(UnknownOption, match=r"(?s)'zzz'\n  legal: mesh, attention, balance, .*strict"):
        Options.parse({"zzz": 1})


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"attention": "rings"}, "did you mean 'ring'"),
        ({"attention": {"ulysses": 2}}, "'ulysses': U, 'ring': R"),
        ({"attention": {"ulysses": 2, "ring": 0}}, "positive ints"),
        ({"balance": "zig-zag"}, "did you mean 'zigzag'"),
        ({"outputs": "shard"}, "did you mean 'sharded'"),
        ({"compiler": "gcc"}, "legal: 'inductor', 'eager'"),
        ({"strict": 1}, "legal: True, False"),
        ({"compare": "calls"}, "did you mean 'call'"),
        ({"compare_inputs": "no"}, "legal: True, False"),
        ({"dump": 3}, "a folder's path"),
        ({"dump": ""}, "a folder's path"),
        ({"links": "nvlink"}, "a dict from mesh axes"),
        ({"links": {"sp": "nvlink"}}, "legal: 'dp', 'tp', 'cp'"),
        ({"links": {"cp": "nvlnk"}}, "did you mean 'nvlink'"),
        ({"passes": ["lower"]}, "a dict from pass names"),
    ],
)
def test_illegal_values(given: dict[str, Any], text: str) -> None:
    with pytest.raises(IllegalOption, match=text):
        Options.parse(given)


def test_the_fingerprint_tells_options_apart_but_not_where_they_dump() -> None:
    assert Options(dump="a").fingerprint() == Options(dump="b").fingerprint()
    assert Options(attention="ring").fingerprint() != Options().fingerprint()


def test_factors_of_another_mesh_are_refused_with_those_that_fit() -> None:
    options = Options(attention={"ulysses": 2, "ring": 2})
    options.require_factors(4)
    with pytest.raises(IllegalOption, match=r"(?s)on cp = 6.*\{'ulysses': 2, 'ring': 3\}, \{'ulysses': 3, 'ring': 2\}"):
        options.require_factors(6)


def test_parts_of_an_axis() -> None:
    """Neighbours inside, and every so manyth rank outside, in the order of the axis."""
    inner, outer = axis_part(inner_part("cp", 2)), axis_part(outer_part("cp", 3))
    assert inner is not None
    assert outer is not None
    assert inner.groups([0, 1, 2, 3, 4, 5]) == [[0, 1], [2, 3], [4, 5]]
    assert outer.groups([0, 1, 2, 3, 4, 5]) == [[0, 2, 4], [1, 3, 5]]
    assert (axis_part("cp"), whole_axis("cp.inner2"), MeshShape.of({"cp": 6}).size("cp.outer3")) == (None, "cp", 3)


def test_mesh_shapes() -> None:
    mesh = MeshShape.of({"tp": 2, "cp": 4})
    assert (mesh.size("cp"), mesh.size("dp"), mesh.world_size, str(mesh)) == (4, 1, 8, "tp=2 cp=4")


def test_axes_of_one_node_talk_over_nvlink_unless_told_otherwise() -> None:
    mesh = MeshShape.of({"dp": 2, "cp": 4, "tp": 4})
    assert [link_of(mesh, axis, {}).name for axis in ("tp", "cp", "dp")] == ["nvlink", "network", "network"]
    assert link_of(mesh, "cp", {}, degree=2).name == "nvlink"
    assert link_of(mesh, "tp", {"tp": "network"}).name == "network"
    assert [link_of(mesh, part, {}).name for part in ("cp.inner2", "cp.outer2")] == ["nvlink", "network"]


@pytest.mark.parametrize("sizes", [{"sp": 2}, {"cp": 0}, {"cp": 2.0}, {"cp": True}])
def test_illegal_meshes(sizes: dict[str, Any]) -> None:
    with pytest.raises(IllegalMesh, match="SP103"):
        MeshShape.of(sizes)


def test_one_process_needs_no_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert runtime_mesh(None, "cpu") is None


def test_a_launched_world_without_a_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(NoProcessGroup, match=r"(?s)SP104.*init_process_group"):
        runtime_mesh(None, "cpu")


def test_a_device_mesh_without_names() -> None:
    nameless = DeviceMesh("cpu", [0], _init_backend=False, _rank=0)
    with pytest.raises(IllegalMesh, match="without axis names"):
        runtime_mesh(nameless, "cpu")
