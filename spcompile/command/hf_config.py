"""Configs of transformers models: small ones of a type, and those of a folder, which anyone may have written.

A folder is read as JSON and nothing else: no Python of it is run, no kernel of a hub is named, nothing is downloaded.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from spcompile.diagnostics import IllegalModel
from spcompile.plain_text import one_line

log = logging.getLogger(__name__)
ATTENTION = ("eager", "sdpa", "flex_attention")
EXPERTS = ("eager", "batched_mm", "grouped_mm")
MOST_BYTES = 10 << 20  # of a config.json; large ones have 100 KB
MOST_NUMBER = 1 << 40
MOST_SIZE = 1 << 30
MOST_PARTS = 1 << 12  # layers, heads, experts
_SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 256,
}
_SIZES = {*_SMALL, "max_position_embeddings", "head_dim"}
_NO_NUMBER = {"num_key_value_heads", "intermediate_size", "head_dim"}  # sizes that may be null
_PARTS = re.compile(r"num_\w*(layers|heads|experts|blocks)|n_(layers?|heads?)")
_IMPLEMENTATION = re.compile(r"_?(attn|experts)_implementation(_internal)?")


def folder_config(folder: str, settings: Mapping[str, Any]) -> Any:
    """The config of a folder's config.json; `settings` win.

    Raises:
        IllegalModel: no such file, or one that is broken, huge or of an unknown type; a field with an impossible value.
    """
    from transformers import CONFIG_MAPPING

    file = Path(folder) / "config.json"
    data = _read(file)
    model_type = data.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise IllegalModel(
            f"{str(file)!r}: model_type is {model_type!r}",
            legal="a model type of transformers; Python that comes with a folder is never run",
        )
    if any(key == "auto_map" for key, _ in _fields(data)):
        log.warning("%s names Python of its own (auto_map): it is not run", one_line(str(file)))
    data = _without(data, "auto_map")
    return _config(CONFIG_MAPPING[model_type], data, settings, repr(str(file)))


def small_config(model_type: str, seq: int, settings: Mapping[str, Any]) -> Any:
    """The config of a type, small where it has the usual names; `settings` win.

    Raises:
        IllegalModel: an unknown type, or a setting that is unknown or impossible.
    """
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        raise IllegalModel(
            f"hf:{one_line(model_type)}", legal="a transformers model type, or a folder with a config.json"
        )
    config_class: Any = CONFIG_MAPPING[model_type]
    usual = config_class()
    small = _SMALL | {"max_position_embeddings": max(seq, getattr(usual, "max_position_embeddings", None) or 0)}
    wanted = {key: value for key, value in small.items() if getattr(usual, key, None) is not None}
    vocab = settings.get("vocab_size", wanted.get("vocab_size", 0))
    special = {key: getattr(usual, key, None) for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
    outside = {
        key: 0
        for key, token in special.items()
        if isinstance(token, int) and isinstance(vocab, int) and token >= vocab and key not in settings
    }
    return _config(config_class, {**outside, **wanted}, settings, f"hf:{one_line(model_type)}")


def explained(error: Exception, source: str, data: Mapping[str, Any]) -> IllegalModel:
    """What transformers raised about a config, in one line; names the field where only its value was told."""
    text = " ".join(str(error).split())
    told = error.args[0] if error.args else None
    fields = [key for key, value in _fields(data) if isinstance(value, str) and value == told]
    if fields:
        text = f"{fields[0]} is {told!r}, which transformers does not know"
    return IllegalModel(f"{source}: {type(error).__name__}: {text[:400]}")


def _read(file: Path) -> dict[str, Any]:
    shown = repr(str(file))
    try:
        if not file.is_file():
            raise IllegalModel(
                f"hf:{one_line(str(file.parent))}: no config.json", legal="a folder that has a config.json"
            )
        if file.stat().st_size > MOST_BYTES:
            raise IllegalModel(f"{shown} has {file.stat().st_size} bytes", legal=f"at most {MOST_BYTES}")
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise IllegalModel(f"{shown}: {error}", legal="a file of JSON that can be read") from None
    if not isinstance(data, dict) or not data:
        raise IllegalModel(f"{shown} holds {'nothing' if data == {} else type(data).__name__}", legal="a JSON object")
    return data


def _config(config_class: Any, data: Mapping[str, Any], settings: Mapping[str, Any], source: str) -> Any:
    usual = config_class()
    names = getattr(config_class, "attribute_map", {})
    known = {*usual.to_dict(), *names, *(field for field in _SIZES if hasattr(usual, field))}
    for key in settings:
        if key == "auto_map" or not (key in known or key in data or _IMPLEMENTATION.fullmatch(key)):
            raise IllegalModel(f"setting {key!r} of {source}", legal="a field of its config.json")
    values = {names.get(key, key): value for key, value in data.items()}
    values |= {names.get(key, key): value for key, value in settings.items()}
    _require_possible(values, {names.get(size, size) for size in _SIZES}, names, source)
    try:
        return config_class.from_dict(dict(values))
    except Exception as error:
        raise explained(error, source, values) from error


def _require_possible(values: Mapping[str, Any], sizes: set[str], names: Mapping[str, str], source: str) -> None:
    optional = {names.get(key, key) for key in _NO_NUMBER}
    for key, value in values.items():
        if key in sizes and not (value is None and key in optional) and not _is_size(value):
            raise IllegalModel(f"{source}: {key} is {value!r}", legal=f"a whole number, 1 to {MOST_SIZE}")
    for key, value in _fields(values):
        if isinstance(value, float) and not math.isfinite(value):
            raise IllegalModel(f"{source}: {key} is {value!r}", legal="a finite number")
        most = MOST_PARTS if _PARTS.fullmatch(key) else MOST_NUMBER
        if isinstance(value, int) and abs(value) > most:
            raise IllegalModel(f"{source}: {key} is {value!r}", legal=f"at most {most}")
        found = _IMPLEMENTATION.fullmatch(key)
        if found and value is not None and not isinstance(value, dict):
            legal = ATTENTION if found[1] == "attn" else EXPERTS
            if value not in legal:
                raise IllegalModel(f"{source}: {key} is {value!r}", legal=", ".join(legal))


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST_SIZE


def _fields(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every field of a config, those of configs inside it too, with the name that it stands under.

    Not what a list holds besides configs: limits of intervals may be infinite.
    """
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield str(name), inner
            if isinstance(inner, (Mapping, list)):
                within = _IMPLEMENTATION.fullmatch(str(name)) is not None
                for deeper, found in _fields(inner, str(name)):
                    yield (str(name) if within else deeper), found
    elif isinstance(value, list):
        for inner in value:
            yield from _fields(inner, key)


def _without(value: Any, name: str) -> Any:
    if isinstance(value, dict):
        return {key: _without(inner, name) for key, inner in value.items() if key != name}
    return [_without(inner, name) for inner in value] if isinstance(value, list) else value
