"""The EXAMPLE of every pass: its text before and after, its numbers, a second run, and the count of rewrites.

EXPECTTEST_ACCEPT=1 writes the texts anew.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from example_numerics import after_autograd, assert_equal, on_all_ranks, on_one_device

from spcompile.example_runs import ExampleRun, Step, example_of, run_example, without_line_numbers
from spcompile.passes import PIPELINE
from spcompile.passes_api import Pass, Stage

GOLDEN = Path(__file__).parent / "golden"
PASSES = pytest.mark.parametrize("p", PIPELINE, ids=lambda p: p.name)
DEGREES = pytest.mark.parametrize("degree", [1, 2, 4, 7])  # the examples' sequences have length 7


def run(p: Pass, degree: int | None = None) -> ExampleRun:
    torch.manual_seed(0)
    example = example_of(p)
    assert example is not None, f"the file of {p.name} has no EXAMPLE"
    return run_example(p, PIPELINE, example, None if degree is None else {"cp": degree})


def golden_text(p: Pass, steps: list[Step]) -> str:
    parts = [f"# {p.name}: {p.summary}\n"]
    for step in steps:
        for moment, text in (("before", step.before_text), ("after", step.after_text)):
            parts.append(f"\n## {f'{step.phase} ' if step.phase else ''}{moment}\n{without_line_numbers(text)}")
    return "".join(parts)


@PASSES
def test_text(p: Pass) -> None:
    file = GOLDEN / f"{p.name}.txt"
    text = golden_text(p, run(p).steps)
    if os.environ.get("EXPECTTEST_ACCEPT"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    assert text == file.read_text(), "run with EXPECTTEST_ACCEPT=1 if the new text is right"


def test_no_text_of_a_pass_that_is_gone() -> None:
    assert {file.stem for file in GOLDEN.glob("*.txt")} == {p.name for p in PIPELINE}


def numbers(run: ExampleRun, step: Step, side: str, degree: int) -> list[Any]:
    """Of a graph before autograd: one device's, or every rank's."""
    gm = getattr(step, side)
    if getattr(step, f"{side}_is_local"):
        return on_all_ranks(gm, run.inputs, {"cp": degree})
    return [on_one_device(gm, run.inputs)]


@PASSES
@DEGREES
def test_numbers(p: Pass, degree: int) -> None:
    """Eager function == graph before == graph after, outputs and gradients, on every rank."""
    found = run(p, degree)
    expected = on_one_device(found.function, found.inputs)
    for side in ("before", "after"):
        if p.stage is Stage.SCHEDULE:
            forward, backward = (getattr(step, side) for step in found.steps)
            for in_flight in ("poison", "late"):
                for rank in after_autograd(forward, backward, found.inputs, {"cp": degree}, in_flight):
                    assert_equal(rank, expected)
        else:
            for rank in numbers(found, found.steps[0], side, degree):
                assert_equal(rank, expected)


@PASSES
def test_a_second_run_changes_nothing(p: Pass) -> None:
    for step in run(p).steps:
        assert step.rewrites_again == 0
        assert step.again_text == step.after_text


@PASSES
def test_the_count_is_honest(p: Pass) -> None:
    """No rewrite, no change but in the placements that annotation shows."""

    def ops(text: str) -> str:
        return re.sub(r" cp=[^\"]*", "", text)

    for step in run(p).steps:
        assert (step.rewrites == 0) == (ops(step.before_text) == ops(step.after_text))


@PASSES
def test_the_example_shows_the_pass_at_work(p: Pass) -> None:
    decides_only = p.name in ("choose-attention", "annotate-sharding")
    assert decides_only or any(step.rewrites for step in run(p).steps)
