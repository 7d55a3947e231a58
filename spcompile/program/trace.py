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
from torch._subclasses import FakeTensor

from spcompile.capture.dynamo_settings import as_in_one_graph, ignore_library_logging
from spcompile.capture.graph_breaks import ModelPart, counted, mark_part, model_call, model_part_of, options_of_part
from spcompile.capture.local_inputs import over_local_parts
from spcompile.capture.python_floats import without_symbolic_floats
from spcompile.capture.retrace import capture
from spcompile.diagnostics import CaptureFailed, GraphBreak, IllegalMesh
from spcompile.graph.edit import copy_graph
from spcompile.machine.mesh import LEGAL_MESH, MeshShape
from spcompile.memory.planner import Wish
from spcompile.options import Options
from spcompile.passes_api import Pass
from spcompile.program.build import LocalProgram, build_captured
from spcompile.program.collection import rare_collection
from spcompile.program.emit import Emission, emit_nothing
from spcompile.program.pipeline import History, Snapshot
from spcompile.program.progress import begins
from spcompile.torch_private import RestartAnalysis

Backend = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any] | None]
Inputs = Mapping[str, Any] | Sequence[Any]
_NO_LIMIT = 1 << 20  # of programs of one function


class _LeaveModel(BaseException):
    """Leaves Dynamo when all graphs are known. Not an Exception: the model's own handlers must not catch it."""


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
    raise IllegalMesh(f"mesh={mesh!r}", legal=LEGAL_MESH)


def through_dynamo(
    model: nn.Module, example_inputs: Inputs, backend: Backend, options: Options | None = None, dp: int = 1
) -> Any:
    """Call the model once, compiled by `backend`; None if `backend` returns None instead of a callable.

    Compiles a fresh function around the model, so that what the user compiled or will compile is not touched. Of a
    model that breaks, where `options` allow that, `backend` gets each graph; those that it returns None for compute,
    all but the last, as what is behind them may read values.

    Raises:
        GraphBreak: the model is not one graph, or the inputs have no values and the model reads some between two.
        CaptureFailed: nothing of the model was traced.
        Exception: whatever `backend` raised, unwrapped.
    """
    begins("tracing the model")
    ignore_library_logging()
    chosen = options or Options()
    failures: list[Exception] = []
    parts: list[ModelPart | None] = []

    def once(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        run = None
        try:
            without_symbolic_floats(gm)
            mark_part(gm, chosen, dp)
            part = model_part_of(gm)
            run = backend(gm, inputs)
            if run is None and part is not None and not part.returns:
                run = fx.GraphModule(gm, copy_graph(gm.graph)).forward
            parts.append(part)
        except RestartAnalysis:
            raise  # not a failure: Dynamo traces once more, with a number that it took for a symbol
        except Exception as error:
            failures.append(error)
        if run is None:
            raise _LeaveModel  # before Dynamo writes the guards of a program that nobody calls
        return counted(run)

    args = () if isinstance(example_inputs, Mapping) else tuple(example_inputs)
    kwargs = dict(example_inputs) if isinstance(example_inputs, Mapping) else {}
    entry = types.FunctionType(_entry.__code__.replace(), globals())
    result = None
    # Sizes seen in an earlier call must not make those of this call symbols. Of a model that breaks, what earlier calls
    # have compiled of its functions counts: behind a limit they would run as plain code.
    settings = torch._dynamo.config.patch(
        automatic_dynamic_shapes=False, recompile_limit=_NO_LIMIT, accumulated_recompile_limit=_NO_LIMIT
    )
    with rare_collection(), model_call(), as_in_one_graph(), settings, contextlib.suppress(_LeaveModel):
        try:
            result = torch.compile(entry, backend=once)(model, args, kwargs)
        except Exception as error:
            part = parts[-1] if parts else None
            if part is None or not _without_values(model, example_inputs):
                raise
            found = f"what is behind a break cannot be known without values ({type(error).__name__}). {part.reason}"
            raise GraphBreak(found, where=part.where, legal="real weights and inputs, or one graph") from error
    if failures:
        raise failures[0]
    if not parts:
        raise CaptureFailed(f"Dynamo found nothing to compile in {type(model).__name__}", legal="a model that computes")
    return result


def _without_values(model: nn.Module, example_inputs: Inputs) -> bool:
    tensors = [*model.parameters(), *torch.utils._pytree.tree_leaves(example_inputs)]
    return any(isinstance(x, FakeTensor) or (isinstance(x, torch.Tensor) and x.is_meta) for x in tensors)


def _entry(self: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return self(*args, **kwargs)


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
    begins("reading the graph")
    gm, inputs = over_local_parts(gm, inputs)
    options = options_of_part(gm, options)
    options.require_factors(mesh.size("cp"))
    return compile_captured(
        capture(gm, inputs), inputs, mesh, options, pipeline, keep_texts=keep_texts, part=model_part_of(gm)
    )


def compile_captured(
    captured: fx.GraphModule,
    inputs: Sequence[Any],
    mesh: MeshShape,
    options: Options,
    pipeline: Sequence[Pass],
    *,
    keep_texts: bool = True,
    part: ModelPart | None = None,
) -> Traced:
    """All stages on a captured graph, as compile_for. part: of a broken model."""
    serial = frozenset(p.name for p in itertools.takewhile(lambda p: p.axis is None, pipeline))
    if mesh.world_size == 1:
        pipeline = [p for p in pipeline if p.name in serial]
        options = replace(options, passes={name: wish for name, wish in options.passes.items() if name in serial})
    history = History(keep_graphs=True, keep_texts=keep_texts)
    program = build_captured(captured, inputs, mesh, options, pipeline, history, part)
    if mesh.world_size == 1:
        program.ctx.remarks.add("SPR401", "one rank: nothing is sharded", strict_error=False)
    return Traced(program, emitted(program, Wish.of(options, mesh.world_size)), serial)


def emitted(program: LocalProgram, wish: Wish | None = None) -> Emission:
    """The final graphs of a program, not bound to processes; forward and backward are both made at once."""
    emission = Emission(program, bind=lambda graph: None, wish=wish or Wish())
    begins("forward and backward of one rank")
    emit_nothing(emission)
    return emission
