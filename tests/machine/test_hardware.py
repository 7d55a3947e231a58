"""The tables of accelerators and links: every figure has a source, and parts of peaks are parts."""

from __future__ import annotations

from typing import Any

import pytest

from spcompile.machine.accelerators import ACCELERATORS
from spcompile.machine.hardware import HARDWARE
from spcompile.machine.links import LINKS, link_of
from spcompile.machine.mesh import MeshShape
from spcompile.options import Options

ROWS = [*HARDWARE["accelerators"].items(), *HARDWARE["links"].items()]


@pytest.mark.parametrize(("name", "row"), ROWS, ids=[name for name, _ in ROWS])
def test_every_figure_has_a_source(name: str, row: dict[str, Any]) -> None:
    assert set(row["sources"]) == set(row) - {"name", "sources"}, name
    assert all(source.strip() for source in row["sources"].values())
    assert all(0 < value <= 1 for key, value in row.items() if key.startswith("reached"))


def test_figures_that_everything_was_measured_with() -> None:
    h100, a100 = ACCELERATORS["h100"], ACCELERATORS["a100"]
    assert (h100.peak(2), h100.bytes_per_second, h100.memory) == (989e12, 0.8 * 3.35e12, 81_559 * 2**20)
    assert (a100.peak(4), a100.bytes_per_second, a100.memory) == (19.5e12, 0.8 * 2.04e12, 81_920 * 2**20)
    assert LINKS["nvlink"].bytes_per_second == pytest.approx(400e9, rel=1e-12)
    assert ACCELERATORS["h200"].memory == 143_771 * 2**20


def test_an_accelerator_brings_its_generation_of_links() -> None:
    mesh = MeshShape.of({"cp": 4, "tp": 8})

    def names(accelerator: str, **chosen: str) -> list[str]:
        own = ACCELERATORS[accelerator].links
        return [link_of(mesh, axis, chosen, own=own).name for axis in ("tp", "cp")]

    assert names("h100") == names("h200") == ["nvlink", "network"]
    assert names("a100") == ["nvlink3", "infiniband-hdr"]
    assert names("b200") == ["nvlink5", "network"]
    assert names("a100", cp="nvlink") == ["nvlink3", "nvlink3"]
    assert names("a100", cp="nvlink5") == ["nvlink3", "nvlink5"]


def test_an_unknown_one_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match=r"(?s)'h20'.*did you mean 'h200'.*'b200'"):
        Options(accelerator="h20")
