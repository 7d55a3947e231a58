"""Errors and remarks: stable codes, one text each, the user's line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch.fx as fx

from spcompile import diagnostics
from spcompile.diagnostics import REMARKS, IllegalOption, Remark, Remarks, SourceLine, SpcompileError, StrictRemark

ERRORS = [c for c in vars(diagnostics).values() if isinstance(c, type) and issubclass(c, SpcompileError)]


def test_codes_are_distinct_and_well_formed() -> None:
    codes = [error.code for error in ERRORS]
    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch(r"SP\d{3}", code) for code in codes)
    assert all(re.fullmatch(r"SPR\d{3}", code) for code in REMARKS)
    assert all(error.__doc__ and error.title for error in ERRORS)


def test_every_remark_is_used_somewhere() -> None:
    root = Path(__file__).parent.parent
    code = "".join(f.read_text() for d in ("spcompile", "passes") for f in (root / d).rglob("*.py"))
    assert [name for name in REMARKS if code.count(name) < 2] == []


def test_the_text_of_an_error() -> None:
    error = IllegalOption("x=1", where=SourceLine("m.py", 3, "forward", "y = x"), legal="2")
    assert str(error) == "SP102 illegal option value: x=1\n  at m.py:3 in forward\n      y = x\n  legal: 2"
    assert isinstance(error, ValueError)


def node_with(trace: str | None) -> fx.Node:
    node = fx.Graph().placeholder("x")
    if trace is not None:
        node.meta["stack_trace"] = trace
    return node


def test_source_of_the_innermost_frame() -> None:
    trace = '  File "a.py", line 1, in outer\n    inner(x)\n  File "b.py", line 7, in inner\n    return x + 1\n'
    assert diagnostics.source_of(node_with(trace)) == SourceLine("b.py", 7, "inner", "return x + 1")
    assert diagnostics.source_of(node_with(None)) is None
    assert diagnostics.source_of(node_with("")) is None


def test_remarks_come_once_and_in_order() -> None:
    remarks = Remarks()
    for text in ("a", "b", "a"):
        remarks.add("SPR103", text)
    assert [row.text for row in remarks.rows] == ["a", "b"]


def test_strict_raises_losses_but_not_choices() -> None:
    remarks = Remarks(strict=True)
    remarks.add("SPR203", "ring", strict_error=False)
    with pytest.raises(StrictRemark, match="SP401 not allowed under strict: SPR103 gathered"):
        remarks.add("SPR103", "gathered")


def test_remarks_as_data() -> None:
    remark = Remark("SPR103", "gathered", SourceLine("m.py", 3, "forward", "y = x"))
    assert remark.to_dict() == {
        "code": "SPR103",
        "text": "gathered",
        "source": {"file": "m.py", "line": 3, "text": "y = x"},
    }
    with pytest.raises(AssertionError):
        Remark("SPR999", "no such code")
