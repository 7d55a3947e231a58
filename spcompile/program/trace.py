"""Takes a model through Dynamo without process groups: for `explain`, which computes nothing, and for `verify`."""

from __future__ import annotations

import contextlib
import itertools
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx as fx
from torch import nn

from spcompile.capture.dynamo_settings import as_in_one_graph, ignore_library_logging
from spcompile.capture.local_inputs import over_local_parts
from spcompile.capture.python_floats import without_symbolic_floats
from spcompile.capture.retrace import refuse_graph_break
from spcompile.diagnostics import CaptureFailed, GraphBreak, IllegalMesh
from spcompile.graph.edit import copy_graph
from spcompile.machine.mesh import MeshShape
from spcompile.options import Options
from spcompile.passes_api import Pass
from spcompile.program.build import LocalProgram, build
from spcompile.program.emit import Emission, emit
from spcompile.program.pipeline import History, Snapshot
from spcompile.torch_private import RestartAnalysis

Backend = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any] | None]
Inputs = Mapping[str, Any] | Sequence[Any]


class _Stop(BaseException):
    """Leaves the model at its first compiled call. Not an Exception: the model's own handlers must not catch it."""


@dataclass
class Traced:
    """A model compiled for one mesh, with nothing bound to processes.

    sharded: the graphs of one rank.
    serial: the passes before the first that is about an axis: behind them the graph is still the model itself.
    """

    program: LocalProgram
    sharded: Emission
    serial: frozenset[str]

    @property
    def model_itself(self) -> Snapshot:
        """The last graph that is about no axis yet."""
        return [s for s in self.program.history.snapshots if s.name in (*self.serial, "capture")][-1]


def mesh_shape(mesh: Any) -> MeshShape:
    """From `{"cp": 8}` or a DeviceMesh.

    Raises:
        IllegalMesh: unknown axes, a mesh without names, or something else.
    """
    if isinstance(mesh, Mapping):
        return MeshShape.of(mesh)
    if getattr(mesh, "mesh_dim_names", None) is not None:
        return MeshShape.of(dict(zip(mesh.mesh_dim_names, mesh.mesh.shape, strict=True)))
    raise IllegalMesh(f"mesh={mesh!r}", legal='a dict of axis sizes as {"cp": 8}, or a DeviceMesh with axis names')


def through_dynamo(model: nn.Module, example_inputs: Inputs, backend: Backend) -> Any:
    """Call the model once, compiled by `backend`; None if `backend` returns None instead of a callable.

    Compiles a fresh function around the model, so that what the user compiled or will compile is not touched.

    Raises:
        GraphBreak: the model is not one graph.
        CaptureFailed: nothing of the model was traced.
        Exception: whatever `backend` raised, unwrapped.
    """
    ignore_library_logging()
    failures: list[Exception] = []
    graphs: list[fx.GraphModule] = []

    def once(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        run = None
        try:
            without_symbolic_floats(gm)
            refuse_graph_break(gm)
            if graphs:
                raise GraphBreak("Dynamo made a second graph of it", legal="a model that traces with fullgraph=True")
            run = backend(gm, inputs)
        except RestartAnalysis:
            raise  # not a failure: Dynamo traces once more, with a number that it took for a symbol
        except Exception as error:
            failures.append(error)
        graphs.append(gm)
        return run or _stop

    args = () if isinstance(example_inputs, Mapping) else tuple(example_inputs)
    kwargs = dict(example_inputs) if isinstance(example_inputs, Mapping) else {}
    entry = types.FunctionType(_entry.__code__.replace(), globals())
    result = None
    # Sizes seen in an earlier call of this function must not make those of this call symbols.
    with as_in_one_graph(), torch._dynamo.config.patch(automatic_dynamic_shapes=False), contextlib.suppress(_Stop):
        result = torch.compile(entry, backend=once)(model, args, kwargs)
    if failures:
        raise failures[0]
    if not graphs:
        raise CaptureFailed(f"Dynamo found nothing to compile in {type(model).__name__}", legal="a model that computes")
    return result


def _entry(self: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return self(*args, **kwargs)


def _stop(*_: Any) -> Any:
    raise _Stop


def compile_for(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    mesh: MeshShape,
    options: Options,
    pipeline: Sequence[Pass],
    *,
    keep_texts: bool = True,
) -> Traced:
    """All stages on a Dynamo graph, inside a Dynamo backend; forward and backward are both made at once.

    keep_texts: of the graphs after each pass; the graphs themselves are kept in any case.
    """
    gm, inputs = over_local_parts(gm, inputs)
    serial = frozenset(p.name for p in itertools.takewhile(lambda p: p.axis is None, pipeline))
    if mesh.world_size == 1:
        pipeline = [p for p in pipeline if p.name in serial]
        options = replace(options, passes={name: wish for name, wish in options.passes.items() if name in serial})
    program = build(gm, inputs, mesh, options, pipeline, History(keep_graphs=True, keep_texts=keep_texts))
    if mesh.world_size == 1:
        program.ctx.remarks.add("SPR401", "one rank: nothing is sharded", strict_error=False)
    return Traced(program, emitted(program), serial)


def on_one_device(traced: Traced) -> Emission:
    """The final graphs of one device, with the same attention ops and the same partitioner.

    They are made of the program before anything in it was about several devices. Call it where `compile_for` is called.
    """
    before, program = traced.model_itself.gm, traced.program
    assert before is not None
    gm = fx.GraphModule(before, copy_graph(before.graph))
    ctx = replace(program.ctx, mesh=MeshShape(()))
    return emitted(
        replace(program, gm=gm, inputs=program.all_inputs, ctx=ctx, history=History(keep_texts=False), schedule=[])
    )


def emitted(program: LocalProgram) -> Emission:
    """The final graphs of a program, not bound to processes; forward and backward are both made at once."""
    emission = Emission(program, bind=lambda graph: None)
    with torch._functorch.config.patch(force_non_lazy_backward_lowering=True):
        emit(emission, "eager")
    return emission
