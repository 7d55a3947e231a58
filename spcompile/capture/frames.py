"""Traces the frame that Dynamo is compiling once more, with other tensors for some of its arguments.

What the model computes from their sizes, and each branch that it takes on one, is then as it would be with those.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.fx as fx
from torch import Tensor
from torch.utils import _pytree as pytree

from spcompile.graph.edit import copy_graph
from spcompile.torch_private import InstructionTranslator, TracingContext, under_function_modes

# Names that Dynamo makes anew for each trace.
_NUMBERED = re.compile(r"(__builtins_dict__|'_\d+_c|___unnamed_scope_\d+_c)_?\d+")


@dataclass
class Frame:
    """One trace of a frame. guards: the names of everything that Dynamo will check of its arguments."""

    gm: fx.GraphModule
    guards: set[str]

    def sources(self) -> list[str]:
        """Where each placeholder comes from, by name."""
        return [name_of(node.meta["grapharg"].source) for node in self.gm.graph.find_nodes(op="placeholder")]


class _LeaveDynamo(BaseException):
    """Leaves Dynamo when it has the graph, before anything runs. Not an Exception: nobody may catch it."""


def name_of(source: Any) -> str:
    """A source's name, which was a method before torch 2.12."""
    name = source.name
    return name() if callable(name) else name


def local_of(source: Any) -> str | None:
    """The argument that a source is read from; None for globals and what a closure holds."""
    while hasattr(source, "base"):
        source = source.base
    return source.local_name if getattr(source, "is_input", False) else None


def this_frame(gm: fx.GraphModule) -> Frame:
    """The frame that Dynamo compiles now, of which a backend has got the graph."""
    guards = TracingContext.get().guards_context.dynamo_guards
    return Frame(gm, {_NUMBERED.sub(r"\1", guard.name) for guard in guards})


def traced_again(instead: Mapping[Tensor, Tensor], arguments: set[str], numbers: Iterable[str]) -> Frame:
    """The frame that Dynamo compiles now, with other tensors, which may be anywhere inside of some `arguments`.

    Containers and objects that hold them are copied. numbers: the sources of those that get symbols.

    Raises:
        Exception: whatever Dynamo, or the model, says to such arguments.
    """
    frame = InstructionTranslator.current_tx()
    memo: dict[int, Any] = {id(x): x for x in TracingContext.get().tensor_to_context}
    memo |= {id(x): new for x, new in instead.items()}
    replaced = {id(x) for x in instead}

    def holds(value: Any) -> bool:  # one tensor may be passed twice, of which Dynamo tells one place
        return any(id(x) in replaced for x in pytree.tree_leaves(value))

    given = {k: copy.deepcopy(v, memo) if k in arguments or holds(v) else v for k, v in frame.f_locals.items()}
    found: list[Frame] = []

    def keep(gm: fx.GraphModule, inputs: Sequence[Any]) -> NoReturn:
        found.append(this_frame(fx.GraphModule(gm, copy_graph(gm.graph))))  # Dynamo forgets where inputs come from
        raise _LeaveDynamo

    # New code, so that what is compiled for it is not found for the frame itself.
    function = types.FunctionType(frame.f_code.replace(), frame.f_globals, closure=frame.closure)
    again = torch.compile(function, backend=keep, fullgraph=True, dynamic=False)
    symbols = ",".join(map(re.escape, numbers))
    compiler_config: Any = torch.compiler.config
    with compiler_config.patch(dynamic_sources=symbols), under_function_modes(), contextlib.suppress(_LeaveDynamo):
        bound = inspect.BoundArguments(inspect.signature(function), given)
        again(*bound.args, **bound.kwargs)
    return found[0]
