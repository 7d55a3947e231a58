"""How far a model's results move when its inputs do by one unit in the last place.

That is what two right programs may differ in, which round at other places. A constant would be too much for one
tensor, such as a loss over many tokens, and too little for another, such as a gradient in which large terms cancel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from spcompile.options import Options
from spcompile.program.trace import Inputs
from spcompile.report.trial import Eager, run_eager
from spcompile.report.verify_report import difference, largest

DRAWS = 4
# A program rounds every intermediate result, not only what goes in.
ROUNDINGS = 2


@dataclass
class Noise:
    """The largest absolute change of each result. outputs: by name; gradients: by id, as in Eager."""

    outputs: dict[str, float] = field(default_factory=dict)
    gradients: dict[int, float] = field(default_factory=dict)

    def add(self, moved: Eager, still: Eager) -> None:
        """Note how far one more run has moved."""
        for now, before, into in (
            (moved.outputs, still.outputs, self.outputs),
            (moved.gradients, still.gradients, self.gradients),
        ):
            _note(now, before, into)


def noise_of(model: nn.Module, inputs: Inputs, options: Options, still: Eager, eps: float, rng: Tensor) -> Noise:
    """Run the plain model on moved parameters and inputs; both are put back.

    still: its results on what was given. eps: the unit in the last place of 1. rng: the random state of that run.
    """
    given = [x for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor) and _is_measured(x)]
    leaves = list({id(x): x for x in (*model.parameters(), *given)}.values())
    before = [x.detach().clone() for x in leaves]
    generator, noise = torch.Generator().manual_seed(0), Noise()
    try:
        for _ in range(DRAWS):
            for x, old in zip(leaves, before, strict=True):
                x.data.copy_(_nudged(old, eps, generator))
            torch.set_rng_state(rng)
            noise.add(run_eager(model, inputs, options), still)
    finally:
        for x, old in zip(leaves, before, strict=True):
            x.data.copy_(old)
    return noise


def allowance(moved: float, expected: Tensor, eps: float) -> float:
    """The largest difference that is rounding: what noise makes, and the unit that the result itself is rounded to."""
    return ROUNDINGS * moved + eps * largest(expected)


def _note(now: Mapping[Any, Any], before: Mapping[Any, Any], into: dict[Any, float]) -> None:
    for key, old in before.items():
        new = now.get(key)
        if isinstance(old, Tensor) and isinstance(new, Tensor) and old.shape == new.shape:
            change = difference(new, old)
            into[key] = max(into.get(key, 0.0), change if math.isfinite(change) else 0.0)


def _is_measured(x: Tensor) -> bool:
    """Whether an input holds quantities, not marks such as the zeros and ones of a mask, which nobody rounds."""
    return x.is_floating_point() and not bool(((x == x.round()) | ~x.isfinite()).all())


def _nudged(x: Tensor, eps: float, generator: torch.Generator) -> Tensor:
    """Each element one unit up or down; zeros and infinities stay."""
    exact = x.to(torch.float64)
    unit = torch.ldexp(torch.full_like(exact, eps), torch.frexp(exact.abs()).exponent - 1)
    up = torch.randint(0, 2, x.shape, generator=generator).to(x.device)
    moves = (exact != 0) & exact.isfinite()
    return torch.where(moves, exact + unit * (2 * up - 1), exact).to(x.dtype)
