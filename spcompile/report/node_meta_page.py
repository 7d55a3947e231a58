"""docs/node-meta.md: every key of `node.meta`, who writes it and who reads it, found in the sources."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from spcompile.graph import node_meta
from spcompile.graph.node_meta import CUSTOM, META
from spcompile.report.structure import modules, syntax


@dataclass
class Users:
    """Modules, without the name of the package."""

    writers: set[str] = field(default_factory=set)
    readers: set[str] = field(default_factory=set)


def node_meta_markdown(generated: str) -> str:
    """The page. generated: the line that says so."""
    found = users_of_keys()
    lines = ["# Keys of node.meta", "", generated, ""]
    for title, table in (("`node.meta`", META), ('`node.meta["custom"]`', CUSTOM)):
        lines += [f"## {title}", "", "| key | what it is | written by | read by |", "| --- | --- | --- | --- |"]
        for key, meaning in table.items():
            users = found[key]
            lines.append(f"| `{key}` | {meaning} | {_listed(users.writers)} | {_listed(users.readers)} |")
        lines.append("")
    return "\n".join(lines)


def _listed(modules: set[str]) -> str:
    most = 6
    names = [f"`{name}`" for name in sorted(modules)]
    return ", ".join(names) if len(names) <= most else f"{len(names)} modules"


def users_of_keys() -> Mapping[str, Users]:
    """Of every key that a source file writes or reads, the modules that do."""
    shown = (name for name in modules() if not name.startswith("spcompile.models"))
    sources = {name.partition(".")[2]: syntax(name) for name in shown if name != node_meta.__name__}
    constants = {target: value for tree in sources.values() for target, value in _constants(tree)}
    found: dict[str, Users] = defaultdict(Users)
    for name, tree in sources.items():
        for node in ast.walk(tree):
            for key, writes in _uses(node, constants):
                (found[key].writers if writes else found[key].readers).add(name)
    return found


def _constants(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            for target in node.targets:
                if isinstance(target, ast.Name) and target.id.isupper():
                    yield target.id, node.value.value


def _uses(node: ast.AST, constants: Mapping[str, str]) -> Iterator[tuple[str, bool]]:
    """(key, whether it is written) for each access to metadata that this node is."""
    if isinstance(node, ast.Subscript) and _is_metadata(node.value):
        yield from _key(node.slice, constants, not isinstance(node.ctx, ast.Load))
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and _is_metadata(node.func.value):
        if node.func.attr in ("get", "pop", "setdefault") and node.args:
            yield from _key(node.args[0], constants, node.func.attr != "get")
    elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In | ast.NotIn):
        if _is_metadata(node.comparators[0]):
            yield from _key(node.left, constants, False)
    elif isinstance(node, ast.Dict):
        for key in node.keys:
            yield from ((found, True) for found, _ in _key(key, constants, True) if found in CUSTOM)


def _is_metadata(value: ast.expr) -> bool:
    """Whether an expression is `x.meta`, or what stands in it under "custom"."""
    text = ast.unparse(value)
    return text.endswith(("meta", "meta['custom']", "meta.get('custom', {})")) or text == "custom"


def _key(value: ast.expr | None, constants: Mapping[str, str], writes: bool) -> Iterator[tuple[str, bool]]:
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
        yield value.value, writes
    elif isinstance(value, ast.Name) and value.id in constants:
        yield constants[value.id], writes
