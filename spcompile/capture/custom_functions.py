"""torch.autograd.Function in a graph: opened, so that its parts can be sharded, with the gradient that it defines.

A backward is a map of gradients that is linear in them. Its transpose J maps changes of the inputs to changes of the
outputs, and the function f is

    f(x).detach() + J(x - x.detach())

in value, the second term being 0, and in gradient. J is traced as the gradient of the backward. A backward that is not
linear, or adds something of its own, cannot be written in a forward graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from spcompile.capture.autocast import autocast_off
from spcompile.capture.vmapped import fake_like
from spcompile.diagnostics import CaptureFailed
from spcompile.graph.edit import call
from spcompile.graph.linear import linear_in

NO_CHANGE = "spx_no_change"  # in meta["custom"] of x - x.detach()
APPLY = torch.ops.higher_order.autograd_function_apply

Transposes = Mapping[fx.GraphModule, fx.GraphModule | None]  # of backwards; None where one is not linear


def with_own_gradient(
    inputs: Sequence[Any], outputs: Sequence[Any], saved: Sequence[Any], transpose: fx.GraphModule | None
) -> tuple[Any, ...]:
    """The outputs of a function, with the gradients that its backward (of Dynamo's autograd_function_apply) defines.

    transpose: of its backward, see `transposes_of`.

    Raises:
        CaptureFailed: its backward is not linear.
    """
    if not torch.is_grad_enabled():  # a trace does not know which values need a gradient
        return tuple(outputs)
    if transpose is None:
        legal = "a backward that is linear in gradients, or the same computed without torch.autograd.Function"
        raise CaptureFailed("a torch.autograd.Function whose gradient cannot be sharded", legal=legal)
    with fx.traceback.annotate({NO_CHANGE: True}):
        changes = [x - x.detach() for x in inputs if isinstance(x, Tensor) and x.is_floating_point()]
    with autocast_off():  # as a backward runs
        terms = fx.Interpreter(transpose).run(*changes, *(s.detach() if isinstance(s, Tensor) else s for s in saved))
    found = []
    for y, term in zip(outputs, terms, strict=True):
        own = y.detach() if isinstance(y, Tensor) else y
        found.append(own if term is None else own + term)
    return tuple(found)


def transposes_of(gm: fx.GraphModule, fake_mode: Any) -> Transposes:
    """Of every backward of a custom function in a Dynamo graph, and in the graphs inside of it.

    A transpose takes changes of the floating inputs and what the forward saved, and gives a change of each output, or
    None. Nodes of `gm` hold fakes in meta["example_value"], as Dynamo leaves them. fake_mode: that of the capture.
    """
    found: dict[fx.GraphModule, fx.GraphModule | None] = {}
    for outer in (module for module in gm.modules() if isinstance(module, fx.GraphModule)):
        for node in outer.graph.find_nodes(op="call_function", target=APPLY):
            forward, backward = (getattr(outer, str(part.target)) for part in node.args[:2])
            if backward not in found:
                found[backward] = _transposed(forward, backward, node, fake_mode)
    return found


def _transposed(
    forward: fx.GraphModule, backward: fx.GraphModule, site: fx.Node, fake_mode: Any
) -> fx.GraphModule | None:
    outputs: Sequence[Any] = forward.graph.output_node().args[0][0]  # type: ignore[index, assignment]
    with fake_mode, autocast_off():
        examples = [fake_like(node.meta["example_value"]) for node in backward.graph.find_nodes(op="placeholder")]
        inputs = [fake_like(x.meta["example_value"]) for x in site.args[2:] if isinstance(x, fx.Node)]
        inputs = [x for x in inputs if isinstance(x, Tensor) and x.is_floating_point()]
        with torch.no_grad():  # without writes, through which gradients of gradients do not pass
            own = make_fx(functionalize(fx.Interpreter(backward).run, remove="mutations"))(*examples)
        _write_copies_out(own.graph)
        own.recompile()
        if not _is_linear(own.graph, len(outputs)):
            return None
        given, saved = examples[: len(outputs)], examples[len(outputs) :]

        def transpose(*changes_and_saved: Any) -> list[Any]:
            changes, rest = changes_and_saved[: len(inputs)], changes_and_saved[len(inputs) :]
            with torch.enable_grad():
                gradients = [g.detach().requires_grad_(g.is_floating_point()) for g in given]
                results = own(*gradients, *rest)
                results = results if isinstance(results, tuple | list) else (results,)
                pairs = [(r, c) for r, c in zip(_of_floating(results, site), changes, strict=True) if r is not None]
                asked = [g for g in gradients if g.requires_grad]
                terms = iter(_grad([r for r, _ in pairs], asked, [c for _, c in pairs]))
            return [next(terms) if g.requires_grad else None for g in gradients]

        traced = make_fx(transpose)(*inputs, *saved)
    for node in traced.graph.nodes:
        node.meta.update({k: v for k, v in site.meta.items() if k in ("stack_trace", "nn_module_stack")})
    return traced


def _grad(results: Sequence[Tensor], asked: Sequence[Tensor], changes: Sequence[Tensor]) -> Sequence[Tensor | None]:
    moving = [(r, c.to(r.dtype)) for r, c in zip(results, changes, strict=True) if r.requires_grad]
    if not moving:
        return [None] * len(asked)
    return torch.autograd.grad([r for r, _ in moving], asked, [c for _, c in moving], allow_unused=True)


def _of_floating(results: Sequence[Any], site: fx.Node) -> list[Any]:
    """What a backward gives for the floating operands of a function; it gives one result for each, sizes among them."""
    values = [x.meta["example_value"] if isinstance(x, fx.Node) else x for x in site.args[2:]]
    pairs = zip(results, values, strict=True)
    return [result for result, x in pairs if isinstance(x, Tensor) and x.is_floating_point()]


def _write_copies_out(graph: fx.Graph) -> None:
    """Values that take the place of others become themselves, in their shape and dtype: a copy has no derivative."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.copy.default):
        place, value = node.args[0].meta["val"], node.args[1]
        if value.meta["val"].dtype != place.dtype:
            value = call(graph, torch.ops.aten.to.dtype, (value, place.dtype), like=node, before=node)
        new = call(graph, torch.ops.aten.expand.default, (value, list(place.shape)), like=node, before=node)
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def _is_linear(graph: fx.Graph, count: int) -> bool:
    """Whether every result of an ATen graph is linear in its first `count` inputs, taken together."""
    given = graph.find_nodes(op="placeholder")[:count]
    linear = linear_in(graph, given)
    results = graph.output_node().args[0]
    results = results if isinstance(results, tuple | list) else (results,)
    return all(result is None or result in linear for result in results)
