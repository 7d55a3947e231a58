"""lower-collectives: spx collectives become functional c10d starts and waits, which Inductor knows how to schedule.

Before   ag: "f64[5]" = spx.all_gather(x, 0, 5, 'cp', 2, 'contiguous', 'R')
After    all_gather_into_tensor: "f64[6]" = _c10d_functional.all_gather_into_tensor(x, 2, 'cp')
         wait_tensor: "f64[6]" = _c10d_functional.wait_tensor(all_gather_into_tensor)
         ...                                                       # views: natural order, without padding
         ag: "f64[5]" = aten.slice(view, 0, 0, 5)

Ops which must know their rank (shard, mask_padding, reorder, ring attention) stay one node. Groups are mesh axes until
`bind_axes` puts the names of this process's groups in their place, so that the graph is the same on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from spcompile.collectives import COLLECTIVES, Collective, call_arguments, erase_identities
from spcompile.graph.splice import example_in, is_static, signature_of
from spcompile.passes_api import Context, Example, Pass, Stage
from spcompile.torch_private import detect_fake_mode, inductor_decompositions

_KEPT_META = ("stack_trace", "nn_module_stack", "seq_nr", "partitioner_tag", "recompute", "ac_graph_id")


@dataclass(frozen=True)
class LowerCollectives(Pass):
    """Replace each collective that can be written without its rank by starts, waits and plain ATen."""

    name: ClassVar[str] = "lower-collectives"
    stage: ClassVar[Stage] = Stage.SCHEDULE
    summary: ClassVar[str] = "spx collectives become functional c10d starts and waits"

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        """Inline every collective that has a lowered form; returns how many, with the `vary` nodes that were left."""
        rewrites = erase_identities(gm.graph)
        decompositions = inductor_decompositions() if ctx.options.compiler == "inductor" else {}
        for node in list(gm.graph.nodes):
            collective = COLLECTIVES.get(node.target)
            if collective is not None and collective.lowered is not None:
                _inline(node, collective, decompositions, ctx.traced)
                rewrites += 1
        return rewrites


def _inline(
    node: fx.Node,
    collective: Collective,
    decompositions: Mapping[Any, Callable[..., Any]],
    traced: dict[Any, fx.Graph],
) -> None:
    """Trace `lowered` on the example values of the call and put its nodes in place of the call; its name stays.

    decompositions: what AOTAutograd has decomposed already, and Inductor refuses in a graph behind it.
    traced: what earlier calls have traced; one with equal arguments, as in another layer, is copied from there.
    """
    lowered, arguments = _bound_call(node, collective)
    values = [argument.meta["val"] for argument in arguments]
    called = (node.target, bool(decompositions), *signature_of([*node.args, *node.kwargs.items()]))
    key = called if is_static(values) else None
    body, mode = traced.get(key), detect_fake_mode(values)
    if body is None:
        with mode or nullcontext():  # also for tensors that `lowered` makes from nothing
            body = make_fx(lowered, decomposition_table=dict(decompositions))(*values).graph
        body.eliminate_dead_code()
        if key is not None:
            traced[key] = body
    copies = dict(zip(body.find_nodes(op="placeholder"), arguments, strict=True))
    with node.graph.inserting_before(node):
        for inner in body.nodes:
            if inner.op == "output":
                result = copies[inner.args[0]]
            elif inner.op != "placeholder":
                assert inner.op == "call_function", f"lowering {node.name} made a {inner.op} node"
                copies[inner] = node.graph.node_copy(inner, lambda n: copies[n])
                copies[inner].meta = {"val": example_in(mode, inner.meta["val"]), **_kept_meta(node)}
    if "sharding" in node.meta:
        result.meta["sharding"] = dict(node.meta["sharding"])
    node.replace_all_uses_with(result)
    node.graph.erase_node(node)
    result.name = node.name


def _bound_call(node: fx.Node, collective: Collective) -> tuple[Callable[..., Any], list[fx.Node]]:
    """The lowering as a function of the call's node arguments (the tensor, and sizes that are symbols)."""
    operand, named = call_arguments(collective.op, node.args, node.kwargs)
    nodes = [operand, *[value for value in named.values() if isinstance(value, fx.Node)]]
    free = [name for name, value in named.items() if isinstance(value, fx.Node)]
    fixed = {name: value for name, value in named.items() if name not in free}
    assert collective.lowered is not None
    lowered = collective.lowered
    return lambda x, *sizes: lowered(x, **fixed, **dict(zip(free, sizes, strict=True))), nodes


def _kept_meta(node: fx.Node) -> dict[str, Any]:
    """What a node that comes from `node` keeps of it. Dicts are copied: metadata is edited in place by others."""
    kept = {key: node.meta[key] for key in _KEPT_META if key in node.meta}
    copied = {key: dict(value) if isinstance(value, dict) else value for key, value in kept.items()}
    return {**copied, "spx_origin": "lower-collectives"}


def _projected_attention(x_BNSH: Tensor, w_HH: Tensor) -> Tensor:
    h_BNSH = x_BNSH @ w_HH
    return torch.nn.functional.scaled_dot_product_attention(h_BNSH, h_BNSH, h_BNSH, is_causal=True)


def _inputs() -> tuple[Tensor, ...]:
    return tuple(torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((1, 4, 7, 2), (2, 2)))


EXAMPLE = Example(_projected_attention, _inputs, options={"attention": "ring", "balance": "contiguous"})
