"""Figures of one machine as `spcompile calibrate` measured them, in a JSON file that `accelerator=` reads.

    {"schema_version": 1, "name": "...", "device": "cpu", "ranks": 2, "torch": "...", "memory_bytes": null,
     "seconds_per_kernel": 1e-05,
     "products": {"4": [[flops, seconds], ...]}, "attention": {"4": [...]},
     "memory": [[bytes, seconds], ...],
     "collectives": {"all_gather": [[bytes, seconds], ...], ...}}

Products and attention stand by the bytes of an element; bytes of collectives are those that a rank sends, "message" is
a hop of a ring. Every list grows in both columns.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spcompile.diagnostics import IllegalOption
from spcompile.machine.accelerators import ACCELERATORS, Accelerator
from spcompile.machine.curves import TimeCurve
from spcompile.machine.links import LINKS, Link

MEASURED_SCHEMA_VERSION = 1
MOST_FILE_BYTES = 1 << 20
MOST_POINTS = 256  # of one list
COLLECTIVE_NAMES = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "message")
_LEGAL = "a file that spcompile calibrate has written"
_PARTS: dict[str, tuple[type, ...]] = {
    "schema_version": (int,),
    "name": (str,),
    "device": (str,),
    "ranks": (int,),
    "torch": (str,),
    "memory_bytes": (int, type(None)),
    "seconds_per_kernel": (float, int),
    "products": (dict,),
    "attention": (dict,),
    "memory": (list,),
    "collectives": (dict,),
}


@dataclass(frozen=True)
class Measured:
    """What a file says. Curves as in the module's text."""

    name: str
    device: str
    ranks: int
    torch: str
    memory_bytes: int | None
    seconds_per_kernel: float
    products: Mapping[int, TimeCurve]
    attention: Mapping[int, TimeCurve]
    memory: TimeCurve
    collectives: Mapping[str, TimeCurve]

    def to_json(self) -> str:
        """What `read_measured` reads."""
        data = {"schema_version": MEASURED_SCHEMA_VERSION} | {name: getattr(self, name) for name in list(_PARTS)[1:]}
        for name in ("products", "attention", "collectives"):
            data[name] = {str(key): [list(point) for point in curve.points] for key, curve in data[name].items()}
        data["memory"] = [list(point) for point in self.memory.points]
        return json.dumps(data, indent=1, allow_nan=False) + "\n"


def load_measured(file: str) -> None:
    """Make a file's figures those of the accelerator, and of its links, that have the name of the file.

    Raises:
        IllegalOption: as `read_measured`.
    """
    found = read_measured(file)
    link = f"links of {file}"
    message = found.collectives["message"]
    rate = message.best_rate
    latency = max(0.0, message.seconds(message.points[0][0]) - message.points[0][0] / rate)
    LINKS[link] = Link(link, rate, latency, measured=found.collectives)
    fastest = {size: curve.best_rate for size, curve in found.products.items()}
    ACCELERATORS[file] = Accelerator(
        name=found.name,
        flops=fastest,
        reached=1.0,
        attention_reached=max(found.attention[size].best_rate / fastest[size] for size in found.attention),
        bytes_per_second=found.memory.best_rate,
        seconds_per_kernel=found.seconds_per_kernel,
        memory=found.memory_bytes,
        capability=None if found.device == "cpu" else 80,
        links={"nvlink": link, "network": link},
        host_bytes_per_second=found.memory.best_rate,
        products=found.products,
        attention=found.attention,
    )


def read_measured(file: str) -> Measured:
    """Strictly: names, types, ranges and sizes.

    Raises:
        IllegalOption: the file cannot be read, or is not what `spcompile calibrate` writes.
    """
    path = Path(file)
    try:
        if not path.is_file() or path.stat().st_size > MOST_FILE_BYTES:
            raise ValueError("no plain file, or a huge one")
        data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_doubles, parse_constant=_refused)
        return _measured(data)
    except (OSError, ValueError, RecursionError) as error:
        raise IllegalOption(f"{file!r}: {error}", legal=_LEGAL) from None


def _without_doubles(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name twice")
    return found


def _refused(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _measured(data: Any) -> Measured:
    if not isinstance(data, dict) or data.get("schema_version") != MEASURED_SCHEMA_VERSION:
        raise ValueError(f"no measurements with schema_version {MEASURED_SCHEMA_VERSION}")
    if data.keys() != _PARTS.keys():
        raise ValueError(f"names {', '.join(sorted(data.keys() ^ _PARTS.keys()))} are too many, or missing")
    for name, kinds in _PARTS.items():
        if not isinstance(data[name], kinds) or isinstance(data[name], bool):
            raise ValueError(f"{name} is no {kinds[0].__name__}")
    if data["device"] not in ("cpu", "cuda"):
        raise ValueError("device is neither cpu nor cuda")
    if set(data["collectives"]) != set(COLLECTIVE_NAMES):
        raise ValueError(f"collectives are not {', '.join(COLLECTIVE_NAMES)}")
    if not 2 <= data["ranks"] <= 1 << 17 or not (data["memory_bytes"] is None or 0 < data["memory_bytes"] < 1 << 50):
        raise ValueError("ranks or memory_bytes out of range")
    products, attention = (_by_itemsize(name, data[name]) for name in ("products", "attention"))
    if not set(attention) <= set(products):
        raise ValueError("attention of elements of which there are no products")
    return Measured(
        data["name"][:200],
        data["device"],
        data["ranks"],
        data["torch"][:200],
        data["memory_bytes"],
        _positive("seconds_per_kernel", data["seconds_per_kernel"]),
        products,
        attention,
        _curve("memory", data["memory"]),
        {name: _curve(name, data["collectives"][name]) for name in COLLECTIVE_NAMES},
    )


def _by_itemsize(name: str, data: Mapping[str, Any]) -> dict[int, TimeCurve]:
    if not data or not set(data) <= {"1", "2", "4", "8"}:
        raise ValueError(f"{name} are not by 1, 2, 4 or 8 bytes of an element")
    return {int(size): _curve(name, points) for size, points in data.items()}


def _curve(name: str, points: Any) -> TimeCurve:
    if not isinstance(points, list) or not 2 <= len(points) <= MOST_POINTS:
        raise ValueError(f"{name}: no list of 2 to {MOST_POINTS} points")
    if not all(isinstance(point, list) and len(point) == 2 for point in points):
        raise ValueError(f"{name}: a point that is no pair")
    found = TimeCurve(tuple((_positive(name, amount), _positive(name, seconds)) for amount, seconds in points))
    if not found.grows:
        raise ValueError(f"{name}: points that do not grow")
    return found


def _positive(name: str, value: Any) -> float:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not 0 < value < 1e30
        or not math.isfinite(value)
    ):
        raise ValueError(f"{name}: {value!r:.40} is no positive number")
    return float(value)
