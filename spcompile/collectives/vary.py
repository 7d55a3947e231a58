"""spx.vary: from here on the ranks use a value differently, so its gradients are to be summed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.fx as fx
from torch import Tensor

from spcompile.collectives.collective import Call, Size, define

SCHEMA = "vary(Tensor x, str axis, int degree) -> Tensor"

DRAWING = """\
rank 0   [a b]        [a b]
rank 1   [a b]   ->   [a b]
rank 2   [a b]        [a b]"""


def fake(x: Tensor, axis: str, degree: int) -> Tensor:
    return x.new_empty(x.shape)


def spec(parts: Sequence[Tensor], axis: str, degree: int) -> list[Tensor]:
    return [x.clone(memory_format=torch.contiguous_format) for x in parts]


def lowered(x: Tensor, axis: str, degree: int) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def dual(x: Tensor, axis: str, degree: int) -> Call:
    return Call({"axis": axis, "degree": degree, "to": "I"}, torch.ops.spx.all_reduce.default)


def sent(x: Tensor, axis: str, degree: int) -> Size:
    return 0


def examples(length: int, degree: int) -> Iterator[Call]:
    yield Call({"axis": "cp", "degree": degree}, shape=(2, length))


def erase_identities(graph: fx.Graph) -> int:
    """Replace every `vary` by its operand; returns how many. Only after autograd: before, it would lose the sum.

    Where the operand is not row-major a copy takes its place, so that no later node sees other strides.
    """
    erased = 0
    for node in graph.find_nodes(op="call_function", target=VARY.op):
        operand = node.args[0]
        if operand.meta["val"].stride() == node.meta["val"].stride():
            node.replace_all_uses_with(operand)
            graph.erase_node(node)
        else:
            node.target = torch.ops.aten.clone.default
            node.args, node.kwargs = (operand,), {"memory_format": torch.contiguous_format}
        erased += 1
    return erased


VARY = define(
    SCHEMA,
    summary="Identity in data; in the backward graph the ranks' gradients are summed. Erased after autograd.",
    states={"": ("I", "R")},
    drawing=DRAWING,
    formula="0",
    fake=fake,
    lowered=lowered,
    spec=spec,
    sent=sent,
    dual=dual,
    examples=examples,
)
