"""Ops on matrices: those of the last two dims, each by itself. Leading dims pass: `a [b] [c] -> a [d]`.

Where ranks have uneven parts, padding holds no matrix that has an inverse: there it is the unit matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from spcompile.graph.aten_ops import overloads
from spcompile.sharding.rules.calls import arguments
from spcompile.sharding.rules.factors import Dim, Factor, broadcast_factors, factors, make_rule
from spcompile.sharding.rules.rule import Dims, LocalCall, OpRule, register, tensor_results

OF_ONE_MATRIX = """
    cholesky cholesky_inverse det inverse linalg_cholesky linalg_cholesky_ex linalg_det linalg_eigh linalg_eigvalsh
    linalg_inv linalg_inv_ex linalg_matrix_exp linalg_matrix_power linalg_pinv linalg_pinv.atol_rtol_float
    linalg_pinv.atol_rtol_tensor linalg_qr linalg_slogdet linalg_svd linalg_svdvals logdet matrix_exp matrix_power
    pinverse slogdet
"""
SOLUTIONS = "cholesky_solve linalg_solve linalg_solve_triangular"


@register(*overloads(OF_ONE_MATRIX))
def of_one_matrix(node: fx.Node) -> OpRule | None:
    """`a [b] [c] -> a [d]`; thresholds that are tensors have no rule."""
    (name, matrix), *others = [(n, v) for n, v in arguments(node).items() if isinstance(v, Tensor)]
    if others:
        return None
    batch = factors(matrix.shape[:-2])
    results: list[list[Dim]] = [
        [*batch, *factors(result.shape[len(batch) :], replicated=True)] for result in tensor_results(node)
    ]
    dims = [*batch, *factors(matrix.shape[-2:], replicated=True)]
    op: Any = node.target

    def local(call: LocalCall) -> Any:
        return op(_without_padding(call, call.args[0], rule.operands[0]), *call.args[1:], **call.kwargs)

    rule = make_rule(node, {name: dims}, results, ordered=_split(batch), local=local)
    return rule


@register(*overloads(SOLUTIONS))
def solution(node: fx.Node) -> OpRule | None:
    """`a [d] [e], a [f] b -> a [c] b`: a column of the result is of one column, from the right a row of one row."""
    args, (result,) = arguments(node), tensor_results(node)
    names = [name for name, value in args.items() if isinstance(value, Tensor)]
    of, matrix = names if node.target is torch.ops.aten.cholesky_solve.default else reversed(names)
    given, inverted = args[of].shape, args[matrix].shape
    if result.ndim != max(len(given), len(inverted)) or len(given) < 2 or result.shape[-2:] != given[-2:]:
        return None  # a vector for each matrix
    batch = factors(result.shape[:-2])
    rows, columns = factors(result.shape[-2:])
    (rows if args.get("left", True) else columns).replicated = True
    leading = [broadcast_factors(shape[:-2], batch) for shape in (given, inverted)]
    if leading[0] is None or leading[1] is None:
        return None
    own = factors(inverted[-2:], replicated=True)
    at = names.index(matrix)
    op: Any = node.target

    def local(call: LocalCall) -> Any:
        given = list(call.args)
        given[at] = _without_padding(call, given[at], rule.operands[at])
        return op(*given, **call.kwargs)

    operands = {of: [*leading[0], rows, columns], matrix: [*leading[1], *own]}
    rule = make_rule(node, operands, [[*batch, rows, columns]], ordered=_split(batch), local=local)
    return rule


def _split(dims: Sequence[Dim]) -> list[Factor]:
    return [dim for dim in dims if isinstance(dim, Factor)]


def _without_padding(call: LocalCall, x: Tensor, dims: Dims) -> Tensor:
    """Square matrices [..., N, N] of which those that are padding are unit matrices."""
    if (call.factor,) not in dims[:-2] or x.shape[-1] != x.shape[-2]:
        return x
    assert call.ranks is not None
    dim = dims.index((call.factor,))
    place = call.ranks.first(call.global_size, x.device) + torch.arange(x.shape[dim], device=x.device)
    is_real = (place < call.global_size).view(-1, *[1] * (x.dim() - 1 - dim))
    return torch.where(is_real, x, torch.eye(x.shape[-1], dtype=x.dtype, device=x.device))


@register(*overloads("tril triu"))
def triangle(node: fx.Node) -> OpRule:
    """`a b c -> a b c`: a rank that has some of the rows or columns knows which."""
    args = arguments(node)
    dims = factors(args["self"].shape)
    op: Any = node.target

    def local(call: LocalCall) -> Any:
        x, names = call.args[0], rule.results[0][-2:]
        if (call.factor,) not in names:
            return op(*call.args, **call.kwargs)
        assert call.ranks is not None
        row, column = (torch.arange(size, device=x.device) for size in x.shape[-2:])
        first = call.ranks.first(call.global_size, x.device)
        above = column - row[:, None] + (first if names[1] == (call.factor,) else -first)
        is_kept = above <= args["diagonal"] if op is torch.ops.aten.tril.default else above >= args["diagonal"]
        return torch.where(is_kept, x, torch.zeros((), dtype=x.dtype, device=x.device))

    rule = make_rule(node, {"self": dims}, [dims], ordered=_split(dims[-2:]), local=local)
    return rule
