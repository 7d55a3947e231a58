"""The EXAMPLE of every pass: its text before and after, its numbers, a second run, and the count of rewrites.

EXPECTTEST_ACCEPT=1 writes the texts anew.
"""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from example_numerics import after_autograd, assert_equal, on_all_ranks, on_one_device

from spcompile.passes import PIPELINE
from spcompile.passes_api import Example, Pass, Stage
from spcompile.report.example_runs import ExampleRun, Step, example_of, run_example, without_line_numbers

GOLDEN = Path(__file__).parents[1] / "golden"
PASSES = pytest.mark.parametrize("p", PIPELINE, ids=lambda p: p.name)
DEGREES = pytest.mark.parametrize("degree", [1, 2, 4, 7])  # the examples' sequences have length 7


def example(p: Pass) -> Example:
    found = example_of(p)
    assert found is not None, f"the file of {p.name} has no EXAMPLE"
    return found


def mesh_of(p: Pass, degree: int) -> dict[str, int]:
    """The example's axis with another degree."""
    return {axis: degree for axis, _ in example(p).mesh}


def run(p: Pass, degree: int | None = None) -> ExampleRun:
    torch.manual_seed(0)
    return run_example(p, PIPELINE, example(p), None if degree is None else mesh_of(p, degree))


@functools.cache
def run_as_shown(name: str) -> ExampleRun:
    """For tests that only look at it."""
    return run(next(p for p in PIPELINE if p.name == name))


def golden_text(p: Pass, steps: list[Step]) -> str:
    parts = [f"# {p.name}: {p.summary}\n"]
    for step in steps:
        for moment, text in (("before", step.before_text), ("after", step.after_text)):
            parts.append(f"\n## {f'{step.phase} ' if step.phase else ''}{moment}\n{without_line_numbers(text)}")
    return "".join(parts)


@PASSES
def test_text(p: Pass) -> None:
    file = GOLDEN / f"{p.name}.txt"
    text = golden_text(p, run_as_shown(p.name).steps)
    if os.environ.get("EXPECTTEST_ACCEPT"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    assert text == file.read_text(), "run with EXPECTTEST_ACCEPT=1 if the new text is right"


def test_no_text_of_a_pass_that_is_gone() -> None:
    assert {file.stem for file in GOLDEN.glob("*.txt")} == {p.name for p in PIPELINE}


def numbers(run: ExampleRun, step: Step, side: str, mesh: dict[str, int]) -> list[Any]:
    """Of a graph before autograd: one device's, or every rank's."""
    gm = getattr(step, side)
    if getattr(step, f"{side}_is_local"):
        return on_all_ranks(gm, run.inputs, mesh)
    return [on_one_device(gm, run.inputs)]


@pytest.mark.thinned(30)
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
                for rank in after_autograd(forward, backward, found.inputs, mesh_of(p, degree), in_flight):
                    assert_equal(rank, expected)
        else:
            for rank in numbers(found, found.steps[0], side, mesh_of(p, degree)):
                assert_equal(rank, expected)


@pytest.mark.thinned(14)
@pytest.mark.parametrize("degree", [2, 3])
@pytest.mark.parametrize("last", ["insert-tensor-reshards", "split-all-reduce", "sink-all-gather", "hoist-shard"])
@pytest.mark.parametrize("of", ["sink-all-gather", "hoist-shard", "split-projections"])
def test_every_step_of_the_derivation_is_right_on_all_ranks(of: str, last: str, degree: int) -> None:
    """Lowered right behind each pass: from AllReduce to ReduceScatter + AllGather, no state in between is wrong."""
    by_name = {p.name: p for p in PIPELINE}
    names = list(by_name)
    skipped = names[names.index(last) + 1 : names.index("lower-tensor-parallel")]
    lower = by_name["lower-tensor-parallel"]
    torch.manual_seed(0)
    found = run_example(lower, [p for p in PIPELINE if p.name not in skipped], example(by_name[of]), {"tp": degree})
    expected = on_one_device(found.function, found.inputs)
    for rank in numbers(found, found.steps[0], "after", {"tp": degree}):
        assert_equal(rank, expected)


@PASSES
def test_a_second_run_changes_nothing(p: Pass) -> None:
    for step in run_as_shown(p.name).steps:
        assert step.rewrites_again == 0
        assert step.again_text == step.after_text


@PASSES
def test_the_count_is_honest(p: Pass) -> None:
    """No rewrite, no change but in the placements that annotation shows."""

    def ops(text: str) -> str:
        return re.sub(r" (cp|dp|tp)=[^\"]*", "", text)

    for step in run_as_shown(p.name).steps:
        assert (step.rewrites == 0) == (ops(step.before_text) == ops(step.after_text))


@PASSES
def test_the_example_shows_the_pass_at_work(p: Pass) -> None:
    decides_only = p.name.startswith(("choose-", "annotate-"))
    assert decides_only or any(step.rewrites for step in run_as_shown(p.name).steps)
