"""A model of several graphs, run by all ranks in one process, and each of its graphs compared by itself.

Every graph is tried where the model calls it: the plain graph on the same inputs is what it should compute, with
gradients of random projections of its outputs. What the model goes on with is what the ranks computed, so that its loss
and gradients are those of all graphs together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from spcompile.capture.retrace import capture
from spcompile.check.simulate import Simulator
from spcompile.graph.edit import copy_graph
from spcompile.machine.mesh import MeshShape
from spcompile.options import Options
from spcompile.passes_api import Pass, Stage
from spcompile.program.outputs import NotComputedTensor
from spcompile.program.trace import Backend, Inputs, Traced, compile_for, through_dynamo
from spcompile.report.gradients import gradients_of
from spcompile.report.noise import DRAWS, mover, with_conversions
from spcompile.report.plain_run import Eager, attention_by_its_formula, named_leaves
from spcompile.report.put_back import put_back
from spcompile.report.trial import ROUNDING, TOLERANCE, Trial, places_written
from spcompile.report.verify_report import Kind, TensorError, difference, largest

Key = tuple[Kind, str]


class BrokenModel:
    """A model beside its plain run.

    trials: one for each call of a graph, in order. found: what the ranks computed; allowed: by kind and name, the
    absolute difference that is rounding.
    """

    def __init__(
        self, model: nn.Module, example_inputs: Inputs, mesh: MeshShape, options: Options, eager: Eager, rng: Tensor
    ) -> None:
        self.trials: list[Trial] = []
        self.allowed: dict[Key, float] = {}
        self.expected = eager
        self.found: Eager | None = None
        self._model, self._inputs, self._mesh, self._options = model, example_inputs, mesh, options
        self._rng = rng
        given = [x for x in pytree.tree_leaves(example_inputs) if isinstance(x, Tensor)]
        named = [(f"input {i}", x) for i, x in enumerate(given)]
        named += [*model.named_parameters(), *model.named_buffers()]
        self._names = {id(x): name for name, x in named}
        self._tensors = {id(x): x for _, x in named}

    def run(self, pipeline: Sequence[Pass]) -> None:
        """Run the model on all ranks, forward and, from the same roots as the plain model, backward."""

        def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
            traced = compile_for(gm, inputs, self._mesh, self._options, pipeline, keep_texts=False)
            plain = fx.GraphModule(gm, copy_graph(gm.graph))

            def call(*arguments: Any) -> list[Any]:
                self.trials.append(self._trial(plain, traced, arguments))
                return list(_AllRanks.apply(traced, self._mesh, *arguments))

            return call

        self.found = self._results(backend)

    def wanted(self) -> Iterator[tuple[Key, Tensor, Tensor | None]]:
        """Everything of the whole model that is compared: what it is called, the plain model's, the ranks'."""
        assert self.found is not None
        yield from self._pairs(self.found)

    def rows(self, tolerance_of: Callable[[Tensor], float]) -> list[TensorError]:
        """The whole model beside the plain one."""
        top = max((largest(g) for g in self.expected.gradients.values() if g is not None), default=0.0)
        return [self._row(key, expected, found, tolerance_of, top) for key, expected, found in self.wanted()]

    def noise(self) -> dict[Key, float]:
        """How far the whole model's results move when every number in it moves by one unit in the last place.

        A run that moves over a branch, into other graphs, says nothing and does not count.
        """
        generator, moved = torch.Generator().manual_seed(0), dict[Key, float]()
        observers = [None, *[mover(generator)] * DRAWS]
        runs = [self._on_one_device(observe) for observe in observers]
        (path, still), *others = runs
        before = {key: value for key, _, value in self._pairs(still)}
        for key, _, value in (pair for way, found in others if way == path for pair in self._pairs(found)):
            if value is not None and (old := before.get(key)) is not None:
                change = difference(value, old)
                moved[key] = max(moved.get(key, 0.0), change if math.isfinite(change) else 0.0)
        return moved

    def _on_one_device(self, observe: Any) -> tuple[list[str], Eager]:
        """The texts of the graphs that ran, and what the model gives."""
        path: list[str] = []

        def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
            captured = capture(gm, inputs)
            written_out = captured if observe is None else with_conversions(captured)

            def call(*arguments: Any) -> list[Any]:
                path.append(str(captured.graph))
                own = [x.clone() if isinstance(x, Tensor) else x for x in arguments]
                with attention_by_its_formula():
                    (found,) = Simulator(MeshShape(())).run(written_out, [own], observe)
                with torch.no_grad():
                    for place in places_written(captured.graph):
                        arguments[place].copy_(own[place])
                return list(found)

            return call

        found = self._results(backend)
        return path, found

    def _results(self, backend: Backend) -> Eager:
        """One run of the model through graphs that `backend` makes."""
        model, expected = self._model, self.expected
        tensors = [x for x in pytree.tree_leaves(self._inputs) if isinstance(x, Tensor)]
        buffers = dict(model.named_buffers())
        torch.set_rng_state(self._rng)
        with put_back(model, self._inputs) as kept:
            outputs = named_leaves(through_dynamo(model, self._inputs, backend, self._options))
            wanted = [x for x in (*model.parameters(), *tensors) if id(x) in expected.gradients]
            roots = [outputs[name] for name in expected.weights]
            gradients: dict[int, Tensor | None] = {}
            if roots and wanted:
                found = gradients_of(roots, wanted, list(expected.weights.values()))
                gradients = {id(x): gradient for x, gradient in zip(wanted, found, strict=True)}
            written = {id(x): x.detach().clone() for x in kept.changed() if x.layout is torch.strided}
            replaced = {n: x.detach().clone() for n, x in model.named_buffers() if x is not buffers.get(n)}
            if written:  # outputs may be views of them
                outputs = {name: x.detach().clone() if _is_computed(x) else x for name, x in outputs.items()}
        return Eager(outputs, expected.weights, gradients, written, replaced)

    def _pairs(self, found: Eager) -> Iterator[tuple[Key, Tensor, Tensor | None]]:
        expected = self.expected
        for name, output in expected.outputs.items():
            own = found.outputs.get(name)
            if isinstance(output, Tensor) and not isinstance(own, NotComputedTensor):
                yield ("output", name), output.detach(), own.detach() if isinstance(own, Tensor) else None
        for number, gradient in expected.gradients.items():
            own = found.gradients.get(number)
            if gradient is not None or own is not None:
                like = torch.zeros_like(own if gradient is None else gradient)  # type: ignore[arg-type]
                key: Key = ("gradient", self._names[number])
                yield key, like if gradient is None else gradient, like if own is None else own
        for number in {**expected.written, **found.written}:  # what is not written to stays
            old, name = self._tensors.get(number), self._names.get(number, "a tensor that the model holds")
            value, own = expected.written.get(number, old), found.written.get(number, old)
            yield ("new value", name), torch.empty(0) if value is None else value.detach(), own
        for name, value in expected.replaced.items():
            yield ("new value", name), value, found.replaced.get(name)

    def _row(
        self, key: Key, expected: Tensor, found: Tensor | None, tolerance_of: Callable[[Tensor], float], top: float
    ) -> TensorError:
        if found is None or found.shape != expected.shape:
            return TensorError("parts", *key, math.inf, math.inf, False)
        worst, scale = difference(found, expected), largest(expected)
        relative = worst / scale if scale else (0.0 if worst == 0 else math.inf)
        is_right = relative <= tolerance_of(expected)
        if key[0] == "gradient" and expected.dtype.to_real() in TOLERANCE:
            is_right |= worst <= ROUNDING * torch.finfo(expected.dtype).eps * top
        if key in self.allowed:
            is_right = worst <= self.allowed[key]
        return TensorError("parts", *key, worst, relative, is_right)

    def _trial(self, plain: fx.GraphModule, traced: Traced, arguments: Sequence[Any]) -> Trial:
        rng = torch.get_rng_state()
        given, leaves = [_leaves(arguments), _leaves(arguments)]
        with torch.enable_grad(), attention_by_its_formula():
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
        names = {i: f"part {number}: {self._names.get(id(x), f'input {i}')}" for i, x in enumerate(arguments)}
        if roots and wanted:
            inputs, weights = [leaves[i] for i in wanted], list(trial.weights.values())
            found = gradients_of(list(roots.values()), inputs, weights)
            trial.gradients = {i: (names[i], gradient) for i, gradient in zip(wanted, found, strict=True)}
        for i in places_written(traced.program.captured.graph):
            trial.written[i] = (names[i], leaves[i].detach())
        torch.set_rng_state(rng)
        return trial


class _AllRanks(torch.autograd.Function):
    """The graph of every rank before autograd on equal inputs; the first rank's results, which must be everyone's."""

    @staticmethod
    def forward(ctx: Any, traced: Traced, mesh: MeshShape, *arguments: Any) -> Any:
        last = [s for s in traced.program.history.snapshots if s.stage is not Stage.SCHEDULE][-1]
        assert last.gm is not None
        ctx.inputs = [_leaves(arguments) for _ in range(mesh.world_size)]
        with torch.enable_grad(), attention_by_its_formula():
            ctx.outputs = Simulator(mesh).run(last.gm, ctx.inputs)
        for place in places_written(traced.program.captured.graph):
            arguments[place].data.copy_(ctx.inputs[0][place].detach())
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


def _is_computed(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, NotComputedTensor)


def _the_worst(*gradients: Tensor | None) -> Tensor | None:
    """The gradient of an input, which all ranks must have alike; NaN where they do not."""
    first = gradients[0]
    if first is None:
        return None
    part = max(1e-4, ROUNDING * torch.finfo(first.dtype).eps)
    close = all(g is not None and torch.allclose(g, first, rtol=part, atol=part * largest(first)) for g in gradients)
    return first if close else torch.full_like(first, float("nan"))


def _leaves(arguments: Sequence[Any]) -> list[Any]:
    return [x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in arguments]
