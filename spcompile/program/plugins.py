"""Passes and sharding rules from outside the package: modules named by the option `plugins` or by installed packages.

A plugin is a module that can be imported. Its `PASSES` are pairs (the name of a pass, a pass that goes behind it);
rules register when it is imported. Installed packages name theirs as entry points of the group `spcompile.plugins`.
What was loaded once in a process stays known to it, so caches and ranks are told of all of it.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import importlib
import inspect
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from spcompile.diagnostics import IllegalPlugin, SourceLine
from spcompile.options import Options
from spcompile.passes_api import Pass, Stage
from spcompile.sharding.rules.rule import registered_all_or_none, registered_rules, rules_from_outside

GROUP = "spcompile.plugins"
FIRST = "capture"  # what a pass names that is to be the first of all
_STAGES = tuple(Stage)


@dataclass(frozen=True)
class Plugin:
    """A module, and the passes that it adds: each with the name of the one that it goes behind."""

    name: str
    passes: tuple[tuple[str, Pass], ...]


def with_plugins(pipeline: Sequence[Pass], options: Options) -> tuple[Pass, ...]:
    """The passes of a compile: those of the pipeline, and behind the ones that they name, those of plugins.

    Of two that go behind the same pass, the one of the plugin that is named first is the first.

    Raises:
        IllegalPlugin: a module cannot be imported or is no plugin, or a pass cannot stand where it is to.
    """
    result = list(pipeline)
    for name in dict.fromkeys((*_installed(), *options.plugins)):
        last: dict[str, str] = {}  # behind each pass, where this plugin's last one went
        for behind, p in _load(name).passes:
            _insert_pass(result, name, last.get(behind, behind), p)
            last[behind] = p.name
    return tuple(result)


def plugin_identities() -> Mapping[str, str]:
    """Every plugin that this process has loaded, and what rules come from elsewhere, with a hash of their sources.

    "" is the hash of what has no source file.
    """
    found = {name: _hash_of(_files_of(importlib.import_module(name), _load(name))) for name in sorted(_loaded)}
    files = {str(op): _source_file(rule) for op, rule in rules_from_outside().items()}
    if files:
        ops = hashlib.sha256("\0".join(sorted(files)).encode()).hexdigest()[:8]
        hashed = _hash_of(sorted(set(files.values())))
        found["sharding rules"] = hashed and f"{ops} {hashed}"
    return found


_loaded: set[str] = set()


@functools.cache
def _installed() -> tuple[str, ...]:
    return tuple(sorted({point.value for point in entry_points(group=GROUP)}))


@functools.cache
def _load(name: str) -> Plugin:
    """Import a module and read its passes; not kept where that fails, so that a mended one is read again."""
    with registered_all_or_none():
        before = set(registered_rules())
        module = _imported(name)
        rules = set(registered_rules()) - before or {
            op for op, rule in rules_from_outside().items() if _is_below(rule.__module__, name)
        }
        given = getattr(module, "PASSES", None)
        if given is None and not rules:
            raise _bad_plugin(name, "it has no PASSES and registers no sharding rule")
        pairs = () if given is None else _placed_passes(name, given)
    _loaded.add(name)
    return Plugin(name, pairs)


def _imported(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        legal = "the name of a module that Python finds, as `package.module`, and that can be imported"
        found = f"plugin {name!r} cannot be imported: {type(error).__name__}: {error}"
        raise IllegalPlugin(found, where=_failing_line(error), legal=legal) from error


def _failing_line(error: Exception) -> SourceLine | None:
    """The line of a plugin, or of what it imports, that failed."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    last = frames[-1] if len(frames) > 1 else None  # the first is the one above
    return SourceLine(last.filename, last.lineno or 0, last.name, last.line or "") if last is not None else None


def _placed_passes(name: str, given: Any) -> tuple[tuple[str, Pass], ...]:
    if not isinstance(given, (list, tuple)):
        raise _bad_plugin(name, f"its PASSES are a {type(given).__name__}")
    for place, pair in enumerate(given):
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
            raise _bad_plugin(name, f"PASSES[{place}] is {pair!r}")
        _require_pass(name, place, pair[1])
    return tuple(given)


def _require_pass(name: str, place: int, p: Any) -> None:
    if isinstance(p, type) and issubclass(p, Pass):
        raise _bad_plugin(
            name, f"PASSES[{place}] has the class {p.__name__}, not a pass of it", legal=f"{p.__name__}()"
        )
    if not isinstance(p, Pass):
        raise _bad_plugin(name, f"PASSES[{place}] has a {type(p).__name__}, which is no Pass")
    for attribute, kind in (("name", str), ("stage", Stage)):
        if not isinstance(getattr(p, attribute, None), kind):
            raise _bad_plugin(
                name, f"{type(p).__name__} has no {attribute}", legal=f"a {kind.__name__} as `{attribute}`"
            )
    if not dataclasses.is_dataclass(p) or "__dataclass_params__" not in vars(type(p)):
        raise _bad_plugin(
            name, f"{type(p).__name__} is no dataclass of its own", legal="@dataclass(frozen=True) above it"
        )
    if p.leaves is not None:
        raise _bad_plugin(
            name, f"{p.name} leaves another stage behind", legal="leaves = None: shapes change in `lower`"
        )


def _insert_pass(pipeline: list[Pass], name: str, behind: str, p: Pass) -> None:
    """Put a pass behind another one, if it can stand there."""
    names = [q.name for q in pipeline]
    if p.name in names or p.name == FIRST:
        raise _bad_plugin(name, f"there is a pass {p.name!r} already", legal="a name of its own")
    for known in (behind, *sorted(p.after)):
        if known not in (FIRST, *names):
            close = difflib.get_close_matches(known, names, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            legal = ", ".join((FIRST, *names))
            raise _bad_plugin(name, f"{p.name} is to stand behind {known!r}, which is no pass{hint}", legal=legal)
    at = 0 if behind == FIRST else names.index(behind) + 1
    late = sorted(set(p.after) & set(names[at:]))
    if late:
        raise _bad_plugin(
            name, f"{p.name} behind {behind} would run before {', '.join(late)}", legal="what its `after` says"
        )
    least = pipeline[at - 1].stage if at else Stage.GLOBAL
    most = pipeline[at].stage if at < len(pipeline) else Stage.SCHEDULE
    if not _STAGES.index(least) <= _STAGES.index(p.stage) <= _STAGES.index(most):
        legal = f"stage {' or '.join(dict.fromkeys((least.value, most.value)))} behind {behind}"
        raise _bad_plugin(name, f"{p.name} is of stage {p.stage.value}", legal=legal)
    pipeline.insert(at, p)


def _bad_plugin(name: str, found: str, legal: str | None = None) -> IllegalPlugin:
    shape = 'PASSES = [("name of a pass", the pass that goes behind it), ...], or sharding rules that it registers'
    return IllegalPlugin(f"plugin {name!r}: {found}", legal=legal or shape)


def _files_of(module: ModuleType, plugin: Plugin) -> list[str]:
    """Where the code of a plugin lies: its module, all modules below it, and the classes of its passes."""
    own = getattr(module, "__file__", None) or ""
    below = [str(file) for folder in getattr(module, "__path__", ()) for file in sorted(Path(folder).rglob("*.py"))]
    return [own, *below, *(_source_file(type(p)) for _, p in plugin.passes)]


def _source_file(code: Any) -> str:
    try:
        return inspect.getfile(code)
    except (TypeError, OSError):
        return ""


def _hash_of(files: Iterable[str]) -> str:
    """Of what files hold; "" where one cannot be read."""
    found = hashlib.sha256()
    for file in dict.fromkeys(files):
        try:
            found.update(hashlib.sha256(Path(file).read_bytes()).digest())
        except OSError:
            return ""
    return found.hexdigest()[:16]


def _is_below(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")
