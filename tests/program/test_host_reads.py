"""Where a step reads on the host what may be on a device: every place is in docs/cuda.md, with its reason."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from spcompile.report.structure import modules, syntax

ROOT = Path(__file__).parents[2]
STEP = (  # the folders and files whose functions run when a compiled model is called
    "attention.",
    "collectives.",
    "losses.",
    "machine.sequence",
    "capture.local_inputs",
    "capture.module_buffer",
    "program.agreement",
    "program.checked_calls",
    "program.checksum",
    "program.one_caller",
    "program.outputs",
    "program.own_group",
    "program.roll_call",
    "program.same_inputs",
    "program.same_weights",
)
READS = {"item", "tolist", "cpu", "numpy", "nonzero", "synchronize", "unique"}  # methods that wait for what they read
OF_TENSORS = {"all", "any", "equal", "allclose"}  # whose result is read by bool()


def reads_of(function: ast.AST) -> Iterator[str]:
    """The expressions of a function that read values, or are written as those that do."""
    for node in ast.walk(function):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        is_method = isinstance(node.func, ast.Attribute)
        inner = [n.func for n in ast.walk(node) if isinstance(n, ast.Call)]
        attributes = [func.attr for func in inner if isinstance(func, ast.Attribute)]
        of_element = any(isinstance(n, ast.Subscript) for argument in node.args for n in ast.walk(argument))
        to_host = name == "to" and any(isinstance(a, ast.Constant) and a.value == "cpu" for a in node.args)
        reads_truth = not is_method and name == "bool" and OF_TENSORS & set(attributes)
        reads_number = not is_method and name in ("int", "float") and of_element
        if (is_method and name in READS) or to_host or reads_truth or reads_number:
            yield ast.unparse(node)


def found_reads() -> set[str]:
    """`attention/scores/runs.py: runs_of` for each function that reads."""
    found = set()
    for name, file in modules().items():
        inside = name.removeprefix("spcompile.")
        if not inside.startswith(STEP):
            continue
        for node in ast.walk(syntax(name)):
            if isinstance(node, ast.FunctionDef) and any(reads_of(node)):
                found.add(f"{file.relative_to(ROOT / 'spcompile')}: {node.name}")
    return found


def listed_reads() -> dict[str, str]:
    """The rows of the table in docs/cuda.md: place -> reason."""
    text = (ROOT / "docs" / "cuda.md").read_text().partition("## What the host reads")[2]
    rows = re.findall(r"^\| `([\w/]+\.py: \w+)` \| (.+?) \|$", text, re.MULTILINE)
    return dict(rows)


def test_every_read_is_listed_with_its_reason() -> None:
    found, listed = found_reads(), listed_reads()
    assert found - set(listed) == set(), "a step reads these on the host: list them in docs/cuda.md, or let them go"
    assert set(listed) - found == set(), "docs/cuda.md lists what is not there"
    assert all(len(reason) > 20 for reason in listed.values())


def test_reads_are_seen() -> None:
    reads = ("x.item()", "x.tolist()", "x.cpu()", "x.to('cpu', int)", "bool((x > 0).all())", "int(x[0])", "x.nonzero()")
    for text in reads:
        assert list(reads_of(ast.parse(text))), text
    for text in ("x.to(y)", "bool(kept)", "x.all()", "int(n)", "float(scale)", "torch.where(x, y, z)"):
        assert not list(reads_of(ast.parse(text))), text
