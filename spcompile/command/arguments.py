"""Words of the command line as values, checked before anything that is slow to import.

Each error names the option as it was written and what it may be.
"""

from __future__ import annotations

import ast
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spcompile.diagnostics import IllegalMesh, IllegalModel, IllegalOption
from spcompile.machine.links import LINKS
from spcompile.machine.mesh import AXES, MOST_RANKS, MeshShape
from spcompile.options import Options

MOST_TOKENS = 1 << 30
MOST_PROCESSES = 64  # on one machine, where it has no more cores
DTYPES = ("float32", "float64", "bfloat16", "float16")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
MODEL_KINDS = "models:NAME, hf:TYPE or hf:FOLDER with a config.json"
_SHORT_DTYPES = {"fp32": "float32", "fp64": "float64", "bf16": "bfloat16", "fp16": "float16"}
_MULTIPLES = {"": 1, "k": 1 << 10, "m": 1 << 20}
_COUNT = re.compile(r"[0-9]{1,18}")
_OWN_FLAGS = {"mesh": "--mesh", "dump": "--dump"}


def parse_mesh(parts: Sequence[str]) -> dict[str, int]:
    """`["tp=2,cp=4"]` or `["tp=2", "cp=4"]` as axis sizes.

    Raises:
        IllegalMesh: a part that is no `axis=size`, or more ranks than there can be.
    """
    sizes: dict[str, int] = {}
    for part in ",".join(parts).split(","):
        axis, _, size = part.partition("=")
        if not _COUNT.fullmatch(size) or axis in sizes:
            raise IllegalMesh(f"--mesh {part!r}", legal="axis=size, each axis once, as cp=8 or tp=2,cp=4")
        sizes[axis] = int(size)
    MeshShape.of(sizes)
    return sizes


def parse_attention(text: str | None) -> str | dict[str, int] | None:
    """`"ulysses=4,ring=2"` as factors of a hybrid; names as they are.

    Raises:
        IllegalOption: a part that is no `name=size`.
    """
    if text is None or "=" not in text:
        return text
    factors: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if not _COUNT.fullmatch(size) or name in factors:
            raise IllegalOption(f"--attention {text!r}", legal="auto, ring, ulysses, hybrid, or as ulysses=4,ring=2")
        factors[name] = int(size)
    return factors


def parse_axes(text: str) -> list[str]:
    """`"tp,cp"` as names of axes.

    Raises:
        IllegalMesh: an unknown one, or one twice.
    """
    axes = text.split(",")
    if not set(axes) <= set(AXES) or len(set(axes)) < len(axes):
        raise IllegalMesh(f"--axes {text!r}", legal=f"out of {','.join(AXES)}, each once")
    return axes


def parse_link(text: str) -> dict[str, str]:
    """What all axes talk over: `"nvlink"`, or `"ib"` for the network.

    Raises:
        IllegalOption: another one.
    """
    name = {"ib": "network"}.get(text, text)
    if name not in LINKS:
        raise IllegalOption(f"--link {text!r}", legal=", ".join(["ib", *LINKS]))
    return dict.fromkeys(AXES, name)


def parse_tokens(name: str, text: str, least: int = 1) -> int:
    """`"4096"`, or `"128k"` and `"1m"` as lengths of contexts are written: 128 * 1024 and 1024 * 1024.

    Raises:
        IllegalOption: no such number, or one out of range.
    """
    digits = text[:-1] if text[-1:].lower() in ("k", "m") else text
    if not _COUNT.fullmatch(digits):
        raise IllegalOption(f"{name} {text!r}", legal=f"{least} to {MOST_TOKENS}, or as 128k")
    count = int(digits) * _MULTIPLES[text[len(digits) :].lower()]
    require_between(name, count, least, MOST_TOKENS)
    return count


def parse_ranks(name: str, text: str) -> int:
    """A number of ranks.

    Raises:
        IllegalOption: no number, or one out of range.
    """
    if not _COUNT.fullmatch(text):
        raise IllegalOption(f"{name} {text!r}", legal=f"1 to {MOST_RANKS}")
    require_between(name, int(text), 1, MOST_RANKS)
    return int(text)


def parse_dtype(text: str) -> str:
    """A dtype's name; `"bf16"`, `"fp16"`, `"fp32"` and `"fp64"` are short for it.

    Raises:
        IllegalModel: another one.
    """
    name = _SHORT_DTYPES.get(text, text)
    if name not in DTYPES:
        raise IllegalModel(f"dtype {text!r}", legal=", ".join((*DTYPES, *_SHORT_DTYPES)))
    return name


def require_model(model: str) -> None:
    """Raises IllegalModel for what names no kind of model; for a name of a hub it says how to get its config."""
    kind, _, name = model.partition(":")
    on_hub = name if kind == "hf" else model
    if _HUB_NAME.fullmatch(on_hub) and not Path(on_hub).exists():
        folder = on_hub.rpartition("/")[2]
        found = f"{model!r} is no folder here, and nothing is downloaded"
        raise IllegalModel(found, legal=f"hf:{folder}, after: hf download {on_hub} config.json --local-dir {folder}")
    if kind not in ("models", "hf") or not name:
        raise IllegalModel(repr(model), legal=MODEL_KINDS)


def backend_options(given: Mapping[str, Any], mesh: Mapping[str, int], also: Sequence[str] = ()) -> dict[str, Any]:
    """The options that were given, without None; each is checked, also against the mesh.

    also: names that a command's own function takes, which checks them.

    Raises:
        UnknownOption, IllegalOption: what the backend would raise.
    """
    options = {name: value for name, value in given.items() if value is not None}
    backends = {name: value for name, value in options.items() if name not in also}
    Options.parse(backends).require_factors(MeshShape.of(mesh).size("cp"))
    return options


def parse_settings(lines: Sequence[str]) -> dict[str, Any]:
    """`["layers=2", "hidden_act=relu"]` as a dict: Python literals where they are ones, else text.

    Raises:
        IllegalModel: a line without `=`, or a key that was given before.
    """
    settings: dict[str, Any] = {}
    for line in lines:
        key, equals, value = line.partition("=")
        if not equals or not key or key in settings:
            raise IllegalModel(f"setting {line!r}", legal="key=value, each key once")
        try:
            settings[key] = ast.literal_eval(value)
        except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
            settings[key] = value
    return settings


def parse_options(lines: Sequence[str]) -> dict[str, Any]:
    """`["strict=True"]` as options of the backend.

    Raises:
        IllegalModel: a line without `=`.
        IllegalOption: what the command line has a flag of its own for.
    """
    options = parse_settings(lines)
    for name in options:
        if name in _OWN_FLAGS:
            raise IllegalOption(f"--option {name}", legal=_OWN_FLAGS[name])
    return options


def require_between(name: str, value: int | None, least: int, most: int) -> None:
    """Raises IllegalOption where a number was given that is outside of these."""
    if value is not None and not least <= value <= most:
        raise IllegalOption(f"{name} {value}", legal=f"{least} to {most}")


def require_rate(name: str, value: float) -> None:
    """Raises IllegalOption for what is no positive finite number."""
    if not (math.isfinite(value) and value > 0):
        raise IllegalOption(f"{name} {value}", legal="a positive finite number")


def require_file(name: str, path: Path | None) -> None:
    """Raises IllegalOption for what is no plain file that can be read."""
    if path is None:
        return
    try:
        found = "a folder" if path.is_dir() else "no plain file" if path.exists() else "no such file"
        if path.is_file():
            found = "" if os.access(path, os.R_OK) else "no permission to read it"
    except OSError as error:  # the name is too long
        found = error.strerror or str(error)
    if found:
        raise IllegalOption(f"{name} {str(path)!r}: {found}", legal="a file that can be read")


def require_place_for_file(name: str, path: Path | None) -> None:
    """Raises IllegalOption where no file can be written."""
    if path is None:
        return
    folder = path.parent
    found = "a folder" if path.is_dir() else "" if folder.is_dir() else f"no such folder: {str(folder)!r}"
    if not found and not os.access(path if path.exists() else folder, os.W_OK):
        found = "no permission to write it"
    if found:
        raise IllegalOption(f"{name} {str(path)!r}: {found}", legal="a file in a folder that can be written to")
