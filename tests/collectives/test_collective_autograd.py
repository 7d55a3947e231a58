"""AOTAutograd puts the dual of each collective into the backward graph, with static and with symbolic sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx as fx
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

import spcompile.collectives  # noqa: F401
from spcompile.graph.printer import op_name

spx = torch.ops.spx
Function = Callable[[torch.Tensor], torch.Tensor]
CASES: dict[str, tuple[Function, str]] = {
    "shard": (lambda x: spx.shard(x, 0, "cp", 2, "zigzag", 0.0), "spx.all_gather(I)"),
    "all_gather-R": (lambda x: spx.all_gather(x, 0, length(x), "cp", 2, "contiguous", "R"), "spx.reduce_scatter"),
    "all_gather-I": (lambda x: spx.all_gather(x, 0, length(x), "cp", 2, "contiguous", "I"), "spx.shard"),
    "reduce_scatter": (lambda x: spx.reduce_scatter(x, 0, "cp", 2, "zigzag"), "spx.all_gather(R)"),
    "all_reduce-I": (lambda x: spx.all_reduce(x, "cp", 2, "I"), "spx.vary"),
    "all_reduce-R": (lambda x: spx.all_reduce(x, "cp", 2, "R"), "spx.all_reduce(R)"),
    "vary": (lambda x: spx.vary(x, "cp", 2), "spx.all_reduce(I)"),
    "all_to_all": (lambda x: spx.all_to_all(x.view(2, -1), "cp", 2), "spx.all_to_all"),
    "mask_padding": (lambda x: spx.mask_padding(x, 0, length(x), "cp", 2, "zigzag", 1.0), "spx.mask_padding"),
    "reorder": (lambda x: spx.reorder(x, 0, length(x), "cp", 2, "zigzag", "contiguous"), "spx.reorder"),
}


def length(local: torch.Tensor) -> Any:
    return 2 * local.shape[0] - 1


def collectives_in(graph: fx.Graph) -> list[str]:
    found = []
    for node in graph.nodes:
        if node.op == "call_function" and op_name(node).startswith("spx."):
            to = [arg for arg in node.args if arg in ("I", "R")]
            found.append(op_name(node) + (f"({to[0]})" if to else ""))
    return found


def example(val: Any) -> Any:
    """A value as the graph promises it, for sizes at hand."""
    if isinstance(val, torch.Tensor):
        return torch.zeros([example(size) for size in val.shape])
    return val.node.hint if isinstance(val, torch.SymInt) else val


@pytest.mark.thinned(14)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_backward_graph(name: str, dynamic: bool) -> None:
    function, expected = CASES[name]
    graphs: list[fx.Graph] = []

    def keep(gm: fx.GraphModule, inputs: Any) -> Any:
        """Stands for the compiler: there are no processes on which the graph could run."""
        graphs.append(gm.graph)
        results = [n.meta["val"] if isinstance(n, fx.Node) else n for n in gm.graph.output_node().args[0]]
        return make_boxed_func(lambda *args: [example(val) for val in results])

    torch._dynamo.reset()
    x = torch.randn(8, requires_grad=True)
    if dynamic:
        torch._dynamo.mark_dynamic(x, 0)
    compiled = torch.compile(function, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep), fullgraph=True)
    compiled(x).sum().backward()
    forward, backward = graphs
    assert len(collectives_in(forward)) == 1
    assert collectives_in(backward) == [expected]
