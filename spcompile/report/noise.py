"""How far a model's results move when every number in it does by one unit in the last place.

An op that rounds several times inside, such as a softmax, moves what it gives as often. That is what two right programs
may differ in, which round at other places. A constant would be too much for one tensor, such as a loss over many
tokens, and too little for another, such as a gradient in which large terms cancel. Each number moves by a unit of its
own dtype: a softmax in float32 in the midst of float64 makes just the noise that it makes.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor
from torch.utils import _pytree as pytree

from spcompile.attention.scores.mask import EXCLUDES
from spcompile.graph.aten_ops import overloads
from spcompile.program.pipeline import Snapshot
from spcompile.report.trial import Observer, Outcome, Trial
from spcompile.report.verify_report import difference, largest
from spcompile.sharding.rules.normalization import LAYER_NORMS, SOFTMAXES

DRAWS = 4
# Of a softmax: the difference to the largest, its exponential, their sum, the quotient. Of a norm: the mean, the
# difference to it, the sum of squares, its root, the quotient.
INSIDE = {
    **dict.fromkeys(overloads(SOFTMAXES), 4),
    **dict.fromkeys(overloads(LAYER_NORMS), 5),
    torch.ops.aten.scaled_dot_product_attention.default: 6,
}
# These convert what they read to a dtype that they are told, before all else.
CONVERT_FIRST = {
    *overloads("softmax.int log_softmax.int special_softmax special_log_softmax cumsum cumprod prod nansum"),
    *overloads("sum sum.dim_IntList mean mean.dim prod.dim_int linalg_vector_norm"),
}
# A draw may move a result by less than another one would.
ROUNDINGS = 2


@dataclass
class Noise:
    """The largest absolute change of each result, by place as in `Outcome`."""

    outputs: dict[int, float] = field(default_factory=dict)
    gradients: dict[int, float] = field(default_factory=dict)
    written: dict[int, float] = field(default_factory=dict)

    def add(self, moved: Outcome, still: Outcome) -> None:
        """Note how far one more run has moved."""
        for kind in ("outputs", "gradients", "written"):
            into, now = getattr(self, kind), getattr(moved, kind)
            for place, before in getattr(still, kind).items():
                into[place] = max(into.get(place, 0.0), _change(now[place], before))


def noise_of(trial: Trial, snapshot: Snapshot) -> Noise:
    """Run a graph of one device on its inputs, then some times more with all numbers moved, also those of gradients."""
    assert snapshot.gm is not None
    generator, noise = torch.Generator().manual_seed(0), Noise()
    snapshot = replace(snapshot, gm=with_conversions(snapshot.gm))
    still = trial.run(snapshot)
    for _ in range(DRAWS):
        noise.add(trial.run(snapshot, mover(generator)), still)
    return noise


def with_conversions(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy in which conversions inside of a call stand before it: they round, and so do the gradients behind them."""
    graph = copy.deepcopy(gm.graph)
    for node in graph.nodes:
        if node.target not in CONVERT_FIRST:
            continue
        (operand, *others), into = node.args, node.meta["val"].dtype
        if into.is_floating_point and operand.meta["val"].dtype not in (into, torch.bool):
            with graph.inserting_before(node):
                converted = graph.call_function(torch.ops.aten.to.dtype, (operand, into))
            converted.meta = {**node.meta, "val": operand.meta["val"].to(into)}
            node.args = (converted, *others)
    return fx.GraphModule(gm, graph)


def mover(generator: torch.Generator) -> Observer:
    """Observes a run in which it moves each number by one unit."""
    return lambda node, values: _move(node, values, generator)


def allowance(moved: float, expected: Tensor) -> float:
    """The largest difference that is rounding: what noise makes, and the unit that the result itself is rounded to."""
    eps = torch.finfo(expected.dtype).eps
    return ROUNDINGS * moved + eps * largest(expected)


def _change(now: Sequence[Tensor | None], before: Sequence[Tensor | None]) -> float:
    changes = [
        difference(new, old) for new, old in zip(now, before, strict=True) if new is not None and old is not None
    ]
    return max((change for change in changes if math.isfinite(change)), default=0.0)


def _move(node: fx.Node, values: Sequence[Any], generator: torch.Generator) -> None:
    """Move what a call has computed, or an input, and the gradients that will arrive there."""
    if node.op == "get_attr" or node.target is operator.getitem:
        return
    for x in pytree.tree_leaves(list(values)):
        if isinstance(x, Tensor) and x.is_floating_point() and not _is_view(node, x):
            roundings = INSIDE.get(node.target, 1)
            x.data.copy_(moved(x.data, generator, roundings))
            if x.requires_grad:
                x.register_hook(lambda gradient, roundings=roundings: moved(gradient, generator, roundings))


def _is_view(node: fx.Node, x: Tensor) -> bool:
    """Whether the result may lie in memory that an operand has, which has been moved."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not any(result.alias_info is not None for result in schema.returns):
        return False
    return any(operand.meta["val"].dtype == x.dtype for operand in node.all_input_nodes[:1])


def moved(x: Tensor, generator: torch.Generator, roundings: int = 1) -> Tensor:
    """Each element some times one unit up or down.

    Zeros, infinities and numbers that exclude keys stay, and so do mere marks.
    """
    if not _is_measured(x):
        return x
    exact = x.to(torch.float64)
    unit = torch.ldexp(torch.full_like(exact, torch.finfo(x.dtype).eps), torch.frexp(exact.abs()).exponent - 1)
    up = torch.randint(0, 2, (roundings, *x.shape), generator=generator).to(x.device)
    moves = (exact != 0) & exact.isfinite() & (exact > EXCLUDES)
    return torch.where(moves, exact + unit * (2 * up - 1).sum(0), exact).to(x.dtype)


def _is_measured(x: Tensor) -> bool:
    """Whether a tensor holds quantities, not marks such as the zeros and ones of a mask, which nobody rounds."""
    return not bool(((x == x.round()) | ~x.isfinite()).all())
