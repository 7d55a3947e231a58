"""The structure of the package, read off its sources: what imports what, and two drawings for docs/design.md."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

import networkx as nx

from spcompile.passes_api import Pass, Stage

PACKAGES = ("spcompile", "spcompile.passes", "spcompile.models")
WIDTH = 116


@cache
def modules() -> Mapping[str, Path]:
    """Dotted name -> file, for every module of PACKAGES."""
    return dict(found for package in PACKAGES for found in _modules_of(package))


def _modules_of(package: str) -> Iterator[tuple[str, Path]]:
    spec = find_spec(package)
    assert spec is not None, package
    folder = Path(str(spec.origin)).parent
    for file in sorted(folder.rglob("*.py")):
        parts = file.relative_to(folder).with_suffix("").parts
        yield ".".join([package, *(part for part in parts if part != "__init__")]), file


@cache
def syntax(name: str) -> ast.Module:
    """The syntax tree of a module, which nobody may change."""
    return ast.parse(modules()[name].read_text())


def imports(name: str) -> set[str]:
    """Every module that `name` imports anywhere in its file, by its absolute name."""
    package = name if modules()[name].name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(syntax(name)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= {full if full in modules() else base for full in names}
    return found


def folder_of(name: str) -> str:
    """`sharding.rules` for spcompile.sharding.rules.rule and for the package itself; "" for modules of the root."""
    package = name if modules()[name].name == "__init__.py" else name.rpartition(".")[0]
    return package.partition(".")[2]


def own_imports(name: str) -> set[str]:
    """The modules of this project that a module imports."""
    return imports(name) & set(modules()) - {name}


def reached(name: str, seen: frozenset[str] = frozenset()) -> set[str]:
    """What a module imports from folders, itself or through modules of the root."""
    direct = own_imports(name) - seen
    roots = {other for other in direct if not folder_of(other)}
    return (direct - roots).union(*(reached(root, seen | roots) for root in roots))


def folders_drawing() -> str:
    """Every folder on its floor: it imports from floors above it in the drawing, never from below."""
    graph = nx.DiGraph()
    names = [name for name in modules() if folder_of(name) not in ("", "models")]
    graph.add_nodes_from(map(folder_of, names))
    for name in names:
        graph.add_edges_from((folder_of(other), folder_of(name)) for other in reached(name))
    graph.remove_edges_from(nx.selfloop_edges(graph))
    said = {folder_of(n): ast.get_docstring(syntax(n)) for n, file in modules().items() if file.name == "__init__.py"}
    column = max(map(len, graph)) + 2
    lines = []
    for floor, folders in enumerate(nx.topological_generations(graph)):
        for folder in sorted(folders):
            sentence = (said[folder] or "").partition("\n")[0]
            lines += _hanging(f"{floor:2}  {folder:<{column}}", sentence)
    return "\n".join(lines)


def pipeline_drawing(pipeline: Sequence[Pass]) -> str:
    """The steps from a model to a program, with the passes in their order, and the folder that each group lies in."""
    arrow = "   |"
    lines = [
        "model",
        f"{arrow}  Dynamo",
        "graph of the user's calls",
        f"{arrow}  capture/",
        "GLOBAL: one device's graph",
    ]
    for stage, passes in groupby(pipeline, key=lambda p: p.stage):
        if stage is Stage.LOCAL:
            lines.append("LOCAL: one rank's graph")
        elif stage is Stage.SCHEDULE:
            lines += [f"{arrow}  AOTAutograd", "SCHEDULE: one rank's forward and backward"]
        for folder, group in groupby(passes, key=lambda p: type(p).__module__.split(".")[-2]):
            lines += _hanging(f"{arrow}  passes/{folder}/  ", ", ".join(p.name for p in group))
    return "\n".join([*lines, f"{arrow}  program/  Inductor or eager", "callable"])


def _hanging(first: str, text: str) -> list[str]:
    """`text` behind `first`, wrapped under itself."""
    rest = "   |".ljust(len(first)) if first.startswith("   |") else " " * len(first)
    lines = textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)
    return lines or [first.rstrip()]
