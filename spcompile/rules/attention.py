"""The rule of `spx::attention`, the one op that pairs two factors: keys are split wherever query rows are."""

from __future__ import annotations

import torch
import torch.fx as fx

import spcompile.attention.op  # noqa: F401  (defines the op)
from spcompile.rules.base import Dims, OpRule, register, tensor_operands
from spcompile.sizes import Size, same


@register(torch.ops.spx.attention.default)
def attention(node: fx.Node) -> OpRule:
    """Q "b n s h", k "b g t h", v "b g t v" -> out "b n s v", lse "b n s"; t follows s.

    The mask's vectors and the columns of a dense bias are read whole: their factors are replicated.
    """
    q, k, v, *rest = tensor_operands(node)
    q_BNSH, k_BGTH, v_BGTV = (x.meta["val"] for x in (q, k, v))
    sizes: dict[str, Size] = dict(zip("bnsh", q_BNSH.shape, strict=True))
    sizes |= {"g": k_BGTH.shape[1], "t": k_BGTH.shape[2], "v": v_BGTV.shape[3]}
    bias = node.args[8] if len(node.args) > 8 else None
    operands: list[Dims] = [_dims("bnsh", sizes), _dims("bgth", sizes), _dims("bgtv", sizes)]
    for number, operand in enumerate(rest):
        names = [f"m{number}{dim}" for dim in range(operand.meta["val"].ndim)]
        if operand is bias:
            names = [name if name in "bns" else f"m{number}3" for name in "bnst"]
        extents = operand.meta["val"].shape
        operands.append(tuple(() if same(e, 1) else (name,) for name, e in zip(names, extents, strict=True)))
        sizes |= {name: e for name, e in zip(names, extents, strict=True) if not same(e, 1) and name not in sizes}
    shardable = {"b", "n", "s", "t"} if same(sizes["n"], sizes["g"]) and not rest else {"s", "t"}
    return OpRule(
        operands=tuple(operands),
        results=(_dims("bnsv", sizes), _dims("bns", sizes)),
        sizes=sizes,
        replicated=frozenset(sizes) - shardable,
        paired={"s": "t"},
    )


def _dims(names: str, sizes: dict[str, Size]) -> Dims:
    return tuple(() if same(sizes[name], 1) else (name,) for name in names)
