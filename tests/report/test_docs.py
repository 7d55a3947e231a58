"""The pages of docs/ are what `python -m spcompile.report.docs` writes, and links between pages lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from spcompile.diagnostics import REMARKS
from spcompile.graph.node_meta import CUSTOM, META
from spcompile.passes import PIPELINE
from spcompile.report import docs
from spcompile.report.node_meta_page import users_of_keys

FOLDER = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(
    "name", [pytest.param("passes.md", marks=pytest.mark.slow), *sorted(set(docs.PAGES) - {"passes.md"})]
)
def test_generated_pages_are_up_to_date(name: str) -> None:
    assert (FOLDER / name).read_text() == docs.PAGES[name](), "run python -m spcompile.report.docs"


def test_the_drawings_show_the_code() -> None:
    page = (FOLDER / "design.md").read_text()
    assert page.count("<!-- drawing: ") == 2
    assert docs.with_drawings(page) == page, "run python -m spcompile.report.docs"


def test_every_key_of_node_meta_is_described_and_used() -> None:
    assert set(users_of_keys()) == {*META, *CUSTOM}


def test_every_pass_and_code_has_a_section() -> None:
    passes, errors = (FOLDER / "passes.md").read_text(), (FOLDER / "errors.md").read_text()
    assert all(f"## {p.name}\n" in passes for p in PIPELINE)
    assert all(f"## {code}\n" in errors for code in REMARKS)


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.md")), ids=lambda f: f.name)
def test_links_lead_somewhere(file: Path) -> None:
    for target, _, anchor in re.findall(r"\]\((?!http)([^)#]*)(#([^)]*))?\)", file.read_text()):
        page = (file.parent / target) if target else file
        assert page.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings}, anchor
