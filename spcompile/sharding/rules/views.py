"""Ops that rearrange dims without changing elements: `a (b c) -> a b c`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.fx as fx

from spcompile.graph.aten_ops import EXPANDS, PERMUTES, RESHAPES, overloads
from spcompile.graph.sizes import same
from spcompile.graph.typed_call import named_arguments
from spcompile.sharding.rules.calls import arguments, known_multiple
from spcompile.sharding.rules.factors import Dim, Factor, factors, make_rule
from spcompile.sharding.rules.rule import LocalCall, OpRule, Size, register, tensor_results


def split_dims(shape: list[Size], new_shape: list[Size]) -> tuple[list[Dim], list[Dim]]:
    """The dims of both sides of a reshape as products of shared factors.

    Sizes are matched from left to right: `[4, 6] -> [24]` shares 4 and 6, `[4, 6] -> [2, 2, 6]` shares 2, 2 and 6.
    Where a dim's end falls inside a factor (`[4, 6] -> [6, 4]`), the dims up to the next common end are replicated.
    """
    left: list[list[Factor]] = [[] for _ in shape]
    right: list[list[Factor]] = [[] for _ in new_shape]
    rest, new_rest = list(shape), list(new_shape)  # what is left of each dim
    i = j = 0
    while i < len(shape) and j < len(new_shape):
        if same(rest[i], 1) or same(new_rest[j], 1):
            i, j = i + same(rest[i], 1), j + same(new_rest[j], 1)
            continue
        if same(rest[i], new_rest[j]):
            size = rest[i]
        elif known_multiple(new_rest[j], rest[i]):
            size = new_rest[j]
        elif known_multiple(rest[i], new_rest[j]):
            size = rest[i]
        else:
            end, new_end = _common_end(rest[i:], new_rest[j:])
            for dims, sizes in ((left[i : i + end], rest[i:]), (right[j : j + new_end], new_rest[j:])):
                for dim, whole in zip(dims, sizes, strict=False):
                    dim.append(Factor(whole, replicated=True))
            i, j = i + end, j + new_end
            continue
        factor = Factor(size)
        left[i].append(factor)
        right[j].append(factor)
        rest[i], new_rest[j] = rest[i] // size, new_rest[j] // size
    for dims, sizes, start in ((left, rest, i), (right, new_rest, j)):
        for dim, size in zip(dims[start:], sizes[start:], strict=True):
            dim.append(Factor(size, replicated=True))  # 1, unless sizes are symbols that could not be compared
    return [tuple(dim) for dim in left], [tuple(dim) for dim in right]


def _common_end(shape: list[Size], new_shape: list[Size]) -> tuple[int, int]:
    """How many leading dims of each side hold the same number of elements, at least one of each."""
    product: Size = 1
    for end, size in enumerate(shape, 1):
        product, new_product = product * size, 1
        for new_end, new_size in enumerate(new_shape, 1):
            new_product = new_product * new_size
            if same(product, new_product):
                return end, new_end
    return len(shape), len(new_shape)


def to_local_shape(call: LocalCall) -> Any:
    """Reshapes to the local result shape: sizes among the arguments are global ones."""
    return call.args[0].reshape(call.shapes[0])


@register(*overloads(RESHAPES))
def reshape(node: fx.Node) -> OpRule:
    """`a (b c) -> a b c`, and dims of size 1 come and go."""
    args = arguments(node)
    (result,) = tensor_results(node)
    shape, new_shape = list(args["self"].shape), list(result.shape)
    if any(same(size, 0) for size in shape):
        left: list[Any] = factors(shape, replicated=True)
        right: list[Any] = factors(new_shape, replicated=True)
    else:
        left, right = split_dims(shape, new_shape)
    like = {"other": factors(args["other"].shape)} if "other" in args else {}
    return make_rule(node, {"self": left, **like}, [right], local=to_local_shape, unread=like)


@register(*overloads(PERMUTES))
def permute(node: fx.Node) -> OpRule:
    """`a b c -> a c b`; the order is read off the op itself, run on a tensor of distinct sizes."""
    dims = factors(arguments(node)["self"].shape)
    probe = torch.empty(list(range(2, 2 + len(dims))), device="meta")
    order = [size - 2 for size in node.target(probe, *node.args[1:], **node.kwargs).shape]  # type: ignore[operator]
    return make_rule(node, {"self": dims}, [[dims[i] for i in order]])


def _expand(call: LocalCall) -> Any:
    return call.args[0].expand(call.shapes[0])


@register(*overloads(EXPANDS))
def expand(node: fx.Node) -> OpRule:
    """`a 1 b -> a c b`: the new dim is in no operand."""
    args = arguments(node)
    shape = args["self"].shape
    out = factors(tensor_results(node)[0].shape)
    kept = out[len(out) - len(shape) :]
    dims = [() if same(size, 1) else factor for size, factor in zip(shape, kept, strict=True)]
    like = {"other": out} if "other" in args else {}
    return make_rule(node, {"self": dims, **like}, [out], local=_expand, unread=like)


def _repeat(call: LocalCall) -> Any:
    x = call.args[0]
    shape = call.shapes[0]
    sizes = [1] * (len(shape) - x.ndim) + list(x.shape)
    return x.repeat([new // size for size, new in zip(sizes, shape, strict=True)])


@register(*overloads("repeat tile"))
def repeat(node: fx.Node) -> OpRule:
    """`a b -> a (c b)`."""
    args = arguments(node)
    dims = factors(args["self"].shape)
    times = list(args["repeats"] if "repeats" in args else args["dims"])
    times = [1] * (len(dims) - len(times)) + times
    new = [(Factor(n),) for n in times]
    leading = len(times) - len(dims)
    return make_rule(
        node,
        {"self": dims},
        [[*new[:leading], *((*n, d) for n, d in zip(new[leading:], dims, strict=True))]],
        local=_repeat,
    )


@register(torch.ops.aten.repeat_interleave.self_int)
def repeat_interleave(node: fx.Node) -> OpRule:
    """`a b -> a (b c)`."""
    args = arguments(node)
    dims = factors(args["self"].shape)
    copies = Factor(args["repeats"])
    if args["dim"] is None:
        return make_rule(node, {"self": dims}, [[(*dims, copies)]], local=_repeat_interleave)
    out: list[Dim] = list(dims)
    dim = args["dim"] % len(dims)
    out[dim] = (dims[dim], copies)
    return make_rule(node, {"self": dims}, [out], local=_repeat_interleave)


def _repeat_interleave(call: LocalCall) -> Any:
    args = named_arguments(torch.ops.aten.repeat_interleave.self_int, call.args, call.kwargs)
    x, dim = (args["self"].reshape(-1), 0) if args["dim"] is None else (args["self"], args["dim"])
    return torch.repeat_interleave(x, call.shapes[0][dim] // x.shape[dim], dim)


@register(*overloads("view_as_complex view_as_real"))
def complex_view(node: fx.Node) -> OpRule:
    """`a [b] -> a` and back: the last dim holds a real and an imaginary part."""
    result = tensor_results(node)[0]
    x = arguments(node)["self"]
    parts = Factor(2, replicated=True)
    if result.ndim > x.ndim:
        dims = factors(x.shape)
        return make_rule(node, {"self": dims}, [[*dims, parts]])
    dims = factors(result.shape)
    return make_rule(node, {"self": [*dims, parts]}, [dims], local=_view_as_complex)


def _view_as_complex(call: LocalCall) -> Any:
    """A gather may leave the two parts of a number apart, where the op needs them side by side."""
    x = call.args[0]
    is_paired = x.stride(-1) == 1 and all(stride % 2 == 0 for stride in x.stride()[:-1])
    return torch.view_as_complex(x if is_paired else x.contiguous())


@register(torch.ops.aten.unfold.default)
def unfold(node: fx.Node) -> OpRule:
    """`a [d] -> a [b] [c]`: windows of one dim."""
    args = arguments(node)
    dims = factors(args["self"].shape)
    shape = tensor_results(node)[0].shape
    dim = args["dimension"] % len(dims)
    out = [*dims, Factor(shape[-1], replicated=True)]
    places = dims[dim]
    out[dim] = Factor(shape[dim], replicated=True)
    places.replicated = True
    rule = make_rule(node, {"self": dims}, [out])
    if same(places.size, 1) or same(shape[dim], 1):
        return rule

    def local(call: LocalCall) -> Any:
        return call.args[0].unfold(dim, args["size"], args["step"])

    out[dim].replicated = places.replicated = False
    windows = {out[dim]: (places, args["step"], 0, args["size"], local)}
    return replace(rule, moving=make_rule(node, {"self": dims}, [out], windows=windows))
