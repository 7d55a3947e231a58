"""Compiles a program up to recognize-mask and compares the rewritten graph with the program itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor
from torch.utils import _pytree as pytree

from spcompile.attention.scores.mask import AttentionMask
from spcompile.capture.retrace import capture
from spcompile.diagnostics import Remarks
from spcompile.graph.printer import format_graph
from spcompile.machine.mesh import MeshShape
from spcompile.options import Options
from spcompile.passes.meaning.recognize_attention import RecognizeAttention
from spcompile.passes.meaning.recognize_mask import RecognizeMask
from spcompile.passes_api import Context


@dataclass
class Rewritten:
    """What the two passes made of one graph, and how the graph computed before and after them."""

    graph: fx.Graph
    rewrites: tuple[int, int]
    remarks: Remarks
    text: str
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def attentions(self) -> list[fx.Node]:
        return list(self.graph.find_nodes(op="call_function", target=torch.ops.spx.attention.default))

    @property
    def masks(self) -> list[str]:
        """The mask of each attention; '+ alibi' where it has slopes, '+ bias' where something dense is left."""
        marks = [" + alibi" if len(n.args) > 11 and n.args[11] is not None else "" for n in self.attentions]
        marks = [m + (" + bias" if n.args[8] is not None else "") for m, n in zip(marks, self.attentions, strict=True)]
        return [f"{n.args[9]}{mark}" for n, mark in zip(self.attentions, marks, strict=True)]

    @property
    def mask(self) -> AttentionMask:
        """The mask of the only attention, which has no bias."""
        (node,) = self.attentions
        assert node.args[8] is None, self.text
        return AttentionMask.parse(str(node.args[9]))

    @property
    def codes(self) -> list[str]:
        return [remark.code for remark in self.remarks.rows]

    def sizes(self) -> list[tuple[Any, ...]]:
        values = [n.meta.get("val") for n in self.graph.nodes]
        return [tuple(v.shape) for v in values if isinstance(v, Tensor)]

    def ops(self) -> set[str]:
        return {str(n.target) for n in self.graph.nodes if n.op == "call_function"}


def graph_text(gm: fx.GraphModule) -> str:
    """One line per value, without source lines."""
    return "".join(line for line in format_graph(gm).splitlines(True) if not line.startswith("#"))


def rewrite(
    function: Callable[..., Any], inputs: Sequence[Any], dynamic: int | None = None, tolerance: float = 1e-12
) -> Rewritten:
    """Run both passes twice on the captured graph of `function`; the second run must change nothing.

    dynamic: a dim that is a symbol in every tensor that has it at the size of the first input's.
    tolerance: of the errors.
    errors: greatest difference of outputs and of the inputs' gradients between `function` and the rewritten graph.
    """
    torch._dynamo.reset()
    found: list[Rewritten] = []

    def backend(gm: fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        captured = capture(gm, examples)
        found.append(run_passes(captured))
        return captured.forward

    if dynamic is not None:
        length = inputs[0].shape[dynamic]
        for x in inputs:
            for dim in range(x.ndim):
                if x.shape[dim] == length:
                    torch._dynamo.mark_dynamic(x, dim)
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    expected, expected_grads = _outputs_and_gradients(function, inputs)
    actual, actual_grads = _outputs_and_gradients(compiled, inputs)
    (rewritten,) = found
    for name, a, b in [("out", actual, expected), ("grad", actual_grads, expected_grads)]:
        assert len(a) == len(b)
        rewritten.errors |= {f"{name}{i}": difference(x, y) for i, (x, y) in enumerate(zip(a, b, strict=True))}
    assert max(rewritten.errors.values()) < tolerance, rewritten.errors
    return rewritten


def run_passes(captured: fx.GraphModule) -> Rewritten:
    context = Context(MeshShape.of({"cp": 2}), Options(), Remarks())
    rewrites = tuple(each.run(captured, context) for each in (RecognizeAttention(), RecognizeMask()))
    text = graph_text(captured)
    again = Context(context.mesh, context.options, Remarks())
    assert [each.run(captured, again) for each in (RecognizeAttention(), RecognizeMask())] == [0, 0]
    assert graph_text(captured) == text, "the passes are not idempotent"
    captured.graph.lint()
    assert all("val" in n.meta for n in captured.graph.nodes if n.op != "output")
    return Rewritten(captured.graph, rewrites, context.remarks, text)  # type: ignore[arg-type]


def difference(x: Tensor | None, y: Tensor | None) -> float:
    """Greatest absolute difference; NaN nowhere."""
    if x is None or y is None:
        assert x is y
        return 0.0
    assert x.shape == y.shape
    assert x.dtype == y.dtype
    assert not x.isnan().any()
    return float((x.double() - y.double()).abs().max())


def _outputs_and_gradients(
    function: Callable[..., Any], inputs: Sequence[Any]
) -> tuple[list[Tensor], list[Tensor | None]]:
    outputs = [x for x in pytree.tree_leaves(function(*inputs)) if isinstance(x, Tensor)]
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    generator = torch.Generator().manual_seed(7)
    loss = sum((o * torch.randn(o.shape, generator=generator, dtype=o.dtype)).sum() for o in outputs if o.requires_grad)
    assert isinstance(loss, Tensor)
    return [o.detach() for o in outputs], list(torch.autograd.grad(loss, leaves, allow_unused=True))


def qkv(heads: int = 4, key_heads: int | None = None, queries: int = 12, keys: int | None = None) -> tuple[Tensor, ...]:
    """Queries [2, heads, queries, 6], keys and values [2, key_heads, keys, 6]: float64 leaves."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, queries, 6)] + [(2, key_heads or heads, keys or queries, 6)] * 2
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes)
