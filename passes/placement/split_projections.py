"""split-projections: a product's bias, and its cuts into several projections, become ops of their own.

linear(x, w, b)                  linear(x, w) + b                           a sum that tp splits must add b once
split(linear(x, w), [q, k, v])   linear(x, w_q), linear(x, w_k), linear(x, w_v)   each has heads of its own to split
split(x @ w + b, ...)            likewise, through additions, changes of other dims, and convolutions of each channel
split(x, [s, t]) of rows         x[:s], x[s:]                               through which parts of a sum can pass
(x + b)[:s] of rows              x[:s] + b                                  likewise
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx
from torch import Tensor

from spcompile.graph.edit import argument, call, is_getitem, is_tensor, operand, replace, shape_of
from spcompile.graph.sizes import same
from spcompile.passes_api import Context, Example, Pass, Stage
from spcompile.sharding.rules import rule_of

aten = torch.ops.aten
_PRODUCTS = ("aten::mm", "aten::matmul", "aten::bmm", "aten::_grouped_mm", "transformers::grouped_mm_fallback")
_CHUNKS = (aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes, aten.chunk.default)
_MOVES = (aten.transpose.int, aten.permute.default, aten.t.default, aten._to_copy.default, aten.to.dtype)


@dataclass(frozen=True)
class SplitProjections(Pass):
    """Take biases out of products, and cut weights instead of what they project."""

    name: ClassVar[str] = "split-projections"
    stage: ClassVar[Stage] = Stage.GLOBAL
    after: ClassVar[frozenset[str]] = frozenset({"lower"})
    summary: ClassVar[str] = "takes biases out of products and cuts fused projections, so that tp can split them"
    axis: ClassVar[str | None] = "tp"

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        """Returns how many products were rewritten."""
        graph = gm.graph
        biased = [n for n in graph.nodes if n.target in (aten.linear.default, aten.addmm.default) and _bias(n)]
        for node in biased:
            _take_out_bias(node)
        cuts = 0
        for node in [n for n in graph.nodes if n.target in _CHUNKS]:
            if _is_projection(node):  # of the parts of an earlier one, maybe
                _cut_projection(node)
                cuts += 1
        slices = [n for n in graph.nodes if n.target is aten.slice.Tensor and _is_slice_of_projection(n)]
        for node in slices:
            replace(node, _range_of(node.args[0], len(shape_of(node)) - 1, *_range(node), like=node))
        parted = [n for n in graph.nodes if n.target in _CHUNKS and _cuts_rows(n)]
        for node in parted:
            _slice_rows(node)
        biased_rows = [n for n in graph.nodes if n.target is aten.slice.Tensor and _cuts_biased_rows(n)]
        for node in biased_rows:
            _slice_before_bias(node)
        if biased or cuts or slices or parted or biased_rows:
            graph.eliminate_dead_code()
        return len(biased) + cuts + len(slices) + len(parted) + len(biased_rows)


def _bias(node: fx.Node) -> fx.Node | None:
    if node.target is aten.linear.default:
        return argument(node, 2, "bias")
    is_plain = argument(node, 3, "beta", 1) == 1 and argument(node, 4, "alpha", 1) == 1
    return argument(node, 0, "self") if is_plain else None


def _take_out_bias(node: fx.Node) -> None:
    bias = _bias(node)
    if node.target is aten.linear.default:
        product = call(node.graph, aten.linear.default, (node.args[0], node.args[1]), like=node)
    else:
        product = call(node.graph, aten.mm.default, (node.args[1], node.args[2]), like=node)
    replace(node, call(node.graph, aten.add.Tensor, (product, bias), like=node))


def _is_projection(node: fx.Node) -> bool:
    """Whether what a weight gives is cut, and by getitems only."""
    x = node.args[0]
    if not is_tensor(x) or not all(is_getitem(user) for user in node.users):
        return False
    return _comes_from_product(x, argument(node, 2, "dim", 0) % len(shape_of(x)))  # type: ignore[arg-type]


def _is_slice_of_projection(node: fx.Node) -> bool:
    x = node.args[0]
    dim, step = argument(node, 1, "dim", 0), argument(node, 4, "step", 1)
    is_last = is_tensor(x) and step == 1 and dim in (-1, len(shape_of(x)) - 1)  # type: ignore[arg-type]
    if not is_last or same(shape_of(node)[-1], shape_of(x)[-1]):  # type: ignore[arg-type]
        return False
    cut_everywhere = all(user.target is aten.slice.Tensor for user in x.users)  # type: ignore[union-attr]
    return cut_everywhere and _comes_from_product(x, len(shape_of(x)) - 1)  # type: ignore[arg-type]


def _cuts_rows(node: fx.Node) -> bool:
    """Whether the last dim but one of [..., S, D] is cut, at places that are known."""
    x, dim = node.args[0], argument(node, 2, "dim", 0)
    is_row = is_tensor(x) and len(shape_of(x)) > 2 and dim in (-2, len(shape_of(x)) - 2)  # type: ignore[arg-type]
    known = is_row and all(isinstance(part.shape[dim], int) for part in node.meta["val"])
    return known and all(is_getitem(user) for user in node.users)


def _slice_rows(node: fx.Node) -> None:
    for part, dim, start, stop in _parts_read(node):
        replace(part, call(node.graph, aten.slice.Tensor, (node.args[0], dim, start, stop), like=part))


def _parts_read(node: fx.Node) -> Iterator[tuple[fx.Node, int, int, int]]:
    """(a part that is read, the dim that is cut, its first index, the one behind its last) of a split."""
    start, dim = 0, argument(node, 2, "dim", 0) % len(shape_of(node.args[0]))  # type: ignore[arg-type]
    parts = {user.args[1]: user for user in node.users}
    for number, value in enumerate(node.meta["val"]):
        stop = start + value.shape[dim]
        if number in parts:
            yield parts[number], dim, start, stop
        start = stop


def _cuts_biased_rows(node: fx.Node) -> bool:
    """Whether rows are cut off a product to which all rows add the same, and nothing but rows is read of it."""
    x, dim = node.args[0], argument(node, 1, "dim", 0)
    is_row = is_tensor(x) and len(shape_of(x)) > 2 and dim in (-2, len(shape_of(x)) - 2)  # type: ignore[arg-type]
    if not is_row or x.target is not aten.add.Tensor or x.kwargs or not all(map(is_tensor, x.args)):  # type: ignore[union-attr]
        return False
    product, bias = x.args  # type: ignore[union-attr]
    cut_everywhere = all(user.target is aten.slice.Tensor for user in x.users)  # type: ignore[union-attr]
    return cut_everywhere and _comes_from_product(product, len(shape_of(x)) - 1) and len(shape_of(bias)) == 1  # type: ignore[arg-type]


def _slice_before_bias(node: fx.Node) -> None:
    product, bias = node.args[0].args  # type: ignore[union-attr]
    rows = call(node.graph, aten.slice.Tensor, (product, *node.args[1:]), node.kwargs, like=node)
    replace(node, call(node.graph, aten.add.Tensor, (rows, bias), like=node))


def _range(node: fx.Node) -> tuple[int, int]:
    whole = shape_of(node.args[0])[-1]  # type: ignore[arg-type]
    start = argument(node, 2, "start") or 0
    start = start + whole if start < 0 else min(start, whole)
    return start, start + shape_of(node)[-1]


def _comes_from_product(x: fx.Node, dim: int) -> bool:
    """Whether dim `dim` of `x` is that of a weight, up to additions, changes of other dims, and what each of its
    indices goes through alone, such as an activation or a convolution of each channel.
    """
    if x.target is aten.linear.default:
        return dim == len(shape_of(x)) - 1 and len(shape_of(x.args[1])) == 2  # type: ignore[arg-type]
    if _is_product(x):
        rank = len(shape_of(x.args[1]))  # type: ignore[arg-type]
        return dim == len(shape_of(x)) - 1 and (rank == 2 or (rank > 2 and _is_weight(x.args[1])))  # type: ignore[arg-type]
    if x.target is aten.add.Tensor and not x.kwargs:
        terms = [a for a in x.args if is_tensor(a) and len(shape_of(a)) == len(shape_of(x))]  # type: ignore[arg-type]
        return any(_comes_from_product(a, dim) for a in terms)  # type: ignore[arg-type]
    if _keeps_last_dim(x):
        last = len(shape_of(x)) - 1
        return dim == last and _comes_from_product(x.args[0], len(shape_of(x.args[0])) - 1)  # type: ignore[arg-type]
    source = _source_dim(x, dim)
    return source is not None and len(x.users) == 1 and _comes_from_product(x.args[0], source)  # type: ignore[arg-type]


def _source_dim(x: fx.Node, dim: int) -> int | None:
    """The dim of its first operand of which `x` computes each index alone; None if there is none."""
    if x.target is aten.transpose.int:
        swapped: Any = [d % len(shape_of(x)) for d in x.args[1:3]]  # type: ignore[operator]
        return int(swapped[1 - swapped.index(dim)]) if dim in swapped else dim
    if x.target is aten.permute.default:
        return int(x.args[1][dim]) % len(shape_of(x))  # type: ignore[index, arg-type]
    if x.target is aten.conv1d.default:
        channels, width = shape_of(x.args[1])[:2]  # type: ignore[arg-type]
        return dim if dim == 1 and width == 1 and argument(x, 6, "groups", 1) == channels else None
    rule = rule_of(x) if x.op == "call_function" and isinstance(x.meta.get("val"), Tensor) else None
    if rule is None or rule.local is not None or len(rule.operands) != 1 or not is_tensor(x.args[0]):
        return None
    before, (after,) = rule.operands[0], rule.results
    passes = len(before) == len(after) and len(after[dim]) == 1 and before[dim] == after[dim]
    return dim if passes and after[dim][0] not in rule.replicated else None


def _is_product(x: fx.Node) -> bool:
    schema = getattr(x.target, "_schema", None)
    return schema is not None and schema.name in _PRODUCTS and len(x.args) > 1


def _is_weight(x: fx.Node) -> bool:
    """Whether a value is a parameter, maybe cast or with its dims in another order: cutting it costs nothing new."""
    while x.op == "call_function" and x.target in _MOVES:
        x = operand(x, 0)
    return x.op == "placeholder"


def _keeps_last_dim(x: fx.Node) -> bool:
    if x.target is not aten.reshape.default or not is_tensor(x.args[0]):
        return False
    before, after = shape_of(x.args[0]), shape_of(x)  # type: ignore[arg-type]
    return len(before) > 0 and len(after) > 0 and same(before[-1], after[-1])


def _cut_projection(node: fx.Node) -> None:
    for part, dim, start, stop in _parts_read(node):
        replace(part, _range_of(node.args[0], dim, start, stop, like=part))  # type: ignore[arg-type]


def _range_of(x: fx.Node, dim: int, start: int, stop: int, *, like: fx.Node) -> fx.Node:
    """Elements start .. stop - 1 of a dim of `x`, computed from parts of the weights."""
    graph, last = like.graph, len(shape_of(x)) - 1
    if x.target is aten.linear.default and dim == last:
        weight = call(graph, aten.slice.Tensor, (x.args[1], 0, start, stop), like=like)
        return call(graph, aten.linear.default, (x.args[0], weight), like=like)
    if _is_product(x) and dim == last:
        columns = len(shape_of(x.args[1])) - 1  # type: ignore[arg-type]
        weight = call(graph, aten.slice.Tensor, (x.args[1], columns, start, stop), like=like)
        product: Any = x.target
        return call(graph, product, (x.args[0], weight, *x.args[2:]), x.kwargs, like=like)
    if x.target is aten.add.Tensor:
        terms = tuple(_part_of_term(a, dim - last - 1, start, stop, like) for a in x.args)
        return call(graph, aten.add.Tensor, terms, like=like)
    if _keeps_last_dim(x) and dim == last:
        inner = _range_of(x.args[0], len(shape_of(x.args[0])) - 1, start, stop, like=like)  # type: ignore[arg-type]
        return call(graph, aten.reshape.default, (inner, [*_reshape_sizes(x)[:-1], stop - start]), like=like)
    source = _source_dim(x, dim) if len(x.users) == 1 and _comes_from_product(x, dim) else None
    if source is None:
        return call(graph, aten.slice.Tensor, (x, dim, start, stop), like=like)
    inner = _range_of(x.args[0], source, start, stop, like=like)  # type: ignore[arg-type]
    if x.target is aten.conv1d.default:
        return _convolved(x, inner, start, stop, like)
    return call(graph, x.target, (inner, *x.args[1:]), x.kwargs, like=like)  # type: ignore[arg-type]


def _convolved(x: fx.Node, part: fx.Node, start: int, stop: int, like: fx.Node) -> fx.Node:
    """A convolution of some of the channels, each alone."""
    rows = [
        a if a is None else call(like.graph, aten.slice.Tensor, (a, 0, start, stop), like=like)
        for a in (argument(x, 1, "weight"), argument(x, 2, "bias"))
    ]
    named = [argument(x, 3, "stride", [1]), argument(x, 4, "padding", [0]), argument(x, 5, "dilation", [1])]
    return call(like.graph, aten.conv1d.default, (part, *rows, *named, stop - start), like=like)


def _part_of_term(term: Any, dim: int, start: int, stop: int, like: fx.Node) -> Any:
    """dim: counted from the last."""
    rank = len(shape_of(term)) if is_tensor(term) else 0
    is_whole = rank < -dim or same(shape_of(term)[dim], 1)
    return term if is_whole else _range_of(term, rank + dim, start, stop, like=like)


def _reshape_sizes(reshape: fx.Node) -> Sequence[Any]:
    """The sizes as the graph gives them: numbers, and nodes where they are symbols."""
    sizes = reshape.args[1]
    assert isinstance(sizes, (list, tuple))
    return sizes


def _fused(x_BSD: Tensor, w_DF: Tensor, b_F: Tensor, out_DD: Tensor) -> Tensor:
    q, k, v = torch.addmm(b_F, x_BSD.reshape(-1, 4), w_DF).reshape(2, 7, 12).split(4, dim=2)
    heads = [t.reshape(2, 7, 2, 2).transpose(1, 2) for t in (q, k, v)]
    y_BNSH = torch.nn.functional.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
    return y_BNSH.transpose(1, 2).reshape(2, 7, 4) @ out_DD


def _inputs() -> tuple[Tensor, ...]:
    shapes = ((2, 7, 4), (4, 12), (12,), (4, 4))
    return tuple(torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in shapes)


EXAMPLE = Example(_fused, _inputs, mesh=(("tp", 2),))
