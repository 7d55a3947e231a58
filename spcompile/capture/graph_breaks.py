"""Models that Dynamo makes several graphs of: where they break, and why.

Dynamo ends a graph at what it cannot trace and goes on behind it, in a function of its own. Where it cannot go on, as
in a loop, it leaves the whole frame to Python and compiles what that calls. Each graph means the same with whole inputs
and whole outputs, so each can be sharded on its own; what crosses between two is whole on every rank of cp and tp.
"""

from __future__ import annotations

import contextlib
import inspect
import linecache
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
import torch.fx as fx
from torch import Tensor

from spcompile.capture.call_frames import TORCH_FOLDER, calls_above
from spcompile.diagnostics import GraphBreak, SourceLine, is_own_file
from spcompile.graph.sizes import numel_hint
from spcompile.options import Options
from spcompile.torch_private import RESUMED, traced_frame, under_function_modes

PART = "part"  # meta of the output of a Dynamo graph: which part of a broken model the graph is
_LEGAL = 'a model that traces with fullgraph=True, or on_graph_break="gather": each graph is then sharded on its own'


@dataclass(frozen=True)
class ModelPart:
    """One graph of a model that is not one graph.

    reason: why it ends where it does, or is called from Python, in Dynamo's words. where: the user's line.
    starts, returns: whether it takes what the model is called with, and gives what the model returns.
    """

    reason: str
    where: SourceLine | None
    starts: bool
    returns: bool

    def text(self, graph: fx.Graph) -> str:
        """What crosses the borders of this part, whose graph has been captured."""
        ends = []
        if not self.starts:
            ends.append(f"{_size_text(graph.find_nodes(op='placeholder'))} come in whole")
        if not self.returns:
            (output,) = graph.find_nodes(op="output")
            ends.append(f"{_size_text(output.args[0])} leave whole")
        return f"a part of a model that is not one graph, sharded on its own: {', '.join(ends)}. {self.reason}"


class ModelCall(threading.local):
    """The call of a compiled model that is running in this thread. graphs: how many have run in it so far."""

    graphs = 0


_CALL = ModelCall()


@contextlib.contextmanager
def model_call() -> Iterator[None]:
    """Around a call of a compiled model."""
    before, _CALL.graphs = _CALL.graphs, 0
    try:
        yield
    finally:
        _CALL.graphs = before


def counted(run: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled graph that counts in the call of its model."""

    def call(*args: Any) -> Any:
        _CALL.graphs += 1
        return run(*args)

    return call


def _find_part(gm: fx.GraphModule) -> ModelPart | None:
    """Which part of a model Dynamo has made this graph of, inside of a backend; None for all of it."""
    reason = graph_break_of(gm)
    frame, above = traced_frame(), calls_above()
    code = frame and frame.f_code
    behind = code is not None and code.co_name.startswith(RESUMED)
    outer = [frame for frame in above if not is_own_file(frame.f_code.co_filename) and not _same_function(frame, code)]
    starts = not _CALL.graphs and not behind
    if reason is not None:
        found = _why_ended(reason, starts)
    elif _CALL.graphs:
        place = _users_line(getattr(gm.compile_subgraph_reason, "user_stack", None)) or next(map(_line_of, above), None)
        found = ModelPart("Dynamo made a further graph of the model", place, starts, returns=not outer)
    else:
        broken = next(filter(None, map(_why_uncompiled, outer)), None)
        if broken is None:
            return None
        found = replace(broken, starts=starts)
    return found


def _behind_a_break() -> ModelPart | None:
    """Of the only graph of a model that breaks in front of it: numbers such as lengths may cross there."""
    frame = traced_frame()
    if frame is None or not frame.f_code.co_name.startswith(RESUMED):
        return None
    file, line = frame.f_code.co_filename, frame.f_code.co_firstlineno
    where = SourceLine(file, line, _function_name(frame.f_code.co_name), linecache.getline(file, line).strip())
    return ModelPart("Dynamo broke it in front of all that it computes", where, starts=False, returns=True)


def mark_part(gm: fx.GraphModule, options: Options, dp: int) -> None:
    """Note on a graph which part of a broken model it is, if it is one.

    Raises:
        GraphBreak: the model is not one graph, and the options do not allow that; or ranks of dp would differ.
    """
    part = _find_part(gm) or (_behind_a_break() if dp > 1 else None)
    if part is None:
        return
    if dp > 1:
        found = f"over dp what crosses a break has the entries of one rank, and counts them. {part.reason}"
        raise GraphBreak(found, where=part.where, legal="a model that is one graph, a mesh without dp, or DDP over dp")
    if options.on_graph_break == "error":
        raise GraphBreak(part.reason, where=part.where, legal=_LEGAL)
    _output(gm).meta[PART] = part


def model_part_of(gm: fx.GraphModule) -> ModelPart | None:
    """Which part of a broken model a marked Dynamo graph is."""
    found: ModelPart | None = _output(gm).meta.get(PART)
    return found


def options_of_part(gm: fx.GraphModule, options: Options) -> Options:
    """What a marked graph is compiled with: what is between two parts reads whole outputs."""
    part = model_part_of(gm)
    return options if part is None or part.returns else replace(options, outputs="full")


def _output(gm: fx.GraphModule) -> fx.Node:
    (output,) = gm.graph.find_nodes(op="output")
    return output


def graph_break_of(gm: fx.GraphModule) -> Any:
    """Dynamo's reason to end this graph in the middle of the model; None if it did not."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    return reason if reason is not None and reason.graph_break else None


def _same_function(frame: types.FrameType, code: types.CodeType | None) -> bool:
    """Whether a frame is the part in front of a resumed one."""
    if code is None or code.co_filename != frame.f_code.co_filename:
        return False
    names = [getattr(c, "co_qualname", c.co_name).rpartition(".") for c in (code, frame.f_code)]
    return names[0][0] == names[1][0] and _function_name(names[0][2]) == _function_name(names[1][2])


def _function_name(name: str) -> str:
    """The user's name of a function that Dynamo made of what is behind a break."""
    return name.removeprefix(RESUMED).rpartition("_at_")[0] if name.startswith(RESUMED) else name


class _Stop(BaseException):
    """Leaves Dynamo when it has a graph of a whole frame."""


def _why_ended(reason: Any, starts: bool) -> ModelPart:
    """The first words of a graph's reason to end; where Dynamo has but one for it, such as "generic_jump", it asks."""
    where = _users_line(reason.user_stack)
    if "\n" not in reason.reason:
        frame = traced_frame()
        asked = _why_not_one_graph(frame.f_code, frame.f_globals, frame.closure, frame.f_locals)
        if asked is not None:
            return replace(asked, where=asked.where or where, starts=starts)
    return ModelPart(_first_words(reason.reason), where, starts, returns=False)


def _why_uncompiled(frame: types.FrameType) -> ModelPart | None:
    """Why Dynamo left a frame to Python; None if it would compile it."""
    if any(name.startswith("__resume_at_") for name in frame.f_code.co_names):  # Dynamo's own code: a frame that broke
        return ModelPart("Dynamo broke it in front of this graph", _line_of(frame), starts=False, returns=False)
    try:
        cells = tuple(types.CellType(frame.f_locals[name]) for name in frame.f_code.co_freevars)
    except KeyError:  # not filled yet
        return None
    asked = _why_not_one_graph(frame.f_code, frame.f_globals, cells, frame.f_locals)
    return asked and replace(asked, where=asked.where or _line_of(frame))


def _why_not_one_graph(
    code: types.CodeType, in_globals: dict[str, Any], cells: Any, given: Mapping[str, Any]
) -> ModelPart | None:
    """What Dynamo says where it is asked for one graph of a frame with these locals; None if that can be."""

    def stop(gm: fx.GraphModule, inputs: Any) -> NoReturn:
        raise _Stop

    try:
        function = types.FunctionType(code.replace(), in_globals, closure=cells)
        again = torch.compile(function, backend=stop, fullgraph=True, dynamic=False)
        with under_function_modes():
            bound = inspect.BoundArguments(inspect.signature(function), dict(given))
            again(*bound.args, **bound.kwargs)
    except torch._dynamo.exc.Unsupported as error:
        return ModelPart(_first_words(str(error)), _users_line(error.real_stack), starts=False, returns=False)
    except (_Stop, Exception):
        return None
    return None


def _first_words(reason: str) -> str:
    """Dynamo's reason without its hints."""
    lines = [line.strip() for line in reason.split("\n\n")[0].splitlines()]
    kept = [line.removeprefix("Explanation: ") for line in lines if line and not line.startswith("Hint: ")]
    return f"Dynamo broke it: {'. '.join(line.rstrip('.') for line in kept)}"


def _users_line(stack: Any) -> SourceLine | None:
    """The innermost line that is the user's, else torch's."""
    frames = [f for f in reversed(stack or ()) if not is_own_file(f.filename)]
    found = next((f for f in frames if not f.filename.startswith(TORCH_FOLDER)), None) or next(iter(frames), None)
    if found is None:
        return None
    return SourceLine(found.filename, found.lineno or 0, _function_name(found.name), (found.line or "").strip())


def _line_of(frame: types.FrameType) -> SourceLine:
    file, line = frame.f_code.co_filename, frame.f_lineno
    return SourceLine(file, line, frame.f_code.co_name, linecache.getline(file, line).strip())


def _size_text(nodes: Any) -> str:
    """How many bytes these values have, but parameters and buffers."""
    values = [n.meta["val"] for n in nodes if isinstance(n, fx.Node) and not n.meta.get("state")]
    tensors = [x for x in values if isinstance(x, Tensor)]
    total = sum(numel_hint(x) * x.element_size() for x in tensors)
    return f"{total:,} bytes in {len(tensors)} tensor{'s' if len(tensors) != 1 else ''}"
