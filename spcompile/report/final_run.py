"""Runs the final forward and backward graphs of a program, those behind autograd, for all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from spcompile.check.simulate import InFlight, Simulator
from spcompile.check.states import needs_gradient, trainable_names
from spcompile.graph.storage import saved_values
from spcompile.program.build import LocalProgram
from spcompile.report.trial import Outcome, Trial, places_written

NOT_RUN = "final graphs not run: "
OTHER_RESULTS = NOT_RUN + "they return something else than new values, outputs and saved values"
OTHER_TANGENTS = NOT_RUN + "backward takes something else than the gradients of new values and outputs"
OTHER_GRADIENTS = "final graphs not compared: backward does not return one gradient for each input"


def run_final(trial: Trial, graphs: Mapping[str, fx.GraphModule], in_flight: InFlight = "poison") -> Outcome | str:
    """The forward and the backward graph, or the graph for inference; text if they have another form."""
    program = trial.program
    forward = graphs.get("forward") or graphs["inference"]
    saved = saved_values(forward.graph, graphs["backward"].graph) if "backward" in graphs else []
    constants = [*program.gm.parameters(), *program.gm.buffers()]  # autograd makes them the first inputs
    torch.set_rng_state(trial.rng)
    with torch.no_grad():
        inputs = [trial.inputs(rank, trial.mesh) for rank in range(trial.mesh.world_size)]
        tokens = _effect_tokens(forward.graph)
        found = Simulator(trial.mesh, in_flight).run(forward, [[*tokens, *constants, *own] for own in inputs])
        found = [values[len(tokens) :] for values in found]
        renewed = _returned_by(program.captured.graph, forward.graph, len(tokens) + len(constants))
        computed = [i for i, out in enumerate(program.outputs) if out.index is not None]
        if len(found[0]) != len(renewed) + len(computed) + len(saved):
            return OTHER_RESULTS
        for own, values in zip(inputs, found, strict=True):
            for i, value in zip(renewed, values, strict=False):
                own[i] = value
        written = {i: [own[i] for own in inputs] for i in trial.written}
        results = [values[len(renewed) :] for values in found]
        outputs = {i: [values[at] for values in results] for at, i in enumerate(computed)}
        dims = trial.dims_split(trial.mesh)
        whole = {i: trial.joined(i, values, dims[i], trial.mesh) for i, values in outputs.items()}
        if "backward" not in graphs:
            return Outcome(whole, {}, written)
        kept = _in_order_of_backward(saved, [list(values[len(computed) :]) for values in results])
        backward = graphs["backward"]
        tangents = _tangents(trial, renewed, inputs, outputs)
        if len(backward.graph.find_nodes(op="placeholder")) != len(saved) + len(tangents[0]):
            return OTHER_TANGENTS
        given = [[*own, *arriving] for own, arriving in zip(kept, tangents, strict=True)]
        grads = Simulator(trial.mesh, in_flight).run(backward, given)
    if len(grads[0]) != len(constants) + len(trial.arguments):
        return OTHER_GRADIENTS
    return Outcome(whole, {i: [own[len(constants) + i] for own in grads] for i in trial.gradients}, written)


def _effect_tokens(graph: fx.Graph) -> list[Tensor]:
    """What autograd puts in front of all inputs, and returns in front of all results, for ops that check."""
    given = {node for node in graph.nodes if node.op == "placeholder"}
    calls = [node for node in graph.nodes if str(node.target) == "with_effects"]
    return [torch.empty(0) for node in calls if node.args[0] in given]


def _returned_by(captured: fx.Graph, forward: fx.Graph, constants: int) -> list[int]:
    """Of the inputs that a model writes to those whose new numbers come first among the results, by place.

    Others are written to in the graph. constants: how many inputs the forward has in front of the model's.
    """
    in_place = places_written(forward)
    return [i for i in places_written(captured) if constants + i not in in_place]


def _tangents(
    trial: Trial, renewed: Sequence[int], inputs: Sequence[Sequence[Any]], outputs: Mapping[int, Sequence[Tensor]]
) -> list[list[Tensor]]:
    """What the backward is given on each rank: of parameters with new numbers, which nobody reads later, then of
    outputs.
    """
    program, dims = trial.program, trial.dims_split(trial.mesh)
    trainable = trainable_names(program.captured.graph)
    placeholders = program.captured.graph.find_nodes(op="placeholder")
    of_new = [i for i in renewed if placeholders[i].name in trainable]
    gradient = needs_gradient(program.gm.graph, trainable_names(program.gm.graph))
    of_outputs = [i for i in outputs if _value_of(program, i) in gradient]
    return [
        [torch.zeros_like(own[i]) for i in of_new]
        + [trial.tangent(i, dims[i], rank, outputs[i][rank]) for i in of_outputs]
        for rank, own in enumerate(inputs)
    ]


def _in_order_of_backward(saved: Sequence[fx.Node], values: list[list[Any]]) -> list[list[Any]]:
    """Forward returns saved tensors, then saved sizes; backward takes sizes first."""
    order = sorted(range(len(saved)), key=lambda at: isinstance(saved[at].meta.get("val"), Tensor))
    return [[rank[at] for at in order] for rank in values]


def _value_of(program: LocalProgram, i: int) -> Any:
    """The node behind an output of the user's graph that is computed."""
    (output,) = program.gm.graph.find_nodes(op="output")
    return output.args[0][program.outputs[i].index]
