"""The page of all codes: a table of errors and one of remarks, then a section for each with cause, example and cure."""

from __future__ import annotations

import inspect

from spcompile import diagnostics
from spcompile.diagnostics import REMARKS, SpcompileError
from spcompile.report.code_text import PRELUDE
from spcompile.report.error_texts import ERROR_TEXTS
from spcompile.report.remark_texts import REMARK_TEXTS


def error_classes() -> list[type[SpcompileError]]:
    """All errors but their base, by code."""
    classes = [c for c in vars(diagnostics).values() if isinstance(c, type) and issubclass(c, SpcompileError)]
    return sorted((c for c in classes if c is not SpcompileError), key=lambda c: c.code)


def codes_markdown(generated: str) -> str:
    """The page. generated: the line that says so."""
    errors = error_classes()
    lines = [
        "# Errors and remarks",
        "",
        generated,
        "",
        "An error (SP) stops the compile, with the same text on every rank. It says what was found, at which line of",
        "the model, and what would be legal. Each is also a built-in exception, so `except ValueError` catches it.",
        "",
        "| code | class | title | when |",
        "| --- | --- | --- | --- |",
        *[f"| {_to_section(e.code)} | `{e.__name__}` | {e.title} | {_summary_of(e)} |" for e in errors],
        "",
        "A remark (SPR) tells what the compiler did where one might have expected something else. It is logged by",
        "`spcompile.backend`; with `strict=True` a remark about lost parallelism becomes the error SP401.",
        "",
        "| code | what happened |",
        "| --- | --- |",
        *[f"| {_to_section(code)} | {text} |" for code, text in sorted(REMARKS.items())],
        "",
        "Each has a section below. Examples in Python run as they stand behind these lines, and end in the error, or",
        "make a `plan` whose `remarks` have the remark:",
        "",
        "```python",
        PRELUDE.rstrip(),
        "```",
        "",
    ]
    for error in errors:
        lines += [f"## {error.code}", "", f"{_summary_of(error)}", "", ERROR_TEXTS[error.code].markdown()]
    for code, text in sorted(REMARKS.items()):
        lines += [f"## {code}", "", f"{text[0].upper()}{text[1:]}.", "", REMARK_TEXTS[code].markdown()]
    return "\n".join(lines)


def _to_section(code: str) -> str:
    return f"[{code}](#{code.lower()})"


def _summary_of(error: type[SpcompileError]) -> str:
    return inspect.cleandoc(error.__doc__ or "").partition("\n\n")[0].replace("\n", " ")
