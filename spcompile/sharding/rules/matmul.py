"""Products that contract factors: `a b c, d c -> a b d | c: sum`.

With a bias the contracted factor is replicated: every rank would add the bias to its partial sum.
"""

from __future__ import annotations

import torch
import torch.fx as fx

from spcompile.graph.aten_ops import overloads
from spcompile.graph.einsum import letters_of
from spcompile.graph.sizes import same
from spcompile.sharding.rules.calls import arguments
from spcompile.sharding.rules.factors import Dim, Factor, broadcast_factors, factors, make_rule
from spcompile.sharding.rules.rule import OpRule, register, tensor_results

aten = torch.ops.aten


@register(aten.linear.default)
def linear(node: fx.Node) -> OpRule:
    """`a b d, c d -> a b c | d: sum`; a weight [d] gives no c."""
    args = arguments(node)
    *rows, contracted = factors(args["input"].shape)
    columns = factors(args["weight"].shape[:-1])
    contracted.replicated = args["bias"] is not None
    contracts = [contracted] if contracted.replicated else []
    operands = {"input": [*rows, contracted], "weight": [*columns, contracted]}
    if args["bias"] is not None:
        operands["bias"] = columns if args["bias"].ndim else []
    fills = {"input": 0.0, "weight": 0.0}
    return make_rule(node, operands, [[*rows, *columns]], sums=[contracted], contracts=contracts, fills=fills)


@register(*overloads("matmul mm bmm mv dot vdot inner"))
def matmul(node: fx.Node) -> OpRule | None:
    """`a b d, a d c -> a b c | d: sum` for all ranks; leading dims broadcast."""
    args = arguments(node)
    names = [name for name, value in args.items() if isinstance(value, torch.Tensor)]
    x, y = (args[name].shape for name in names)
    if node.target is aten.inner.default and len(y) > 1:
        return None
    out = factors(tensor_results(node)[0].shape)
    contracted = Factor(x[-1])
    row = [out[-1 if len(y) == 1 else -2]] if len(x) > 1 else []
    column = [out[-1]] if len(y) > 1 else []
    batch = out[: len(out) - len(row) - len(column)]
    x_batch, y_batch = broadcast_factors(x[:-2], batch), broadcast_factors(y[:-2], batch)
    if x_batch is None or y_batch is None:
        return None
    operands = {
        names[0]: [*x_batch, *row, contracted],
        names[1]: [*y_batch, contracted, *column],
    }
    return make_rule(node, operands, [out], sums=[contracted], fills=dict.fromkeys(names, 0.0))


@register(*overloads("addmm baddbmm addmv"))
def matmul_with_bias(node: fx.Node) -> OpRule | None:
    """`a b, a [c], [c] b -> a b`; the first operand broadcasts."""
    args = arguments(node)
    out = factors(tensor_results(node)[0].shape)
    x, y = [name for name, value in args.items() if isinstance(value, torch.Tensor)][1:]
    bias = broadcast_factors(args["self"].shape, out)
    if bias is None:
        return None
    contracted = Factor(args[x].shape[-1], replicated=True)
    if node.target is aten.addmv.default:
        return make_rule(node, {"self": bias, x: [*out, contracted], y: [contracted]}, [out], contracts=[contracted])
    *batch, row, column = out
    operands = {"self": bias, x: [*batch, row, contracted], y: [*batch, contracted, column]}
    return make_rule(node, operands, [out], contracts=[contracted])


@register(*overloads("outer ger"))
def outer(node: fx.Node) -> OpRule:
    """`a, b -> a b`."""
    row, column = factors(tensor_results(node)[0].shape)
    return make_rule(node, {"self": [row], "vec2": [column]}, [[row, column]])


@register(aten.tensordot.default)
def tensordot(node: fx.Node) -> OpRule:
    """`a c d, c d b -> a b | c: sum, d: sum`."""
    args = arguments(node)
    x, y = factors(args["self"].shape), factors(args["other"].shape)
    contracted = []
    for i, j in zip(args["dims_self"], args["dims_other"], strict=True):
        if same(x[i].size, y[j].size):
            y[j] = x[i]
            contracted.append(x[i])
        else:  # one of them is 1, the other is summed alone
            contracted += [x[i], y[j]]
    out = [factor for factor in [*x, *y] if factor not in contracted]
    return make_rule(node, {"self": x, "other": y}, [out], sums=contracted, fills={"self": 0.0, "other": 0.0})


@register(aten.einsum.default)
def einsum(node: fx.Node) -> OpRule | None:
    """The equation itself; None where an operand repeats a letter (a diagonal)."""
    args = arguments(node)
    inputs, output = letters_of(args["equation"], [t.ndim for t in args["tensors"]])
    known: dict[str, Factor] = {}
    layouts: list[list[Dim]] = []
    for letters, tensor in zip(inputs, args["tensors"], strict=True):
        if len(set(letters)) < len(letters):
            return None
        layout: list[Dim] = []
        for letter, size in zip(letters, tensor.shape, strict=True):
            factor = known.setdefault(letter, Factor(size)) if not same(size, 1) else None
            if factor is not None and not same(factor.size, size):
                return None
            layout.append(factor or ())
        layouts.append(layout)
    sums = [factor for letter, factor in known.items() if letter not in output]
    out = [known.get(letter, ()) for letter in output]
    return make_rule(node, {"tensors": layouts}, [out], sums=sums, fills={"tensors": 0.0})
