"""Runs the plain model and the graphs of its program on the same inputs, forward and backward, and compares them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import spcompile.check.attention_specs  # noqa: F401  (the simulator must know attention)
from spcompile.attention.scores.attention_call import AttentionCall
from spcompile.capture.graph_breaks import model_part_of
from spcompile.capture.retrace import OWN
from spcompile.check.simulate import InFlight, Simulator
from spcompile.check.states import needs_gradient, trainable_names
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
from spcompile.report.put_back import put_back
from spcompile.report.verify_report import TensorError, difference, is_exact, largest
from spcompile.schedule.memory import saved_values
from spcompile.sharding.batch_entries import inputs_with_batch

Observer = Callable[[fx.Node, list[Any]], None]


class SeveralGraphs(Exception):
    """The model is not one graph, and the options allow that: `broken_model` compares it."""


@dataclass
class Eager:
    """The plain model's results. outputs: by name; weights: what each differentiated output is multiplied with."""

    outputs: dict[str, Any]
    weights: dict[str, Tensor]
    gradients: dict[int, Tensor | None]  # by id of the parameter or input


@dataclass
class Outcome:
    """Outputs and gradients of one run, per rank. outputs: by place in the user's graph."""

    outputs: dict[int, list[Tensor]]
    gradients: dict[int, list[Tensor | None]]  # by place among the inputs


@dataclass
class Trial:
    """One traced model with the inputs of one call, and the results it should have.

    arguments: of dp's first rank; rows: by place among them, those that are each dp rank's own.
    outputs, weights: by place among the outputs of the user's graph; gradients: by place among its inputs.
    sources: of gradients, the id of the plain model's parameter or input.
    allowed: by kind and name, the absolute difference that is rounding; other tensors have `tolerance`, `rounding`.
    """

    traced: Traced
    arguments: list[Any]
    rows: dict[int, list[Tensor]]
    rng: Tensor
    outputs: dict[int, tuple[str, Tensor]] = field(default_factory=dict)
    weights: dict[int, Tensor] = field(default_factory=dict)
    gradients: dict[int, tuple[str, Tensor | None]] = field(default_factory=dict)
    sources: dict[int, int] = field(default_factory=dict)
    tolerance: float = 0.0
    rounding: float = 0.0
    allowed: dict[tuple[str, str], float] = field(default_factory=dict)

    @property
    def program(self) -> LocalProgram:
        """The program before autograd."""
        return self.traced.program

    @property
    def mesh(self) -> MeshShape:
        """The mesh of the program."""
        return self.program.ctx.mesh

    def inputs(self, rank: int, mesh: MeshShape) -> list[Any]:
        """The arguments of one rank, as new leaves."""
        degree, row = self.mesh.size("dp"), coordinates(mesh, rank).get("dp", 0)
        values = list(self.arguments)
        for i, node in enumerate(self.program.captured.graph.find_nodes(op="placeholder")):
            parts = self.rows.get(i, [values[i]] * degree)
            if mesh.size("dp") == degree:
                values[i] = parts[row]
            elif OWN in node.meta:  # on one device
                values[i] = torch.cat(parts) if isinstance(values[i], Tensor) else values[i] * degree
        return [x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in values]

    def run(self, snapshot: Snapshot, observe: Observer | None = None) -> Outcome:
        """A graph before autograd: a GLOBAL one on one device, a LOCAL one on all ranks."""
        assert snapshot.gm is not None
        mesh = self.mesh if snapshot.stage is Stage.LOCAL or _communicates(snapshot.gm.graph) else MeshShape(())
        everything = snapshot.name == "capture"
        places = {i: i if everything else out.index for i, out in enumerate(self.program.outputs)}
        ranks = range(mesh.world_size)
        inputs = [self.inputs(rank, mesh) for rank in ranks]
        torch.set_rng_state(self.rng)
        with torch.enable_grad():
            found = Simulator(mesh).run(snapshot.gm, inputs, observe)
        outputs = {i: [found[rank][place] for rank in ranks] for i, place in places.items() if place is not None}
        dims = self._dims(mesh)
        roots = [(x, self._weight(i, dims[i], mesh, r)) for i in self.weights for r, x in enumerate(outputs[i])]
        if roots:
            torch.autograd.backward([x for x, _ in roots], [w for _, w in roots])
        gradients = {i: [inputs[rank][i].grad for rank in ranks] for i in self.gradients}
        return Outcome({i: self._whole(i, values, dims[i], mesh) for i, values in outputs.items()}, gradients)

    def run_final(self, graphs: Mapping[str, fx.GraphModule], in_flight: InFlight = "poison") -> Outcome | str:
        """The forward and the backward graph, or the graph for inference; text if they have another form."""
        mesh, program = self.mesh, self.program
        ranks = range(mesh.world_size)
        forward = graphs.get("forward") or graphs["inference"]
        computed = [i for i, out in enumerate(program.outputs) if out.index is not None]
        saved = saved_values(forward.graph, graphs["backward"].graph) if "backward" in graphs else []
        constants = [*program.gm.parameters(), *program.gm.buffers()]  # autograd makes them the first inputs
        torch.set_rng_state(self.rng)
        with torch.no_grad():
            inputs = [[*constants, *self.inputs(rank, mesh)] for rank in ranks]
            found = Simulator(mesh, in_flight).run(forward, inputs)
            updated = (
                len(found[0]) - len(computed) - len(saved)
            )  # inputs that the model writes to: new values come first
            if not 0 <= updated <= _written(program.captured.graph):
                return "final graphs not run: they return more than outputs and saved values"
            found = [values[updated:] for values in found]
            outputs = {i: [found[rank][at] for rank in ranks] for at, i in enumerate(computed)}
            dims = self._dims(mesh)
            whole = {i: self._whole(i, values, dims[i], mesh) for i, values in outputs.items()}
            if "backward" not in graphs:
                return Outcome(whole, {})
            kept = _in_order_of_backward(saved, [list(values[len(computed) :]) for values in found])
            places = [n for n in graphs["backward"].graph.nodes if n.op == "placeholder"][len(saved) :]
            gradient = needs_gradient(program.gm.graph, trainable_names(program.gm.graph))
            tangents = [i for i in computed if _value_of(program, i) in gradient]
            if len(places) != len(tangents):
                return "final graphs not run: backward takes something else than the gradients of the outputs"
            given = [[self._tangent(i, dims[i], rank, outputs[i][rank]) for i in tangents] for rank in ranks]
            grads = Simulator(mesh, in_flight).run(graphs["backward"], [[*kept[r], *given[r]] for r in ranks])
        if len(grads[0]) != len(constants) + len(self.arguments):
            return "final graphs not compared: backward does not return one gradient for each input"
        return Outcome(whole, {i: [grads[rank][len(constants) + i] for rank in ranks] for i in self.gradients})

    def expect_of_one_device(self) -> bool:
        """Where attention has dropout, expect what one device gets from the same graph; whether that is so.

        The plain model draws other numbers there. Which those of the graph are, does not depend on ranks.

        Raises:
            IllegalOption: over dp, where one device has other rows than a rank.
        """
        before = self.traced.model_itself
        if before.gm is None or not _has_attention_dropout(before.gm):
            return False
        if self.rows:
            raise IllegalOption("verify over dp of attention with dropout", legal="a mesh without dp, or model.eval()")
        found = self.run(before)
        self.outputs = {i: (name, found.outputs[i][0]) for i, (name, _) in self.outputs.items() if i in found.outputs}
        self.gradients = {i: (name, found.gradients[i][0]) for i, (name, _) in self.gradients.items()}
        return True

    def errors(self, graph: str, outcome: Outcome) -> list[TensorError]:
        """One row per tensor."""
        rows = []
        for i, (name, expected) in self.outputs.items():
            if i in outcome.outputs:
                rows.append(self._error(graph, "output", name, outcome.outputs[i], expected, 0.0))
        top = max((largest(g) for _, g in self.gradients.values() if g is not None), default=0.0)
        for i, (name, gradient) in self.gradients.items():
            if i in outcome.gradients and not (gradient is None and all(g is None for g in outcome.gradients[i])):
                like = self.arguments[i]
                wanted = gradient if gradient is not None else torch.zeros_like(like)
                found = [torch.zeros_like(like) if g is None else g for g in outcome.gradients[i]]
                if i in self.rows and gradient is not None and len(found) == self.mesh.world_size:
                    found = whole_of(found, {"dp": 0}, wanted.shape, self.mesh)
                rows.append(self._error(graph, "gradient", name, found, wanted, self.rounding * top))
        return rows

    def _error(
        self, graph: str, kind: str, name: str, found: Sequence[Tensor], expected: Tensor, rounding: float
    ) -> TensorError:
        if any(x.shape != expected.shape for x in found):
            return TensorError(graph, kind, name, float("inf"), float("inf"), False)
        worst, scale = max(difference(x, expected) for x in found), largest(expected)
        relative = worst / scale if scale else (0.0 if worst == 0 else float("inf"))
        if (kind, name) in self.allowed:
            return TensorError(graph, kind, name, worst, relative, worst <= self.allowed[kind, name])
        tolerance = self.tolerance if not is_exact(expected) else 0.0
        return TensorError(graph, kind, name, worst, relative, relative <= tolerance or worst <= rounding)

    def _dims(self, mesh: MeshShape) -> list[dict[str, int]]:
        """Of every output, the dims that the axes of `mesh` leave split."""
        axes = dict(mesh.axes)
        return [{axis: dim for axis, dim in out.dims.items() if axis in axes} for out in self.program.outputs]

    def _whole(self, i: int, values: list[Tensor], dims: dict[str, int], mesh: MeshShape) -> list[Tensor]:
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

    def _tangent(self, i: int, dims: dict[str, int], rank: int, output: Tensor) -> Tensor:
        return self._weight(i, dims, self.mesh, rank) if i in self.weights else torch.zeros_like(output)


def _has_attention_dropout(gm: fx.GraphModule) -> bool:
    return any(AttentionCall.of(node).has_dropout for node in AttentionCall.all_in(gm.graph))


def run_eager(model: nn.Module, example_inputs: Inputs, options: Options) -> Eager:
    """The plain model, forward and backward; its buffers, and inputs that it writes to, are put back."""
    args = () if isinstance(example_inputs, Mapping) else tuple(example_inputs)
    kwargs = dict(example_inputs) if isinstance(example_inputs, Mapping) else {}
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    before = [(x, x.detach().clone()) for x in (*model.buffers(), *tensors)]
    with put_back(model):
        outputs = named_leaves(model(*args, **kwargs))
    weights = _weights(outputs, options)
    leaves = [*model.parameters(), *tensors]
    wanted = [x for x in leaves if x.requires_grad and x.is_leaf]
    grads: Sequence[Tensor | None] = [None] * len(wanted)
    if weights and wanted:
        roots = [outputs[name] for name in weights]
        grads = torch.autograd.grad(roots, wanted, list(weights.values()), allow_unused=True)
    changed = [(x, old) for x, old in before if not torch.equal(x, old)]
    if changed:  # outputs may be views of them
        outputs = {name: x.detach().clone() if isinstance(x, Tensor) else x for name, x in outputs.items()}
    for x, old in changed:
        x.data.copy_(old)
    return Eager(outputs, weights, {id(x): g for x, g in zip(wanted, grads, strict=True)})


def named_leaves(result: Any) -> dict[str, Any]:
    """The leaves of a model's result by path; by number where a container was registered without names of its parts."""
    try:
        paths, _ = pytree.tree_flatten_with_path(result)
    except ValueError:
        return {f"output {i}": leaf for i, leaf in enumerate(pytree.tree_leaves(result))}
    return {pytree.keystr(path).strip("[]'.") or "output": leaf for path, leaf in paths}


def _weights(outputs: Mapping[str, Any], options: Options) -> dict[str, Tensor]:
    """1 for the loss, the first differentiable scalar; without one, random numbers for every output."""
    floating = {n: x for n, x in outputs.items() if isinstance(x, Tensor) and x.is_floating_point() and x.requires_grad}
    loss = next((name for name, x in floating.items() if x.ndim == 0), None)
    if loss is not None:
        return {loss: torch.ones_like(floating[loss])}
    if options.outputs == "loss":
        raise IllegalOption('outputs="loss" for a model that returns no loss', legal='outputs="full" or "sharded"')
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device) for n, x in floating.items()}


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
    rows = {id(own[0]): own for own in zip(*parts, strict=True) if own[0] is not own[-1]}
    whole = {id(part): id(x) for part, x in zip(parts[0], pytree.tree_leaves(given), strict=True)}
    trials: list[Trial] = []
    returned: list[Tensor] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        if model_part_of(gm) is not None:
            raise SeveralGraphs
        traced = compile_for(gm, inputs, mesh, options, pipeline, keep_texts=False)
        captured = traced.program.history.snapshots[0]
        for node, batch in inputs_with_batch(traced.program.captured.graph).items():
            if batch.dim != 0:
                found = f"{node.name} has the batch in dim {batch.dim}; the entries of dp's ranks were cut from dim 0"
                raise BatchNotSplit(found, legal="a mesh without dp here; compiled, each rank passes its own rows")

        def run(*arguments: Any) -> list[Tensor]:
            own = {i: list(rows[id(x)]) for i, x in enumerate(arguments) if id(x) in rows}
            trial = Trial(traced, list(arguments), own, rng)
            trials.append(trial)
            found = trial.run(captured).outputs
            computed = [out.index is not None for out in traced.program.outputs]
            returned.extend(found[i][0] if computed[i] else NotComputedTensor() for i in range(len(computed)))
            return returned

        return run

    known = over_whole_batch(backend, mesh.size("dp"))
    with put_back(model):
        result = named_leaves(through_dynamo(model, per_rank[0], known, options, mesh.size("dp")))
    trial = trials[0]
    place = {id(x): i for i, x in enumerate(returned)}
    for name, leaf in result.items():
        expected = eager.outputs.get(name)
        if id(leaf) in place and isinstance(expected, Tensor) and not isinstance(leaf, NotComputedTensor):
            trial.outputs[place[id(leaf)]] = (name, expected.detach())
            if name in eager.weights:
                trial.weights[place[id(leaf)]] = eager.weights[name]
    names = {id(p): name for name, p in model.named_parameters()}
    for i, value in enumerate(trial.arguments):
        number = whole.get(id(value), id(value))
        if number in eager.gradients:
            trial.gradients[i] = (names.get(number, f"input {i}"), eager.gradients[number])
            trial.sources[i] = number
    return trial


def _written(graph: fx.Graph) -> int:
    """How many inputs a graph writes to."""
    return len({node.args[0] for node in graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)})


def _communicates(graph: fx.Graph) -> bool:
    return any(axis_argument(n.target) is not None for n in graph.nodes)


def _in_order_of_backward(saved: Sequence[fx.Node], values: list[list[Any]]) -> list[list[Any]]:
    """Forward returns saved tensors, then saved sizes; backward takes sizes first."""
    order = sorted(range(len(saved)), key=lambda at: isinstance(saved[at].meta.get("val"), Tensor))
    return [[rank[at] for at in order] for rank in values]


def _value_of(program: LocalProgram, i: int) -> Any:
    """The node behind an output of the user's graph that is computed."""
    (output,) = program.gm.graph.find_nodes(op="output")
    return output.args[0][program.outputs[i].index]
