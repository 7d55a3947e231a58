"""Ops that cut a dim into parts or put parts together.

The cut dim is replicated, and it is another factor in every tensor: positions in the parts are not positions in the
whole. Slices that start at 0 say so in `prefix_of`.

On an axis whose ranks have parts of their own (`OpRule.apart`), parts that stand behind each other are blocks of one
factor: chosen answers in front, rejected ones behind them, and of both each rank has its entries. On one whose ranks
send each other what is cut and put together (`OpRule.moving`) each part is laid out by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate
from math import prod
from typing import Any

import torch
import torch.fx as fx

from spcompile.graph.aten_ops import overloads
from spcompile.graph.sizes import Size, hint, quotient, same
from spcompile.sharding.rules.calls import arguments, at_least
from spcompile.sharding.rules.factors import Dim, Factor, factors, make_rule
from spcompile.sharding.rules.moving import with_moves
from spcompile.sharding.rules.rule import LocalCall, OpRule, register, tensor_results

aten = torch.ops.aten


def cut(node: fx.Node, operand: str, dims: Sequence[int]) -> OpRule:
    """`a [c] -> a [b]`: `dims` differ, all other dims pass."""
    layout = factors(arguments(node)[operand].shape)
    shapes = [result.shape for result in tensor_results(node)]
    positions = [d % len(layout) for d in dims]
    for d in positions:
        layout[d].replicated = True
    parts = [[Factor(s, True) if d in positions else layout[d] for d, s in enumerate(shape)] for shape in shapes]
    return make_rule(node, {operand: layout}, parts)


def _cut_between_blocks(node: fx.Node, rule: OpRule, dim: int, starts: Sequence[Size]) -> OpRule:
    """`a ([d] n) -> a ([b] n), a ([c] n)` as well, where the parts begin at `starts` and are of whole blocks of n."""
    x = arguments(node)["self"]
    dim, sizes = dim % x.ndim, [part.shape[dim] for part in tensor_results(node)]

    def apart(dims: Sequence[Sequence[Size]]) -> OpRule:
        for place in range(1, len(dims[dim])):
            block = Factor(prod(dims[dim][place:]))
            whole, *counts = _numbers((x.shape[dim], *starts, *sizes), of=block.size)
            firsts, lengths = counts[: len(sizes)], counts[len(sizes) :]
            if whole and None not in firsts and all(lengths):
                return in_blocks(block, whole, firsts, lengths)
        return rule

    def in_blocks(block: Factor, whole: int, firsts: Sequence[Any], lengths: Sequence[Any]) -> OpRule:
        layout: list[Any] = factors(x.shape)

        def blocks(number: int) -> list[Any]:
            return [*layout[:dim], (Factor(number, replicated=True), block), *layout[dim + 1 :]]

        def local(call: LocalCall) -> Any:
            (own, *_), n = call.args, call.args[0].shape[dim] // whole
            pairs = zip(firsts, lengths, strict=True)
            parts = [aten.slice.Tensor(own, dim, first * n, (first + length) * n) for first, length in pairs]
            return parts if isinstance(node.meta["val"], Sequence) else parts[0]

        return make_rule(node, {"self": blocks(whole)}, [blocks(n) for n in lengths], local=local)

    return replace(rule, apart=apart)


def _numbers(sizes: Iterable[Size], *, of: Size) -> list[int | None]:
    """How many blocks each size is; None for one that is not a number of them."""
    found = (quotient(size, of) for size in sizes)
    return [number if isinstance(number, int) else None for number in found]


@register(*overloads("chunk split.Tensor split.sizes split_with_sizes tensor_split.sections tensor_split.indices"))
def split(node: fx.Node) -> OpRule:
    """`a [d] -> a [b], a [c]`; a single part is the whole."""
    parts, dim = tensor_results(node), arguments(node)["dim"]
    if len(parts) == 1:
        return cut(node, "self", [])
    starts = [0, *accumulate(part.shape[dim] for part in parts)][:-1]
    rule = _cut_between_blocks(node, cut(node, "self", [dim]), dim, starts)
    moves = [(0, number, start, 0, parts[number].shape[dim]) for number, start in enumerate(starts)]
    return with_moves(node, rule, dim, moves)


@register(aten.glu.default)
def glu(node: fx.Node) -> OpRule:
    """`a [c] -> a [b]`: one half gates the other."""
    return cut(node, "self", [arguments(node)["dim"]])


@register(*overloads("constant_pad_nd pad"))
def pad(node: fx.Node) -> OpRule:
    """`a [c] -> a [b]`; the padded dims are counted from the last."""
    args = arguments(node)
    amounts = args["pad"]
    padded = [-1 - i // 2 for i in range(0, len(amounts), 2) if not all(same(n, 0) for n in amounts[i : i + 2])]
    rule = cut(node, "self", padded)
    is_zero = not args["value"] and args.get("mode", "constant") == "constant"
    if len(padded) != 1 or not is_zero or not all(isinstance(n, int) for n in amounts):
        return rule
    (dim,) = padded
    before, after = amounts[-2 * (dim + 1) : -2 * (dim + 1) + 2] if dim != -1 else amounts[:2]
    first, kept = max(-before, 0), args["self"].shape[dim] - max(-before, 0) - max(-after, 0)
    return with_moves(node, rule, dim, [(0, 0, first, max(before, 0), kept)])


def _identity(call: LocalCall) -> Any:
    return call.args[0]


@register(aten.slice.Tensor)
def slice_(node: fx.Node) -> OpRule:
    """`a [c] -> a [b]`, b a prefix of c if the slice starts at 0; a slice of everything is the identity."""
    args = arguments(node)
    return _slice(node, args["dim"], 0 if args["start"] is None else args["start"], args["step"])


@register(aten.narrow.default)
def narrow(node: fx.Node) -> OpRule:
    """`a [c] -> a [b]`, as slice."""
    args = arguments(node)
    return _slice(node, args["dim"], args["start"], 1)


def _slice(node: fx.Node, dim: int, start: Size, step: Size) -> OpRule:
    operand = factors(arguments(node)["self"].shape)
    whole, length = operand[dim].size, tensor_results(node)[0].shape[dim]
    if same(step, 1) and same(length, whole):
        return make_rule(node, {"self": operand}, [operand], local=_identity)
    if at_least(-1, start):
        start = 0 if at_least(-whole, start) else start + whole  # a start before the first is the first
    result = list(operand)
    operand[dim].replicated = True
    result[dim] = Factor(length, replicated=True)
    prefix = {result[dim]: operand[dim]} if same(start, 0) and same(step, 1) else None
    rule = make_rule(node, {"self": operand}, [result], prefix_of=prefix)
    if not same(step, 1):
        return _one_of_each_group(node, _every(node, rule, dim, start, step), dim, start, step)
    rule = _cut_between_blocks(node, rule, dim, [start])
    is_most = prefix is not None and 4 * hint(length) >= 3 * hint(whole)  # what the others have is little padding
    moves = with_moves(node, rule, dim, [(0, 0, start, 0, length)])
    return replace(rule, alone=moves.moving) if is_most else moves


def _every(node: fx.Node, rule: OpRule, dim: int, start: Size, step: Size) -> OpRule:
    """`rule`, and where ranks send each other rows: each place of the result is made of one, `step` from the last."""
    operand = factors(arguments(node)["self"].shape)
    result = list(operand)
    result[dim] = Factor(tensor_results(node)[0].shape[dim])
    if same(operand[dim].size, 1) or same(result[dim].size, 1):
        return rule

    def local(call: LocalCall) -> Any:
        x = call.args[0]
        return aten.slice.Tensor(x, dim, 0, x.shape[dim], step)

    windows = {result[dim]: (operand[dim], step, -start, 1, local)}
    return replace(rule, moving=make_rule(node, {"self": operand}, [result], windows=windows))


def _one_of_each_group(node: fx.Node, rule: OpRule, dim: int, start: Size, step: Size) -> OpRule:
    """`a (b [c]) -> a b` of slices that take one of every `step` elements, as gates and values that take turns.

    Where ranks send each other rows, or have parts of their own from the start, what `rule` says is kept.
    """
    dims: list[Dim] = [*factors(arguments(node)["self"].shape)]
    whole, length = arguments(node)["self"].shape[dim], tensor_results(node)[0].shape[dim]
    if not all(isinstance(size, int) for size in (whole, length, start, step)):
        return rule
    if whole != length * step or start >= step:
        return rule
    groups = Factor(length)
    result = [*dims]
    dims[dim], result[dim] = (groups, Factor(step, replicated=True)), groups

    def local(call: LocalCall) -> Any:
        x = call.args[0]
        return aten.slice.Tensor(x, dim, start, x.shape[dim], step)

    return replace(
        make_rule(node, {"self": dims}, [result], local=local),
        moving=rule.moving,
        apart=lambda _: replace(rule, moving=None),
    )


@register(*overloads("select.int unbind.int"))
def select(node: fx.Node) -> OpRule:
    """`a [c] b -> a b`."""
    args = arguments(node)
    dims = factors(args["self"].shape)
    chosen = dims[args["dim"]]
    chosen.replicated = True
    out = [factor for factor in dims if factor is not chosen]
    rule = make_rule(node, {"self": dims}, [out for _ in tensor_results(node)])
    if node.target is not aten.select.int:
        return rule
    index = args["index"] if at_least(args["index"], 0) else args["index"] + chosen.size
    return with_moves(node, rule, args["dim"], [(0, 0, index, 0, 1)])


@register(*overloads("slice_scatter select_scatter"))
def scatter_part(node: fx.Node) -> OpRule:
    """`a [b], a [c] -> a [b]`: a part of one dim is overwritten."""
    args = arguments(node)
    dims = factors(args["self"].shape)
    dim = args["dim"] % len(dims)
    dims[dim].replicated = True
    part = list(dims)
    if len(args["src"].shape) < len(dims):
        del part[dim]
    else:
        part[dim] = Factor(args["src"].shape[dim], replicated=True)
    return make_rule(node, {"self": dims, "src": part}, [dims])


@register(*overloads("cat concat concatenate"))
def cat(node: fx.Node) -> OpRule:
    """`a [c], a [d] -> a [b]`; with one operand that is not empty, `a b, a [c] -> a b`."""
    args = arguments(node)
    tensors = args["tensors"]
    out = factors(tensor_results(node)[0].shape)
    dim = args["dim"] % len(out)
    filled = [t for t in tensors if not any(same(size, 0) for size in t.shape)]
    if len(filled) > 1 or not filled:
        out[dim].replicated = True
    layouts = []
    for tensor in tensors:
        layout: list[Factor] = factors(tensor.shape, replicated=True)
        if tensor.ndim == len(out):  # not so for the empty 1-D tensor that cat ignores
            layout = [layout[d] if d == dim else factor for d, factor in enumerate(out)]
        layouts.append(out if len(filled) == 1 and tensor is filled[0] else layout)
    rule = make_rule(node, {"tensors": layouts}, [out])
    if not len(filled) == len(tensors) > 1:
        return rule
    lengths = [t.shape[dim] for t in tensors]
    starts = [0, *accumulate(lengths)][:-1]
    moves = [(number, 0, 0, start, lengths[number]) for number, start in enumerate(starts)]
    return with_moves(node, _joined_blocks(node, rule, dim), dim, moves)


def _joined_blocks(node: fx.Node, rule: OpRule, dim: int) -> OpRule:
    """`a ([c] n), a ([d] n) -> a ([b] n)` as well, where n is as long as one of the operands."""
    tensors, (out,) = arguments(node)["tensors"], tensor_results(node)
    sizes = [t.shape[dim] for t in tensors]
    block = Factor(min(sizes, key=hint))
    whole, *numbers = _numbers((out.shape[dim], *sizes), of=block.size)
    if same(block.size, 1) or whole is None or None in numbers:
        return rule
    layout: list[Any] = factors(out.shape)
    blocks = [[*layout[:dim], (Factor(n, replicated=True), block), *layout[dim + 1 :]] for n in (*numbers, whole)]
    in_blocks = make_rule(node, {"tensors": blocks[:-1]}, blocks[-1:])
    return replace(rule, apart=lambda _: in_blocks)


@register(aten.stack.default)
def stack(node: fx.Node) -> OpRule:
    """`b c, b c -> [a] b c`."""
    args = arguments(node)
    out = factors(tensor_results(node)[0].shape)
    new = out[args["dim"]]
    new.replicated = True
    dims = [factor for factor in out if factor is not new]
    return make_rule(node, {"tensors": [dims for _ in args["tensors"]]}, [out])


@register(*overloads("hstack vstack"))
def stacked(node: fx.Node) -> OpRule | None:
    """`[a] b, [c] b -> [d] b`, for operands that have the rank of the result."""
    tensors = arguments(node)["tensors"]
    out = factors(tensor_results(node)[0].shape)
    if any(t.ndim != len(out) for t in tensors):
        return None
    dim = 1 if node.target is aten.hstack.default and len(out) > 1 else 0
    out[dim].replicated = True
    layouts = [[Factor(t.shape[d], True) if d == dim else f for d, f in enumerate(out)] for t in tensors]
    return make_rule(node, {"tensors": layouts}, [out])


@register(aten.diff.default)
def diff(node: fx.Node) -> OpRule:
    """`a [c] -> a [b]`; prepended and appended parts are `a [d]`."""
    args = arguments(node)
    dims, shape = factors(args["self"].shape), tensor_results(node)[0].shape
    dim = args["dim"] % len(dims)
    dims[dim].replicated = True
    operands = {"self": dims}
    for name in ("prepend", "append"):
        if args[name] is not None:
            operands[name] = [Factor(args[name].shape[d], True) if d == dim else f for d, f in enumerate(dims)]
    out = [Factor(shape[d], True) if d == dim else f for d, f in enumerate(dims)]
    return make_rule(node, operands, [out])


@register(aten.meshgrid.default, aten.meshgrid.indexing)
def meshgrid(node: fx.Node) -> OpRule | None:
    """`a, b -> a b, a b`."""
    args = arguments(node)
    out = factors(tensor_results(node)[0].shape)
    if any(t.ndim != 1 for t in args["tensors"]):
        return None
    order = [1, 0, *range(2, len(out))] if args.get("indexing") == "xy" and len(out) > 1 else range(len(out))
    return make_rule(node, {"tensors": [[out[d]] for d in order]}, [out for _ in tensor_results(node)])
