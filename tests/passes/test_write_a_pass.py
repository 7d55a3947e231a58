"""docs/write-a-pass.md: its code is run as it stands, as the file of a pass."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from example_numerics import assert_equal, on_one_device
from torch import Tensor

from spcompile.passes_api import Example
from spcompile.report.example_runs import example_of, run_example

PAGE = Path(__file__).parents[2] / "docs" / "write-a-pass.md"


@pytest.fixture
def module(tmp_path: Path) -> ModuleType:
    file = tmp_path / "remove_double_negation.py"
    file.write_text("\n\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = found
    spec.loader.exec_module(found)
    return found


def test_the_page_runs_and_its_pass_keeps_the_laws(module: ModuleType) -> None:
    p = module.RemoveDoubleNegation()
    assert example_of(p) is module.EXAMPLE
    found = run_example(p, [p], module.EXAMPLE)
    (step,) = found.steps
    assert step.again_text == step.after_text
    assert_equal(on_one_device(step.after, found.inputs), on_one_device(found.function, found.inputs))


def test_it_does_not_fire_on_one_negation(module: ModuleType) -> None:
    def once(x: Tensor) -> Tensor:
        return -x * 2

    p = module.RemoveDoubleNegation()
    example = Example(once, lambda: (torch.randn(4, dtype=torch.float64, requires_grad=True),))
    (step,) = run_example(p, [p], example).steps
    assert step.rewrites == 0
    assert step.after_text == step.before_text
