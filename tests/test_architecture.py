"""Imports point one way, files stay short, and names say what is inside."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import networkx
import pytest

from spcompile.report.structure import folder_of, imports, modules, own_imports, reached, syntax

ROOT = Path(__file__).parent.parent
ALL = modules()
MAX_LINES = 400

# From low to high: a folder imports only from itself and from those before it.
FOLDERS = (
    "machine",
    "graph",
    "losses",
    "collectives",
    "attention.scores",
    "attention.kernels.triton",
    "attention.kernels",
    "attention.ring",
    "attention.ulysses",
    "attention",
    "capture",
    "recognition.masks",
    "recognition",
    "check",
    "sharding.rules",
    "sharding",
    "schedule",
    "memory",
    "parameters",
    "passes.meaning",
    "passes.placement",
    "passes.schedule",
    "passes",
    "program",
    "planning",
    "report",
    "command",
    "integrations",
)
SEE_PASSES = {"", "report", "command"}  # what chooses the pipeline; "" is the root, which users import


@pytest.mark.parametrize("name", [name for name in ALL if folder_of(name) and folder_of(name) != "models"])
def test_imports_point_down(name: str) -> None:
    height = {folder: at for at, folder in enumerate(FOLDERS)}
    upward = sorted(other for other in reached(name) if height[folder_of(other)] > height[folder_of(name)])
    assert not upward, f"{name} imports {', '.join(upward)}, which stand above it"


def test_no_module_imports_itself_in_a_circle() -> None:
    imports_of = networkx.DiGraph({name: own_imports(name) for name in ALL})
    assert not [circle for circle in networkx.strongly_connected_components(imports_of) if len(circle) > 1]


def test_every_folder_stands_in_the_list_and_says_what_it_is() -> None:
    packages = {folder_of(name): file for name, file in ALL.items() if file.name == "__init__.py"}
    assert set(packages) - {"", "models"} == set(FOLDERS)
    for folder, file in packages.items():
        assert ast.get_docstring(ast.parse(file.read_text())), folder


@pytest.mark.parametrize(
    "name", [name for name in ALL if not name.startswith(("spcompile.passes", "spcompile.models"))]
)
def test_the_engine_knows_no_model_and_little_of_it_knows_the_passes(name: str) -> None:
    parts = {folder_of(other).partition(".")[0] for other in own_imports(name)}
    assert "models" not in parts
    assert "passes" not in parts or folder_of(name) in SEE_PASSES


def defined(name: str) -> Iterator[str]:
    """The functions and classes of a module."""
    for node in syntax(name).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name


def test_one_name_means_one_thing() -> None:
    """Modules, functions and classes, private ones as well.

    Left out are protocols, of which every file of a folder has its own: collectives, rules, commands, kernels, models.
    """
    protocols = ("collectives", "sharding.rules", "command", "attention.kernels", "models")
    modules_named = Counter(name.rpartition(".")[2] for name, file in ALL.items() if file.name != "__init__.py")
    assert not [stem for stem, count in modules_named.items() if count > 1]
    names = Counter(found for name in ALL if folder_of(name) not in protocols for found in defined(name))
    assert [found for found, count in names.items() if count > 1] == ["_inputs"]  # of the examples of passes


@pytest.mark.parametrize("name", [name for name in ALL if name.startswith("spcompile.models")])
def test_models_need_torch_only(name: str) -> None:
    import sys

    outside = {other.partition(".")[0] for other in imports(name) if not other.startswith("spcompile.models")}
    assert outside <= {"torch", *sys.stdlib_module_names}


@pytest.mark.parametrize("name", ALL)
def test_files_are_short_ascii_and_named_for_what_they_hold(name: str) -> None:
    file = ALL[name]
    text = file.read_text()
    assert len(text.splitlines()) <= MAX_LINES
    assert text.isascii()
    assert not {"util", "utils", "helper", "helpers", "common", "misc"} & set(file.stem.split("_"))


def test_the_installed_packages_are_the_folders() -> None:
    """A new folder must be listed in pyproject.toml, or it is missing from the wheel."""
    text = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"^packages = (\[.*?\])", text, re.DOTALL | re.MULTILINE)
    assert listed is not None
    have = {name for name, file in ALL.items() if file.name == "__init__.py"}
    assert set(ast.literal_eval(listed[1])) == have
