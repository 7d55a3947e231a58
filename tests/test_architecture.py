"""Imports point one way, files stay short, and names say what is inside."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"spcompile": ROOT / "spcompile", "spcompile.passes": ROOT / "passes", "spcompile.models": ROOT / "models"}
MAX_LINES = 400

# spcompile/ from low to high: a module imports only from its own row and the rows above it. A folder counts as one.
LAYERS = (
    # errors, graphs, sizes: know torch only
    "diagnostics custom_functions dynamo_settings einsum graph sequence sizes torch_private",
    "normalizers splice saved_bytes traffic frames",
    "flex_attention vmapped",
    # meshes, dims, ops that communicate, attention
    "accelerators autocast mesh links options spaces capture attention module_buffer rows_without_keys collectives",
    "rank_parts pipelined_products",
    "printer rules states symbolic_mask agreement simulate communication memory verify_report",
    "cost timeline list_schedule keep_order product_sites exposure",
    "passes_api index_spaces attention_specs meta_device plan plan_html",
    # where the axes go
    "propagate verifier",
    "global_view",
    "layout reshard pipeline",
    "cut lowering dump rows row_blocks",
    "resharding tensor_parallel program",
    "one_device",
    # the whole machine
    "outputs local_inputs whole_batch recompute emit program_cache",
    "weight_plan sharded_modules streamed_init checkpoints materialize",
    "backend example_runs",
    "trace docs",
    "trial bisect",
    "explain parallelize verify",
    # what a user starts
    "model_spec train_report",
    "train_progress",
    "train",
    "cli",
)
SEES_PASSES = {"backend", "explain", "parallelize", "verify", "docs", "cli"}  # modules that import spcompile.passes
NOT_FOR_PASSES = {"backend", "emit", "cli", "train"}  # what a pass must not know


def modules(package: str) -> dict[str, Path]:
    """Dotted name -> file, for every module of one of FOLDERS."""
    folder = FOLDERS[package]
    found = {}
    for file in sorted(folder.rglob("*.py")):
        parts = file.relative_to(folder).with_suffix("").parts
        found[".".join([package, *(part for part in parts if part != "__init__")])] = file
    return found


MODULES = {package: modules(package) for package in FOLDERS}
ALL = {name: file for part in MODULES.values() for name, file in part.items()}


def imports(name: str) -> set[str]:
    """Every module that `name` imports anywhere in its file, by its absolute name."""
    file = ALL[name]
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= {full if full in ALL else base for full in names}
    return found


def part_of(name: str) -> str:
    """`rules` for spcompile.rules.base, `backend` for spcompile.backend, nothing for spcompile itself."""
    return name.split(".")[1] if "." in name else ""


def test_every_module_of_spcompile_has_a_layer() -> None:
    known = {part for row in LAYERS for part in row.split()}
    missing = {part_of(name) for name in MODULES["spcompile"]} - known - {""}
    assert not missing, f"add to LAYERS: {sorted(missing)}"


@pytest.mark.parametrize("name", [name for name in MODULES["spcompile"] if part_of(name)])
def test_imports_point_down(name: str) -> None:
    height = {part: row for row, parts in enumerate(LAYERS) for part in parts.split()}
    inside = {part_of(other) for other in imports(name) if other.partition(".")[0] == "spcompile"}
    upward = sorted(part for part in inside if height.get(part, -1) > height[part_of(name)])
    assert not upward, f"{name} imports {', '.join(upward)}, which stand above it"


@pytest.mark.parametrize("name", MODULES["spcompile"])
def test_the_engine_knows_no_model_and_few_of_its_modules_know_the_passes(name: str) -> None:
    parts = {part_of(other) for other in imports(name) if other.partition(".")[0] == "spcompile"}
    assert "models" not in parts
    assert "passes" not in parts or part_of(name) in SEES_PASSES


@pytest.mark.parametrize("name", MODULES["spcompile.passes"])
def test_passes_do_not_know_who_runs_them(name: str) -> None:
    inside = {other for other in imports(name) if other.partition(".")[0] == "spcompile"}
    assert not {part_of(other) for other in inside} & NOT_FOR_PASSES


@pytest.mark.parametrize("name", MODULES["spcompile.models"])
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
