"""Runs the graphs of a program on the inputs of the plain model, forward and backward, and compares their results."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.fx as fx
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import spcompile.check.attention_specs  # noqa: F401  (the simulator must know attention)
from spcompile.attention.scores.attention_call import AttentionCall
from spcompile.capture.graph_breaks import model_part_of
from spcompile.capture.retrace import OWN
from spcompile.check.simulate import Simulator
from spcompile.diagnostics import BatchNotSplit, IllegalOption
from spcompile.graph.axes import axis_argument
from spcompile.machine.mesh import MeshShape
from spcompile.machine.rank_parts import coordinates, part_of, split_batch, whole_of
from spcompile.options import Options
from spcompile.passes_api import Pass, Stage
from spcompile.program.build import LocalProgram
from spcompile.program.outputs import NotComputedTensor
from spcompile.program.pipeline import Snapshot
from spcompile.program.trace import Inputs, Traced, compile_for, through_dynamo
from spcompile.program.whole_batch import over_whole_batch
from spcompile.report.plain_run import Eager, attention_by_its_formula, named_leaves
from spcompile.report.put_back import put_back
from spcompile.report.verify_report import Kind, TensorError, difference, is_exact, largest
from spcompile.sharding.batch_entries import inputs_with_batch

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}  # where it is not enough, rounding is measured
ROUNDING = 8  # units in the last place of the largest gradient: what less is, is rounding
Observer = Callable[[fx.Node, list[Any]], None]


class SeveralGraphs(Exception):
    """The model is not one graph, and the options allow that: `broken_model` compares it."""


@dataclass
class Outcome:
    """What one run gives, per rank.

    outputs: by place in the user's graph. gradients, and the new numbers of inputs that are written to: by place among
    the inputs.
    """

    outputs: dict[int, list[Tensor]]
    gradients: dict[int, list[Tensor | None]]
    written: dict[int, list[Tensor]]


@dataclass(frozen=True)
class Wanted:
    """One of the plain model's results, and where in an `Outcome` it is; value: None for no gradient."""

    kind: Kind
    name: str
    values: Literal["outputs", "gradients", "written"]
    place: int
    value: Tensor | None

    def of(self, outcome: Outcome) -> Sequence[Tensor | None] | None:
        """What another run gives, per rank; None if it does not compute that."""
        found: Mapping[int, Sequence[Tensor | None]] = getattr(outcome, self.values)
        return found.get(self.place)


@dataclass
class Trial:
    """One traced model with the inputs of one call, and the results it should have.

    arguments: of dp's first rank; entries: by place among them, those that are each dp rank's own.
    outputs, weights: by place among the outputs of the user's graph; gradients, written: by place among its inputs.
    replaced: those of the outputs that a buffer becomes; the others are the model's.
    given_tolerance: the user's, for all tensors. tolerance: the largest that any of them has.
    allowed: by kind and name, the absolute difference that is rounding; other tensors have `tolerance_of`.
    """

    traced: Traced
    arguments: list[Any]
    entries: dict[int, list[Tensor]]
    rng: Tensor
    outputs: dict[int, tuple[str, Tensor]] = field(default_factory=dict)
    weights: dict[int, Tensor] = field(default_factory=dict)
    gradients: dict[int, tuple[str, Tensor | None]] = field(default_factory=dict)
    written: dict[int, tuple[str, Tensor]] = field(default_factory=dict)
    replaced: frozenset[int] = frozenset()
    given_tolerance: float | None = None
    tolerance: float = 0.0
    allowed: dict[tuple[Kind, str], float] = field(default_factory=dict)

    @property
    def program(self) -> LocalProgram:
        """The program before autograd."""
        return self.traced.program

    @property
    def captured(self) -> Snapshot:
        """The graph as the user wrote it."""
        return self.program.history.snapshots[0]

    @property
    def mesh(self) -> MeshShape:
        """The mesh of the program."""
        return self.program.ctx.mesh

    def tolerance_of(self, expected: Tensor) -> float:
        """The error that a tensor may have, relative to its largest element, whatever rounding makes of it."""
        if is_exact(expected):
            return 0.0
        return TOLERANCE.get(expected.dtype.to_real(), 0.0) if self.given_tolerance is None else self.given_tolerance

    def inputs(self, rank: int, mesh: MeshShape) -> list[Any]:
        """The arguments of one rank, as new leaves."""
        degree, place = self.mesh.size("dp"), coordinates(mesh, rank).get("dp", 0)
        values = list(self.arguments)
        for i, node in enumerate(self.program.captured.graph.find_nodes(op="placeholder")):
            parts = self.entries.get(i, [values[i]] * degree)
            if mesh.size("dp") == degree:
                values[i] = parts[place]
            elif OWN in node.meta:  # on one device
                values[i] = torch.cat(parts) if isinstance(values[i], Tensor) else values[i] * degree
        return [x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in values]

    def run(self, snapshot: Snapshot, observe: Observer | None = None) -> Outcome:
        """A graph before autograd: a GLOBAL one on one device, a LOCAL one on all ranks."""
        assert snapshot.gm is not None
        mesh = self.mesh if snapshot.stage is Stage.LOCAL or _has_collectives(snapshot.gm.graph) else MeshShape(())
        everything = snapshot.name == "capture"
        places = {i: i if everything else out.index for i, out in enumerate(self.program.outputs)}
        ranks = range(mesh.world_size)
        inputs = [self.inputs(rank, mesh) for rank in ranks]
        torch.set_rng_state(self.rng)
        with torch.enable_grad(), attention_by_its_formula():
            found = Simulator(mesh).run(snapshot.gm, inputs, observe)
        outputs = {i: [found[rank][place] for rank in ranks] for i, place in places.items() if place is not None}
        dims = self.dims_split(mesh)
        roots = [(x, self._weight(i, dims[i], mesh, r)) for i in self.weights for r, x in enumerate(outputs[i])]
        if roots:
            torch.autograd.backward([x for x, _ in roots], [w for _, w in roots])
        gradients = {i: [inputs[rank][i].grad for rank in ranks] for i in self.gradients}
        written = {i: [inputs[rank][i].detach() for rank in ranks] for i in self.written}
        return Outcome({i: self.joined(i, values, dims[i], mesh) for i, values in outputs.items()}, gradients, written)

    def expect_of_one_device(self) -> bool:
        """Where attention has dropout, expect what one device gets from the same graph; whether that is so.

        The plain model draws other numbers there. Which those of the graph are, does not depend on ranks.

        Raises:
            IllegalOption: over dp, where one device has other entries than a rank.
        """
        before = self.traced.model_itself
        if before.gm is None or not _has_attention_dropout(before.gm):
            return False
        if self.entries:
            raise IllegalOption("verify over dp of attention with dropout", legal="a mesh without dp, or model.eval()")
        found = self.run(before)
        self.outputs = {i: (name, found.outputs[i][0]) for i, (name, _) in self.outputs.items() if i in found.outputs}
        self.gradients = {i: (name, found.gradients[i][0]) for i, (name, _) in self.gradients.items()}
        self.written = {i: (name, found.written[i][0]) for i, (name, _) in self.written.items()}
        return True

    def wanted(self) -> Iterator[Wanted]:
        """Everything that is compared."""
        for i, (name, output) in self.outputs.items():
            yield Wanted("new value" if i in self.replaced else "output", name, "outputs", i, output)
        for i, (name, gradient) in self.gradients.items():
            yield Wanted("gradient", name, "gradients", i, gradient)
        for i, (name, value) in self.written.items():
            yield Wanted("new value", name, "written", i, value)

    def errors(self, graph: str, outcome: Outcome) -> list[TensorError]:
        """One row per tensor."""
        top = max((largest(g) for _, g in self.gradients.values() if g is not None), default=0.0)
        rows = [self._error(graph, wanted, wanted.of(outcome), top) for wanted in self.wanted()]
        return [row for row in rows if row is not None]

    def _error(
        self, graph: str, wanted: Wanted, found: Sequence[Tensor | None] | None, top: float
    ) -> TensorError | None:
        """None where there is nothing to compare; top: the largest number in any gradient."""
        if found is None or (wanted.value is None and all(x is None for x in found)):
            return None
        like = self.arguments[wanted.place] if wanted.value is None else wanted.value
        expected = torch.zeros_like(like) if wanted.value is None else wanted.value
        is_cut = wanted.values != "outputs" and wanted.place in self.entries and wanted.value is not None
        if is_cut and len(found) == self.mesh.world_size:
            part = self.arguments[wanted.place]
            found = whole_of(
                [torch.zeros_like(part) if x is None else x for x in found], {"dp": 0}, expected.shape, self.mesh
            )
        tensors = [torch.zeros_like(expected) if x is None else x for x in found]
        if any(x.shape != expected.shape for x in tensors):
            return TensorError(graph, wanted.kind, wanted.name, math.inf, math.inf, False)
        worst, scale = max(difference(x, expected) for x in tensors), largest(expected)
        relative = worst / scale if scale else (0.0 if worst == 0 else math.inf)
        is_right = relative <= self.tolerance_of(expected)
        if wanted.values == "gradients" and expected.dtype.to_real() in TOLERANCE:
            is_right |= worst <= ROUNDING * torch.finfo(expected.dtype).eps * top
        if (wanted.kind, wanted.name) in self.allowed:
            is_right = worst <= self.allowed[wanted.kind, wanted.name]
        return TensorError(graph, wanted.kind, wanted.name, worst, relative, is_right)

    def dims_split(self, mesh: MeshShape) -> list[dict[str, int]]:
        """Of every output, the dims that the axes of `mesh` leave split."""
        axes = dict(mesh.axes)
        return [{axis: dim for axis, dim in out.dims.items() if axis in axes} for out in self.program.outputs]

    def joined(self, i: int, values: list[Tensor], dims: dict[str, int], mesh: MeshShape) -> list[Tensor]:
        """An output on all ranks, as the user gets it; dims: those that are split."""
        values = [x.detach() for x in values]
        shape, blocks = self.program.outputs[i].shape, self.program.outputs[i].blocks
        if not dims or shape is None:
            return values
        if blocks == 1:
            return whole_of(values, dims, shape, mesh)
        dim = dims["dp"]
        sizes = (*shape[:dim], blocks, shape[dim] // blocks, *shape[dim + 1 :])
        found = whole_of([x.unflatten(dim, (blocks, -1)) for x in values], {"dp": dim + 1}, sizes, mesh)
        return [x.flatten(dim, dim + 1) for x in found]

    def _weight(self, i: int, dims: dict[str, int], mesh: MeshShape, rank: int) -> Tensor:
        blocks = self.program.outputs[i].blocks
        if blocks == 1 or not dims:
            return part_of(self.weights[i], dims, mesh, rank)
        dim = dims["dp"]
        return part_of(self.weights[i].unflatten(dim, (blocks, -1)), {"dp": dim + 1}, mesh, rank).flatten(dim, dim + 1)

    def tangent(self, i: int, dims: dict[str, int], rank: int, output: Tensor) -> Tensor:
        """The gradient that reaches an output on a rank."""
        return self._weight(i, dims, self.mesh, rank) if i in self.weights else torch.zeros_like(output)


def _has_attention_dropout(gm: fx.GraphModule) -> bool:
    return any(AttentionCall.of(node).has_dropout for node in AttentionCall.all_in(gm.graph))


def trial_of(
    model: nn.Module,
    example_inputs: Inputs,
    mesh: MeshShape,
    options: Options,
    pipeline: Sequence[Pass],
    eager: Eager,
    rng: Tensor,
) -> Trial:
    """Trace the model on the entries of dp's first rank; find which of its inputs and outputs are the plain model's.

    Raises:
        SeveralGraphs: there is no such trial.
    """
    (given,), per_rank = split_batch(example_inputs, 1), split_batch(example_inputs, mesh.size("dp"))
    parts = [pytree.tree_leaves(inputs) for inputs in per_rank]
    entries = {id(own[0]): own for own in zip(*parts, strict=True) if own[0] is not own[-1]}
    whole = {id(part): id(x) for part, x in zip(parts[0], pytree.tree_leaves(given), strict=True)}
    trials: list[Trial] = []
    returned: list[Tensor] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        if model_part_of(gm) is not None:
            raise SeveralGraphs
        traced = compile_for(gm, inputs, mesh, options, pipeline, keep_texts=False)
        for node, batch in inputs_with_batch(traced.program.captured.graph).items():
            if batch.dim != 0:
                found = f"{node.name} has the batch in dim {batch.dim}; the entries of dp's ranks were cut from dim 0"
                raise BatchNotSplit(found, legal="a mesh without dp here; compiled, each rank passes its own entries")

        def run(*arguments: Any) -> list[Tensor]:
            own = {i: list(entries[id(x)]) for i, x in enumerate(arguments) if id(x) in entries}
            trial = Trial(traced, list(arguments), own, rng)
            trials.append(trial)
            found = trial.run(trial.captured).outputs
            computed = [out.index is not None for out in traced.program.outputs]
            returned.extend(found[i][0] if computed[i] else NotComputedTensor() for i in range(len(computed)))
            return returned

        return run

    known = over_whole_batch(backend, mesh.size("dp"))
    with put_back(model, per_rank[0]):
        result = named_leaves(through_dynamo(model, per_rank[0], known, options, mesh.size("dp")))
        buffers = dict(model.named_buffers())
    trial = trials[0]
    place = {id(x): i for i, x in enumerate(returned) if not isinstance(x, NotComputedTensor)}
    for name, leaf in result.items():
        expected = eager.outputs.get(name)
        if id(leaf) in place and isinstance(expected, Tensor):
            number = place[id(leaf)]
            trial.outputs.setdefault(number, (name, expected.detach()))
            if name in eager.weights:  # a tensor may be returned under two names
                earlier = trial.weights.get(number)
                trial.weights[number] = eager.weights[name] if earlier is None else eager.weights[name] + earlier
    replaced = {place[id(x)]: name for name, x in buffers.items() if id(x) in place and name in eager.replaced}
    trial.replaced = frozenset(i for i in replaced if i not in trial.outputs)
    trial.outputs |= {i: (replaced[i], eager.replaced[replaced[i]]) for i in sorted(trial.replaced)}
    _match_inputs(trial, model, eager, whole)
    return trial


def _match_inputs(trial: Trial, model: nn.Module, eager: Eager, whole: Mapping[int, int]) -> None:
    """Find which inputs of the graph are the plain model's parameters, buffers and inputs; whole: of parts, by id."""
    names = {id(x): name for name, x in (*model.named_parameters(), *model.named_buffers())}
    is_written = set(places_written(trial.program.captured.graph))
    for i, value in enumerate(trial.arguments):
        number = whole.get(id(value), id(value))
        name = names.get(number, f"input {i}")
        if number in eager.gradients:
            trial.gradients[i] = (name, eager.gradients[number])
        if number in eager.written or (i in is_written and i not in trial.entries):
            trial.written[i] = (name, eager.written.get(number, value).detach())


def places_written(graph: fx.Graph) -> list[int]:
    """Which inputs a graph writes to, by place."""
    written = {node.args[0] for node in graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)}
    return [i for i, node in enumerate(graph.find_nodes(op="placeholder")) if node in written]


def _has_collectives(graph: fx.Graph) -> bool:
    return any(axis_argument(n.target) is not None for n in graph.nodes)
