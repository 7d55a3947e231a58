"""torch.autograd.Function in a graph: opened, so that its parts can be sharded, with the gradient that it defines.

A backward is a map of gradients that is linear in them. Its transpose J maps changes of the inputs to changes of the
outputs, and the function f is

    f(x).detach() + J(x - x.detach())

in value, the second term being 0, and in gradient. J is traced as the gradient of the backward. What a backward adds of
its own, whatever gradient comes (auxiliary losses), `spx.add_gradient` adds to that of the input. A backward that is
neither (clipping) cannot be written in a forward graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from spcompile.capture.autocast import autocast_off
from spcompile.capture.gradient_ops import add_gradient
from spcompile.diagnostics import CaptureFailed
from spcompile.graph.dtypes import takes_gradient
from spcompile.graph.edit import call
from spcompile.graph.linear import affine_in, linear_in
from spcompile.graph.splice import fake_like

NO_CHANGE = "spx_no_change"  # in meta["custom"] of x - x.detach()
APPLY = torch.ops.higher_order.autograd_function_apply


@dataclass(frozen=True)
class OwnGradient:
    """What a backward gives, as graphs of what the forward saved.

    transpose: takes changes of the floating inputs before that; gives a change of each output, or None.
    constants: gives what each floating input gets beside, or None; None where no input does.
    """

    transpose: fx.GraphModule
    constants: fx.GraphModule | None = None

    def reaches(self, place: int) -> bool:
        """Whether any output changes with this floating input."""
        return bool(self.transpose.graph.find_nodes(op="placeholder")[place].users)


OwnGradients = Mapping[fx.GraphModule, OwnGradient | None]  # by backward; None where one cannot be written


def with_own_gradient(
    inputs: Sequence[Any], outputs: Sequence[Any], saved: Sequence[Any], own: OwnGradient | None
) -> tuple[Any, ...]:
    """The outputs of a function, with the gradients that its backward (of Dynamo's autograd_function_apply) defines.

    own: of its backward, see `own_gradients_of`.

    Raises:
        CaptureFailed: its backward is neither linear nor linear but for constants.
    """
    if not torch.is_grad_enabled():  # a trace does not know which values need a gradient
        return tuple(outputs)
    if own is None:
        legal = "a backward that is linear in gradients, or the same computed without torch.autograd.Function"
        raise CaptureFailed("a torch.autograd.Function or a hook whose gradient cannot be sharded", legal=legal)
    inputs = [x for x in inputs if takes_gradient(x)]
    saved = [s.detach() if isinstance(s, Tensor) else s for s in saved]
    constants = [None] * len(inputs) if own.constants is None else fx.Interpreter(own.constants).run(*saved)
    pairs = enumerate(zip(inputs, constants, strict=True))
    inputs = [x if c is None else add_gradient(x, c, nothing_else=not own.reaches(i)) for i, (x, c) in pairs]
    with fx.traceback.annotate({NO_CHANGE: True}):
        changes = [x - x.detach() for x in inputs]
    with autocast_off():  # as a backward runs
        terms = list(fx.Interpreter(own.transpose).run(*changes, *saved))
    alone = [changes[i] for i, constant in enumerate(constants) if constant is not None and not own.reaches(i)]
    found = []
    for y, term in zip(outputs, terms, strict=True):
        result = y.detach() if isinstance(y, Tensor) else y
        result = result if term is None else result + term
        for change in alone if takes_gradient(y) else ():  # without which no gradient would come their way
            result = result + change.sum().to(y.dtype)
        found.append(result)
    return tuple(found)


def own_gradients_of(gm: fx.GraphModule, fake_mode: Any) -> OwnGradients:
    """Of every backward of a custom function in a Dynamo graph, and in the graphs inside of it.

    Nodes of `gm` hold fakes in meta["example_value"], as Dynamo leaves them. fake_mode: that of the capture.
    """
    found: dict[fx.GraphModule, OwnGradient | None] = {}
    for outer in (module for module in gm.modules() if isinstance(module, fx.GraphModule)):
        for node in outer.graph.find_nodes(op="call_function", target=APPLY):
            forward, backward = (getattr(outer, str(part.target)) for part in node.args[:2])
            if backward not in found:
                found[backward] = _own_gradient(forward, backward, node, fake_mode)
    return found


def _own_gradient(
    forward: fx.GraphModule, backward: fx.GraphModule, site: fx.Node, fake_mode: Any
) -> OwnGradient | None:
    outputs: Sequence[Any] = forward.graph.output_node().args[0][0]  # type: ignore[index, assignment]
    with fake_mode, autocast_off():
        examples = [fake_like(node.meta["example_value"]) for node in backward.graph.find_nodes(op="placeholder")]
        inputs = [fake_like(x.meta["example_value"]) for x in site.args[2:] if isinstance(x, fx.Node)]
        inputs = [x for x in inputs if takes_gradient(x)]
        with torch.no_grad():  # without writes, through which gradients of gradients do not pass
            own = make_fx(functionalize(fx.Interpreter(backward).run, remove="mutations"))(*examples)
        _write_copies_out(own.graph)
        own.recompile()
        given, saved = examples[: len(outputs)], examples[len(outputs) :]
        adds = _adds_constants(own.graph, len(given), site)
        if adds is None or (any(adds) and sum(map(takes_gradient, given)) > 1):
            return None  # a backward runs for the sake of any of its outputs

        def transpose(*changes_and_saved: Any) -> list[Any]:
            changes, rest = changes_and_saved[: len(inputs)], changes_and_saved[len(inputs) :]
            with torch.enable_grad():
                gradients = [g.detach().requires_grad_(takes_gradient(g)) for g in given]
                results = _of_floating(_as_sequence(own(*gradients, *rest)), site)
                pairs = [(r, c) for r, c in zip(results, changes, strict=True) if r is not None]
                asked = [g for g in gradients if g.requires_grad]
                terms = iter(_grad([r for r, _ in pairs], asked, [c for _, c in pairs]))
            return [next(terms) if g.requires_grad else None for g in gradients]

        def constants(*saved: Any) -> list[Any]:
            # Not zeros_like: a trace has no node for what is made of values from outside.
            zeros = [torch.zeros(g.shape, dtype=g.dtype, device=g.device) for g in given]
            results = _of_floating(_as_sequence(own(*zeros, *saved)), site)
            results = [r if is_added else None for r, is_added in zip(results, adds, strict=True)]
            return [None if r is None else r.sum_to_size(x.shape) for r, x in zip(results, inputs, strict=True)]

        found = OwnGradient(make_fx(transpose)(*inputs, *saved), make_fx(constants)(*saved) if any(adds) else None)
    for graph in [found.transpose.graph, *([found.constants.graph] if found.constants is not None else [])]:
        for node in graph.nodes:
            node.meta.update({k: v for k, v in site.meta.items() if k in ("stack_trace", "nn_module_stack")})
    return found


def _as_sequence(results: Any) -> Sequence[Any]:
    return results if isinstance(results, tuple | list) else (results,)


def _grad(results: Sequence[Tensor], asked: Sequence[Tensor], changes: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Autograd sums a gradient that has more elements than its input: the change of that input is the same for each."""
    moving = [(r, c.to(r.dtype).expand_as(r)) for r, c in zip(results, changes, strict=True) if r.requires_grad]
    if not moving:
        return [None] * len(asked)
    return torch.autograd.grad([r for r, _ in moving], asked, [c for _, c in moving], allow_unused=True)


def _of_floating(results: Sequence[Any], site: fx.Node) -> list[Any]:
    """What a backward gives for the floating operands of a function; it gives one result for each, sizes among them."""
    values = [x.meta["example_value"] if isinstance(x, fx.Node) else x for x in site.args[2:]]
    return [result for result, x in zip(results, values, strict=True) if takes_gradient(x)]


def _write_copies_out(graph: fx.Graph) -> None:
    """Values that take the place of others become themselves, in their shape and dtype: a copy has no derivative."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.copy.default):
        place, value = node.args[0].meta["val"], node.args[1]
        if value.meta["val"].dtype != place.dtype:
            value = call(graph, torch.ops.aten.to.dtype, (value, place.dtype), like=node, before=node)
        new = call(graph, torch.ops.aten.expand.default, (value, list(place.shape)), like=node, before=node)
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def _adds_constants(graph: fx.Graph, count: int, site: fx.Node) -> list[bool] | None:
    """Of each floating operand, whether a backward adds something to what is linear in its first `count` inputs.

    None where a result is neither.
    """
    given = graph.find_nodes(op="placeholder")[:count]
    results = _of_floating(_as_sequence(graph.output_node().args[0]), site)
    linear, affine = linear_in(graph, given), affine_in(graph, given)
    if any(result is not None and result not in affine and result not in linear for result in results):
        return None
    return [result is not None and result not in linear for result in results]
