"""The laws of a graph, checked between passes. What it finds is a bug of spcompile or of a custom pass.

All stages     the graph is well formed; every value has the shape and dtype that its op gives; every op has an origin
LOCAL          states I, R, S, P (spcompile.collectives.collective) are consistent per mesh axis; outputs are complete
SCHEDULE       the buffer of a started collective is not read before its wait, and each is waited for; so are copies to
               the host and back; what is in the host's memory is not computed with, nor what went there read again
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true

from spcompile.check.states import check_states, invalid
from spcompile.collectives import is_start
from spcompile.collectives.host_copy import HOST_COPIES, TO_DEVICE, TO_HOST, WAIT_COPY
from spcompile.diagnostics import InvalidGraph
from spcompile.graph.edit import fake_mode_of, operand
from spcompile.graph.printer import type_text
from spcompile.graph.storage import root_of
from spcompile.machine.mesh import MeshShape
from spcompile.passes_api import Stage

_c10d = torch.ops._c10d_functional
# Of each fake mode, whose symbols they are about: descriptions of calls that were found right, in whichever graph.
_RIGHT: WeakKeyDictionary[FakeTensorMode, set[str]] = WeakKeyDictionary()


def verify_graph(
    gm: fx.GraphModule,
    stage: Stage,
    mesh: MeshShape,
    *,
    sharded_outputs: bool = False,
    input_states: Mapping[str, Mapping[str, str]] | None = None,
    trainable: Collection[str] | None = None,
) -> None:
    """Check every law of `stage`.

    sharded_outputs: outputs may be in state S (outputs="sharded").
    input_states: placeholder name -> axis -> state, for inputs that are not invariant (sharded parameters).
    trainable: the placeholders that need a gradient; by default those whose example value requires one. Tracing drops
        that flag, so whoever traces names them here or sets it again.

    Raises:
        InvalidGraph: with the node and the user's line that made it.
    """
    try:
        gm.graph.lint()
    except RuntimeError as error:
        raise InvalidGraph(f"not a well formed graph: {str(error).splitlines()[0]}") from error
    for node in gm.graph.nodes:
        if node.op == "call_function" and not node.meta.get("stack_trace") and not node.meta.get("spx_origin"):
            raise invalid(node, "no source location", legal='meta["stack_trace"], or meta["spx_origin"] naming a pass')
    check_shapes(gm)
    if stage is Stage.LOCAL:
        check_states(
            gm.graph, mesh, sharded_outputs=sharded_outputs, input_states=input_states or {}, trainable=trainable
        )
    if stage is Stage.SCHEDULE:
        check_waits(gm.graph)
        check_host_copies(gm.graph)


def check_shapes(gm: fx.GraphModule) -> None:
    """Run every op on the example values of its operands and compare with its own example value."""
    mode = fake_mode_of([n.meta.get("val") for n in gm.graph.nodes])
    if mode is None:
        return
    shape_env = mode.shape_env
    guards = shape_env.suppress_guards() if shape_env is not None else nullcontext()
    fresh = shape_env.ignore_fresh_unbacked_symbols() if shape_env is not None else nullcontext()
    right = _RIGHT.setdefault(mode, set())
    with mode, guards, fresh, torch.no_grad():
        for node in gm.graph.nodes:
            if node.op == "call_function" and not isinstance(node.target, torch._ops.HigherOrderOperator):
                _check_shape(gm, node, mode, right)


def _check_shape(gm: fx.GraphModule, node: fx.Node, mode: FakeTensorMode, right: set[str]) -> None:
    """right: descriptions of calls that were found right; those of other layers, and behind other passes, are equal."""
    if "val" not in node.meta:
        if _returns_nothing(node):
            return
        raise invalid(node, 'no example value in meta["val"]')
    call = (node.target, node.args, node.kwargs, *[n.meta.get("val") for n in (node, *node.all_input_nodes)])
    if _same_call(node.meta.get("verified"), call):
        return
    description = _description(node)
    if description is not None and description in right:
        node.meta["verified"] = call
        return
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: _example_value(gm, n, mode))
    target: Any = node.target
    try:
        found = target(*args, **kwargs)
    except Exception as error:
        raise invalid(node, f"{target} refuses its operands: {error}") from error
    if not _agree(found, node.meta["val"]):
        raise invalid(node, f"{target} gives {type_text(found)}, the graph says {type_text(node.meta['val'])}")
    node.meta["verified"] = call
    if description is not None:
        right.add(description)


def _description(node: fx.Node) -> str | None:
    """All that the example value of a call depends on, and that value; None where some of it is not known as text.

    Tensors of the module are not, which have no example value, nor sizes that only the data tell. Other sizes that are
    symbols are: one graph has one set of them.
    """
    if any("val" not in read.meta for read in node.all_input_nodes):
        return None

    def described(value: Any) -> str:
        if isinstance(value, (tuple, list)):
            return f"[{', '.join(map(described, value))}]"
        if not isinstance(value, torch.Tensor):
            if isinstance(value, torch.SymInt) and free_unbacked_symbols(value):
                raise ValueError
            return f"{type(value).__name__} {value}"
        if value._has_symbolic_sizes_strides and free_unbacked_symbols(value):
            raise ValueError
        return f"{value.dtype}{tuple(value.shape)}{value.stride()}{value.device}"

    values = [n.meta["val"] for n in node.all_input_nodes]
    names = {n: f"%{place}" for place, n in enumerate(node.all_input_nodes)}
    try:
        args = fx.node.map_arg((node.args, node.kwargs), names.__getitem__)
        return f"{node.target} {args} {' '.join(map(described, values))} -> {described(node.meta['val'])}"
    except ValueError:
        return None


def _returns_nothing(node: fx.Node) -> bool:
    """Whether a call is made for its effect alone, such as an assertion."""
    return isinstance(node.target, torch._ops.OpOverload) and not node.target._schema.returns


def _same_call(seen: tuple[Any, ...] | None, call: tuple[Any, ...]) -> bool:
    """Whether this very call on these very examples was found right after an earlier pass; arguments are frozen."""
    return seen is not None and len(seen) == len(call) and all(map(operator.is_, seen, call))


def _example_value(gm: fx.GraphModule, node: fx.Node, mode: FakeTensorMode) -> Any:
    if "val" in node.meta:
        val = node.meta["val"]
    elif node.op == "get_attr":
        val = operator.attrgetter(str(node.target))(gm)
    else:
        raise invalid(node, 'no example value in meta["val"]')
    real = isinstance(val, torch.Tensor) and not isinstance(val, FakeTensor)
    return mode.from_tensor(val, static_shapes=True) if real else val


def _agree(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same_rank = a.dtype == b.dtype and a.device.type == b.device.type and a.dim() == b.dim()
        return same_rank and all(_equal(p, q) for p, q in zip(a.shape, b.shape, strict=True))
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(_agree(p, q) for p, q in zip(a, b, strict=True))
    if isinstance(a, (int, torch.SymInt)) and isinstance(b, (int, torch.SymInt)):
        return _equal(a, b)
    return type(a) is type(b)


def _equal(a: Any, b: Any) -> bool:
    """Provably equal; or of unbacked size; or, where neither can be proven, equal for the sizes at hand."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    if free_unbacked_symbols(a) or free_unbacked_symbols(b) or statically_known_true(a == b):
        return True
    return _hint(a) == _hint(b)


def _hint(size: Any) -> int:
    return size.node.hint if isinstance(size, torch.SymInt) else size


def check_waits(graph: fx.Graph) -> None:
    """Only `wait_tensor` (through getitem, for coalesced ones) reads what a functional collective started."""
    for node in graph.nodes:
        if not is_start(node.target):
            continue
        in_flight, waited = [node], False
        while in_flight:
            value = in_flight.pop()
            for user in value.users:
                if user.target is operator.getitem:
                    in_flight.append(user)
                elif user.target is _c10d.wait_tensor.default:
                    waited = True
                else:
                    raise invalid(user, f"reads {value.name} before its wait")
        if not waited:
            raise invalid(node, "started but never waited for")


def check_host_copies(graph: fx.Graph) -> None:
    """Each copy to the host or back is waited for once, by a wait that names its source, and only then read.

    Behind the wait for a copy to the host nobody reads what was copied; nobody but a copy back reads what is there.
    """
    gone: dict[fx.Node, fx.Node] = {}  # storage -> the wait behind which it is only in the host's memory
    for node in graph.nodes:
        again = next((value for value in node.all_input_nodes if root_of(value) in gone), None)
        if again is not None:
            raise invalid(node, f"reads {again.name}, which is in the host's memory since {gone[root_of(again)].name}")
        if node.target in HOST_COPIES:
            _check_copy(node)
        elif node.target is WAIT_COPY:
            start, source = operand(node, 0), operand(node, 1)
            if start.target not in HOST_COPIES or start.args[0] is not source:
                raise invalid(node, "waits for no copy of its second operand", legal="the start of a copy, its operand")
            if start.target is TO_HOST.op:
                gone[root_of(source)] = node


def _check_copy(start: fx.Node) -> None:
    for user in start.users:
        if user.target is not WAIT_COPY:
            raise invalid(user, f"reads {start.name} before its wait")
    if len(start.users) != 1:
        raise invalid(start, "started but never waited for" if not start.users else "waited for more than once")
    (wait,) = start.users
    there = start.all_input_nodes[0] if start.target is TO_DEVICE.op else wait
    for user in there.users:
        if user.op != "output" and user.target not in (TO_DEVICE.op, WAIT_COPY):
            raise invalid(user, f"computes with {there.name}, which is in the host's memory")
