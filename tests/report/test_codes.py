"""Every code has a cause, an example and a cure, and the examples of the page do what they say."""

from __future__ import annotations

import os
import textwrap
from typing import Any
from unittest import mock

import pytest
import torch

from spcompile.diagnostics import REMARKS, SpcompileError
from spcompile.report.code_text import PRELUDE
from spcompile.report.codes_page import error_classes
from spcompile.report.error_texts import ERROR_TEXTS
from spcompile.report.remark_texts import REMARK_TEXTS

TEXTS = ERROR_TEXTS | REMARK_TEXTS


def test_every_code_has_all_three() -> None:
    assert [*ERROR_TEXTS] == [error.code for error in error_classes()]
    assert {*REMARK_TEXTS} == {*REMARKS}
    for code, text in TEXTS.items():
        assert text.cause.strip().endswith(".")
        assert text.cure.strip().endswith(".")
        assert text.runs or code in text.example
    assert sum(text.runs for text in TEXTS.values()) >= 38


def errors_behind(error: BaseException | None) -> list[str]:
    """The codes of an error and of those that it was raised from, as Dynamo does."""
    found = []
    while error is not None:
        found += [error.code] if isinstance(error, SpcompileError) else []
        error = getattr(error, "inner_exception", None) or error.__cause__
    return found


@pytest.mark.thinned(30)
@pytest.mark.parametrize("code", [code for code, text in TEXTS.items() if text.runs])
def test_an_example_shows_its_code(code: str) -> None:
    names: dict[str, Any] = {}
    torch._dynamo.reset()
    program = compile(PRELUDE + textwrap.dedent(TEXTS[code].example), "example.py", "exec")
    with mock.patch.dict(os.environ):
        if code in ERROR_TEXTS:
            with pytest.raises(Exception, match=code) as caught:
                exec(program, names)
            assert errors_behind(caught.value)[:1] == [code]
        else:
            exec(program, names)
            plans = (names["plan"], *names["plan"].parts)
            assert code in [remark.code for plan in plans for remark in plan.remarks]
