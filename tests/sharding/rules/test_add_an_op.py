"""docs/add-an-op.md: its blocks are run as they stand, the first two as the module of a plugin."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import spcompile
from spcompile.program import plugins
from spcompile.sharding.rules import rule

PAGE = Path(__file__).parents[3] / "docs" / "add-an-op.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module of the op and its rule. Both are forgotten behind the test."""
    from torch._library import custom_ops

    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(rule, "_REGISTRY", dict(rule._REGISTRY))
    monkeypatch.setattr(plugins, "_loaded", set())
    (tmp_path / "my_ops.py").write_text("from __future__ import annotations\n" + "\n\n".join(BLOCKS[:2]))
    yield "my_ops"
    plugins._load.cache_clear()
    custom_ops.OPDEFS.pop("my_ops::gated_norm")._lib._destroy()


@pytest.mark.thinned(6)
def test_the_page_runs(plugin: str) -> None:
    names = {"PLUGIN": plugin, "torch": torch, "Tensor": torch.Tensor}
    torch.manual_seed(0)
    __import__(plugin)
    for block in BLOCKS[2:]:
        exec(compile(block, str(PAGE), "exec"), names)


@pytest.mark.thinned(2)
def test_without_the_rule_the_op_is_right_and_a_remark_names_it(plugin: str) -> None:
    names = {"torch": torch, "Tensor": torch.Tensor}
    exec(BLOCKS[0] + BLOCKS[2], names)
    model, inputs = names["Model"]().double(), (torch.randn(2, 11, 8, dtype=torch.float64),)  # type: ignore[operator]
    plan = spcompile.explain(model, inputs, mesh={"cp": 2})
    assert any("gated_norm" in remark.text for remark in plan.remarks if remark.code == "SPR102")
    assert spcompile.verify(model, inputs, mesh={"cp": 2}).ok
