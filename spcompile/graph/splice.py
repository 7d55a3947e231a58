"""Insert a piece of tensor code into a graph: trace it on the example values, then copy its nodes in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

_ORIGIN = (
    "stack_trace",
    "nn_module_stack",
    "seq_nr",
    "custom",
    "ac_graph_id",
    "recompute",
    "partitioner_tag",
    "spx_origin",
)


def splice(
    function: Callable[..., Any],
    args: Sequence[Any],
    *,
    like: fx.Node,
    pre_dispatch: bool = True,
    traced: dict[Any, fx.Graph] | None = None,
) -> Any:
    """Trace function(*args) and insert its nodes in front of `like`, with the origin of `like`.

    args: nodes and plain values; a node stands for its value. Returns the outputs of `function` as nodes.
    traced: what earlier calls have traced; one on equal shapes, as in another layer, is copied from there.
    """
    graph = like.graph
    nodes = [a for a in args if isinstance(a, fx.Node)]
    values = [n.meta["val"] for n in nodes]

    def run(*given: Any) -> Any:
        rest = iter(given)
        return function(*[next(rest) if isinstance(a, fx.Node) else a for a in args])

    key = (function, pre_dispatch, signature_of(args)) if traced is not None else None
    body = traced.get(key) if traced is not None else None
    mode = next(v.fake_mode for v in [*values, like.meta.get("val")] if isinstance(v, FakeTensor))
    if body is None:
        with mode, torch.fx.traceback.preserve_node_meta(False):
            body = make_fx(run, pre_dispatch=pre_dispatch)(*values).graph
        if traced is not None and is_static(values):
            traced[key] = body
    inside: dict[fx.Node, fx.Node] = dict(zip((n for n in body.nodes if n.op == "placeholder"), nodes, strict=True))
    result: Any = None
    with graph.inserting_before(like):
        for node in body.nodes:
            if node.op == "output":
                result = fx.node.map_arg(node.args[0], lambda n: inside[n])
            elif node.op == "call_function":
                copied = graph.node_copy(node, lambda n: inside[n])
                copied.meta = {"val": example_in(mode, node.meta.get("val"))}
                copied.meta.update({key: like.meta[key] for key in _ORIGIN if key in like.meta})
                inside[node] = copied
            else:
                assert node.op == "placeholder", f"{node.op} {node.target} in a spliced function"
    return result


def example_in(mode: Any, example: Any) -> Any:
    """An example value that a trace has left, as one of a fake mode: another graph may have traced what is copied."""

    def moved(x: FakeTensor) -> Any:
        if x.fake_mode is mode or mode is None:
            return x
        with mode:
            return fake_like(x)

    return pytree.tree_map_only(FakeTensor, moved, example)


def fake_like(x: Any) -> Any:
    """Another tensor of the same shape and strides, a fake under a fake mode; what is no tensor, itself."""
    if not isinstance(x, torch.Tensor):
        return x
    return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=x.device)


def signature_of(args: Sequence[Any]) -> tuple[Any, ...]:
    """All that a trace depends on: of a node its value's metadata, and which arguments are the same value."""
    values = [a.meta["val"] if isinstance(a, fx.Node) else a for a in args]
    first: dict[int, int] = {}
    found: list[Any] = []
    for place, value in enumerate(values):
        if isinstance(value, torch.Tensor):
            place = first.setdefault(id(value), place)
            layout = (tuple(value.shape), value.stride(), value.storage_offset())
            found.append((place, str(value.dtype), str(value.device), value.requires_grad, str(layout)))
        else:
            found.append((type(value).__name__, repr(value)))
    return tuple(found)


def is_static(values: Sequence[Any]) -> bool:
    """Whether all are tensors whose sizes are numbers."""
    return all(isinstance(v, torch.Tensor) and not v._has_symbolic_sizes_strides for v in values)
