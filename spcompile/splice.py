"""Insert a piece of tensor code into a graph: trace it on the example values, then copy its nodes in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx

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
) -> Any:
    """Trace function(*args) and insert its nodes in front of `like`, with the origin of `like`.

    args: nodes and plain values; a node stands for its value. Returns the outputs of `function` as nodes.
    """
    graph = like.graph
    nodes = [a for a in args if isinstance(a, fx.Node)]
    values = [n.meta["val"] for n in nodes]

    def run(*given: Any) -> Any:
        rest = iter(given)
        return function(*[next(rest) if isinstance(a, fx.Node) else a for a in args])

    mode = next(v.fake_mode for v in [*values, like.meta.get("val")] if isinstance(v, FakeTensor))
    with mode, torch.fx.traceback.preserve_node_meta(False):
        traced = make_fx(run, pre_dispatch=pre_dispatch)(*values)
    inside: dict[fx.Node, fx.Node] = dict(
        zip((n for n in traced.graph.nodes if n.op == "placeholder"), nodes, strict=True)
    )
    result: Any = None
    with graph.inserting_before(like):
        for node in traced.graph.nodes:
            if node.op == "output":
                result = fx.node.map_arg(node.args[0], lambda n: inside[n])
            elif node.op == "call_function":
                copied = graph.node_copy(node, lambda n: inside[n])
                copied.meta = {"val": node.meta.get("val")}
                copied.meta.update({key: like.meta[key] for key in _ORIGIN if key in like.meta})
                inside[node] = copied
            else:
                assert node.op == "placeholder", f"{node.op} {node.target} in a spliced function"
    return result
