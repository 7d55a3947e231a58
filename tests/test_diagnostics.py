"""Errors and remarks: stable codes, one text each, the user's line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch.fx as fx

import spcompile
from spcompile import diagnostics
from spcompile.diagnostics import (
    PLACES,
    REMARKS,
    IllegalOption,
    Remark,
    Remarks,
    SourceLine,
    SpcompileError,
    StrictRemark,
    remark_lines,
)
from spcompile.plain_text import one_line, some_lines

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
        "values": [],
        "source": {"file": "m.py", "line": 3, "text": "y = x"},
    }
    with pytest.raises(AssertionError):
        Remark("SPR999", "no such code")


ESC = "\x1b]0;title\x07"
SHOWN = r"\x1b]0;title\x07"


def test_control_characters_are_shown_as_escapes() -> None:
    assert one_line(f"a{ESC}\n\r\t\x9b\u202e\u2028\udc80b") == rf"a{SHOWN}\n\r\t\x9b\u202e\u2028\udc80b"
    assert one_line("plain \u00e9 \\ text") == "plain \u00e9 \\ text"
    assert some_lines(f"a{ESC}\nb") == f"a{SHOWN}\nb"


def test_errors_and_remarks_hold_no_control_characters() -> None:
    where = SourceLine(f"m{ESC}\n.py", 3, f"f{ESC}", f"x = '{ESC}'")
    texts = [
        str(IllegalOption(f"found {ESC}", where=where, legal=f"legal {ESC}")),
        str(IllegalOption("found", where=f"a line {ESC}")),
        str(Remark("SPR103", f"text {ESC}", where)),
        str(where),
    ]
    assert all(SHOWN in text and "\x1b" not in text and "\x07" not in text for text in texts)
    assert str(where).count("\n") == 1


def test_no_line_of_this_package_is_a_users() -> None:
    """Code that exec made has no lines; then this package's own call of the model is what the trace ends with."""
    own = str(Path(diagnostics.__file__).parent / "program" / "trace.py")
    call = f'  File "{own}", line 9, in _entry\n    return self(*args)\n'
    assert diagnostics.source_of(node_with(call)) is None
    users = '  File "<string>", line 4, in forward\n'
    assert diagnostics.source_of(node_with(users + call)) == SourceLine("<string>", 4, "forward", "")
    assert diagnostics.source_of(node_with(call + users)) == SourceLine("<string>", 4, "forward", "")
    model = str(Path(diagnostics.__file__).parent / "models" / "llama.py")
    assert diagnostics.source_of(node_with(call.replace(own, model))) is not None
    assert str(SourceLine("<string>", 4, "forward", "")) == "<string>:4 in forward"


def test_errors_can_be_imported_from_the_package() -> None:
    for error in ERRORS:
        assert getattr(spcompile, error.__name__) is error
        assert error.__name__ in spcompile.__all__


def node_of(graph: fx.Graph, name: str, line: int) -> fx.Node:
    node = graph.placeholder(name)
    node.meta["stack_trace"] = f'  File "user.py", line {line}, in forward\n    y = f(x)\n'
    return node


def test_remarks_that_say_the_same_are_one_line_with_a_count_and_places() -> None:
    remarks, graph = Remarks(), fx.Graph()
    for layer in range(3):
        remarks.add("SPR201", "bias: no form", node_of(graph, f"bias_{layer}", 7))
    remarks.add("SPR201", "bias: no form", node_of(graph, "other", 9))
    remarks.add("SPR101", "no attention")
    assert [remark.values for remark in remarks.rows] == [("bias_0", "bias_1", "bias_2"), ("other",), ()]
    first, second = remark_lines(remarks.rows)
    assert first.splitlines()[0] == "SPR201 bias: no form (4 times)"
    assert [line.strip() for line in first.splitlines()[1:] if " at " in line] == [
        "at user.py:7 in forward",
        "at user.py:9 in forward",
    ]
    assert second == "SPR101 no attention"


def test_of_many_lines_the_first_are_shown() -> None:
    remarks, graph = Remarks(), fx.Graph()
    for line in range(PLACES + 3):
        remarks.add("SPR201", "bias: no form", node_of(graph, f"n{line}", line))
    (text,) = remark_lines(remarks.rows)
    assert text.endswith("and at 3 other lines")
    assert len(remarks.rows) == PLACES + 3
