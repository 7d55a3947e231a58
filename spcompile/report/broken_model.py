"""A model of several graphs, run by all ranks in one process, and each of its graphs compared by itself.

Every graph is tried where the model calls it: the plain graph on the same inputs is what it should compute, with
gradients of random projections of its outputs. What the model goes on with is what the ranks computed, so that its loss
and gradients are those of all graphs together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from spcompile.check.simulate import Simulator
from spcompile.graph.edit import copy_graph
from spcompile.machine.mesh import MeshShape
from spcompile.options import Options
from spcompile.passes_api import Pass, Stage
from spcompile.program.outputs import NotComputedTensor
from spcompile.program.trace import Inputs, Traced, compile_for, through_dynamo
from spcompile.report.put_back import numbers_put_back
from spcompile.report.trial import Eager, Trial, named_leaves
from spcompile.report.verify_report import TensorError, difference, is_exact, largest


class BrokenModel:
    """What was found while a model ran. trials: one for each call of a graph, in order."""

    def __init__(self, model: nn.Module, mesh: MeshShape) -> None:
        self.trials: list[Trial] = []
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._mesh = mesh
        self.outputs: dict[str, Any] = {}
        self.gradients: dict[int, Tensor | None] = {}

    def run(
        self, model: nn.Module, example_inputs: Inputs, options: Options, pipeline: Sequence[Pass], eager: Eager
    ) -> None:
        """Run the model on all ranks, forward and, from the same roots as the plain model, backward."""

        def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
            traced = compile_for(gm, inputs, self._mesh, options, pipeline, keep_texts=False)
            plain = fx.GraphModule(gm, copy_graph(gm.graph))

            def call(*arguments: Any) -> list[Any]:
                self.trials.append(self._trial(plain, traced, arguments))
                return list(_AllRanks.apply(traced, self._mesh, *arguments))

            return call

        tensors = [x for x in pytree.tree_leaves(example_inputs) if isinstance(x, Tensor)]
        with numbers_put_back(model, example_inputs):
            self.outputs = named_leaves(through_dynamo(model, example_inputs, backend, options))
        leaves = [*model.parameters(), *tensors]
        wanted = [x for x in leaves if id(x) in eager.gradients]
        roots = [self.outputs[name] for name in eager.weights]
        if roots and wanted:
            found = torch.autograd.grad(roots, wanted, list(eager.weights.values()), allow_unused=True)
            self.gradients = {id(x): gradient for x, gradient in zip(wanted, found, strict=True)}

    def rows(self, eager: Eager, tolerance: float, rounding: float) -> list[TensorError]:
        """The whole model beside the plain one."""
        pairs: list[tuple[str, str, Any, Any, float]] = [
            ("output", name, self.outputs[name], expected, 0.0)
            for name, expected in eager.outputs.items()
            if isinstance(expected, Tensor) and not isinstance(self.outputs[name], NotComputedTensor)
        ]
        top = max((largest(g) for g in eager.gradients.values() if g is not None), default=0.0)
        for number, expected in eager.gradients.items():
            found = self.gradients.get(number)
            if expected is not None or found is not None:
                name = self._names.get(number, "an input")
                like = torch.zeros_like(found if found is not None else expected)  # type: ignore[arg-type]
                pairs.append(
                    (
                        "gradient",
                        name,
                        like if found is None else found,
                        like if expected is None else expected,
                        rounding * top,
                    )
                )
        return [_row(*pair, tolerance) for pair in pairs]

    def _trial(self, plain: fx.GraphModule, traced: Traced, arguments: Sequence[Any]) -> Trial:
        rng = torch.get_rng_state()
        given, leaves = [_leaves(arguments), _leaves(arguments)]
        outputs = plain(*leaves)
        trial = Trial(traced, given, {}, rng)
        number = len(self.trials) + 1
        roots: dict[int, Tensor] = {}
        for i, (out, value) in enumerate(zip(traced.program.outputs, outputs, strict=True)):
            if out.index is not None and isinstance(value, Tensor):
                trial.outputs[i] = (f"part {number}: output {i}", value.detach().clone())
                if value.requires_grad:
                    roots[i] = value
                    trial.weights[i] = torch.randn(value.shape, dtype=value.dtype).to(value.device)
        wanted = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad]
        if roots and wanted:
            inputs, weights = [leaves[i] for i in wanted], list(trial.weights.values())
            found = torch.autograd.grad(list(roots.values()), inputs, weights, allow_unused=True)
            for i, gradient in zip(wanted, found, strict=True):
                name = self._names.get(id(arguments[i]), f"input {i}")
                trial.gradients[i] = (f"part {number}: {name}", gradient)
        torch.set_rng_state(rng)
        return trial


class _AllRanks(torch.autograd.Function):
    """The graph of every rank before autograd on equal inputs; the first rank's results, which must be everyone's."""

    @staticmethod
    def forward(ctx: Any, traced: Traced, mesh: MeshShape, *arguments: Any) -> Any:
        last = [s for s in traced.program.history.snapshots if s.stage is not Stage.SCHEDULE][-1]
        assert last.gm is not None
        ctx.inputs = [_leaves(arguments) for _ in range(mesh.world_size)]
        with torch.enable_grad():
            ctx.outputs = Simulator(mesh).run(last.gm, ctx.inputs)
        for own, new in zip(arguments, ctx.inputs[0], strict=True):
            if isinstance(own, Tensor) and not own.requires_grad and not torch.equal(own, new):
                own.copy_(new)  # the model writes to it
        found = [ctx.outputs[0][o.index] if o.index is not None else None for o in traced.program.outputs]
        ctx.places = [o.index for o in traced.program.outputs]
        values = [NotComputedTensor() if x is None else x.detach() if isinstance(x, Tensor) else x for x in found]
        ctx.mark_non_differentiable(*[x for x, y in zip(values, found, strict=True) if not _has_gradient(y)])
        return tuple(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        pairs = [(p, g) for p, g in zip(ctx.places, gradients, strict=True) if p is not None and g is not None]
        roots = [(own[p], g) for own in ctx.outputs for p, g in pairs if _has_gradient(own[p])]
        torch.autograd.backward([x for x, _ in roots], [g for _, g in roots])
        found = [[x.grad if isinstance(x, Tensor) else None for x in own] for own in ctx.inputs]
        return (None, None, *map(_the_worst, *found))


def _has_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _the_worst(*gradients: Tensor | None) -> Tensor | None:
    """The gradient of an input, which all ranks must have alike; NaN where they do not."""
    first = gradients[0]
    if first is None:
        return None
    close = all(g is not None and torch.allclose(g, first, rtol=1e-4, atol=1e-4 * largest(first)) for g in gradients)
    return first if close else torch.full_like(first, float("nan"))


def _leaves(arguments: Sequence[Any]) -> list[Any]:
    return [x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in arguments]


def _row(kind: str, name: str, found: Tensor, expected: Tensor, rounding: float, tolerance: float) -> TensorError:
    worst, scale = difference(found, expected), largest(expected)
    relative = worst / scale if scale else (0.0 if worst == 0 else float("inf"))
    ok = worst == 0 if is_exact(expected) else relative <= tolerance or worst <= rounding
    return TensorError("parts", kind, name, worst, relative, ok)
