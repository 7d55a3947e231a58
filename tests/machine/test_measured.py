"""Files of `spcompile calibrate`: read strictly, and used as figures of the accelerator and of its links."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spcompile.diagnostics import IllegalOption
from spcompile.machine.accelerators import ACCELERATORS
from spcompile.machine.curves import TimeCurve
from spcompile.machine.links import link_of
from spcompile.machine.measured import COLLECTIVE_NAMES, MOST_FILE_BYTES, read_measured
from spcompile.machine.mesh import MeshShape
from spcompile.options import Options

CURVE = [[1e3, 1e-5], [1e6, 1e-3], [1e9, 0.5]]
GOOD: dict[str, Any] = {
    "schema_version": 1,
    "name": "a machine",
    "device": "cpu",
    "ranks": 2,
    "torch": "2.13.0",
    "memory_bytes": None,
    "seconds_per_kernel": 1e-5,
    "products": {"4": CURVE},
    "attention": {"4": CURVE},
    "memory": CURVE,
    "collectives": dict.fromkeys(COLLECTIVE_NAMES, CURVE),
}


def written(folder: Path, data: Any) -> str:
    file = folder / "machine.json"
    file.write_text(data if isinstance(data, str) else json.dumps(data))
    return str(file)


def test_between_points_logarithms_are_linear_and_beyond_them_rates_stay() -> None:
    curve = TimeCurve(((1e3, 1e-5), (1e5, 1e-3)))
    assert curve.seconds(0) == 0
    assert curve.seconds(1) == 1e-5
    assert curve.seconds(1e4) == pytest.approx(1e-4)
    assert curve.seconds(1e6) == pytest.approx(1e-2)
    assert TimeCurve.through([(2, 1.0), (1, 2.0), (3, 4.0)]).grows


def test_a_file_is_an_accelerator_with_links_of_its_own(tmp_path: Path) -> None:
    file = written(tmp_path, GOOD)
    found = read_measured(file)
    assert json.loads(found.to_json()) == GOOD
    options = Options.parse({"accelerator": file})
    accelerator = ACCELERATORS[file]
    assert accelerator.product_seconds(1e6, 4) == pytest.approx(1e-3)
    assert accelerator.attention_seconds(1e9, 4) == pytest.approx(0.5)
    link = link_of(MeshShape.of({"cp": 2}), "cp", {}, own=accelerator.links)
    assert link.seconds(1e9, 3, "all_to_all") == pytest.approx(0.5)
    before = options.fingerprint()
    written(tmp_path, GOOD | {"seconds_per_kernel": 2e-5})
    assert Options.parse({"accelerator": file}).fingerprint() != before


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"schema_version": 2}, "schema_version 1"),
        ({"extra": 1}, "extra"),
        ({"ranks": 1}, "out of range"),
        ({"ranks": True}, "ranks"),
        ({"device": "tpu"}, "neither"),
        ({"products": {"3": CURVE}}, "bytes of an element"),
        ({"products": {}}, "bytes of an element"),
        ({"attention": {"2": CURVE}}, "no products"),
        ({"memory": [[1, 1.0]]}, "2 to"),
        ({"memory": [[1, 1.0], [2, 0.5]]}, "grow"),
        ({"memory": [[1, 1.0], [2, -1.0]]}, "positive"),
        ({"memory": [[1, 1.0], [2, "x"]]}, "positive"),
        ({"memory": [[n + 1, n + 1.0] for n in range(1000)]}, "2 to"),
        ({"collectives": {"all_gather": CURVE}}, "collectives are not"),
        ({"seconds_per_kernel": 0}, "positive"),
        ({"memory_bytes": -1}, "out of range"),
    ],
)
def test_what_is_wrong_in_a_file_is_told(change: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(IllegalOption, match=told) as error:
        Options.parse({"accelerator": written(tmp_path, GOOD | change)})
    assert "calibrate" in str(error.value)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", "NaN", "[" * 100_000, '{"a": 1, "a": 2}', "x" * (MOST_FILE_BYTES + 1)],
    ids=["empty", "a list", "open", "no number", "deep", "a name twice", "huge"],
)
def test_what_is_no_such_file_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(IllegalOption):
        read_measured(written(tmp_path, text))
    with pytest.raises(IllegalOption):
        read_measured(str(tmp_path))
