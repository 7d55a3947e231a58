"""Ops that read or write at computed places: `[c] b, a -> a b`.

The indexed dim is replicated, the dims of the index pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from spcompile.graph.aten_ops import overloads
from spcompile.graph.sizes import same
from spcompile.graph.typed_call import named_arguments
from spcompile.sharding.rules.calls import arguments
from spcompile.sharding.rules.factors import Dim, Factor, broadcast_factors, factors, make_rule
from spcompile.sharding.rules.rule import LocalCall, OpRule, register, tensor_results

aten = torch.ops.aten


@register(aten.embedding.default)
def embedding(node: fx.Node) -> OpRule:
    """`d c, a b -> a b c | d: sum`: of a split table every rank looks up the rows it has, the others are 0."""
    args = arguments(node)
    rows, width = factors(args["weight"].shape)
    places = factors(args["indices"].shape)

    def local(call: LocalCall) -> Any:
        if (call.factor,) == rule.operands[0][0]:
            return _own_rows(call)
        return aten.embedding.default(*call.args, **call.kwargs)

    operands = {"weight": [rows, width], "indices": places}
    rule = make_rule(node, operands, [[*places, width]], sums=[rows], ordered=[rows], fills={}, local=local)
    return rule


def _own_rows(call: LocalCall) -> Tensor:
    """The rows that this rank's part of the table holds; zeros for all others."""
    args = named_arguments(aten.embedding.default, call.args, call.kwargs)
    table, indices = args["weight"], args["indices"]
    assert call.ranks is not None
    place = indices - call.ranks.first(call.global_size, table.device)
    is_here = (place >= 0) & (place < table.shape[0])
    found = aten.embedding.default(table, place.where(is_here, 0))
    trained = is_here & (indices != args["padding_idx"])  # the row of padding_idx gets no gradient
    return found.where(trained.unsqueeze(-1), found.detach().where(is_here.unsqueeze(-1), 0))


@register(aten.index_select.default)
def index_select(node: fx.Node) -> OpRule:
    """`a [c] , b -> a b`."""
    args = arguments(node)
    dims = factors(args["self"].shape)
    if not dims:
        return make_rule(node, {"self": dims, "index": factors(args["index"].shape, replicated=True)}, [dims])
    index = factors(args["index"].shape) or [Factor(1)]
    out = list(dims)
    out[args["dim"]] = index[0]
    dims[args["dim"]].replicated = True
    return make_rule(node, {"self": dims, "index": index[: args["index"].ndim]}, [out])


@register(aten.index.Tensor)
def index(node: fx.Node) -> OpRule | None:
    """`a [d] [e], b c, c -> a b c`; `a [b], a, a -> a` where an index is a range over its dim.

    None for boolean indices, whose result has an unknown size.
    """
    args = arguments(node)
    indices = args["indices"]
    if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices):
        return None
    if all(i is None for i in indices):
        return None
    dims, out, layouts = _indexed(args["self"].shape, indices)
    ranges = [d for d, read in enumerate(node.args[1]) if is_range(read, args["self"].shape[d])]  # type: ignore[arg-type]
    if len(ranges) != 1:
        return make_rule(node, {"self": dims, "indices": layouts}, [out])
    (at,) = ranges
    layout = layouts[sum(i is not None for i in indices[:at])]
    (dims[at],) = (factor for factor in layout if isinstance(factor, Factor) and not same(factor.size, 1))

    def local(call: LocalCall) -> Tensor:
        x, own = call.args[0], list(call.args[1])
        rows = torch.arange(x.shape[at], device=x.device)  # of this rank's part, not of the whole
        own[at] = rows.reshape([-1 if not same(size, 1) else 1 for size in indices[at].shape])
        return aten.index.Tensor(x, own)

    return make_rule(node, {"self": dims, "indices": layouts}, [out], local=local)


def is_range(index: fx.Node | None, length: Any) -> bool:
    """Whether an index is 0, 1, ..., length - 1, in one dim of any number: `x[arange(B), last]` reads in every row."""
    views = (aten.unsqueeze.default, aten.reshape.default, aten.view.default, aten.to.dtype, aten._to_copy.default)
    base = index
    while base is not None and base.target in views:
        base = base.args[0]  # type: ignore[assignment]
    if index is None or base is None or same(length, 1):
        return False
    bounds = {
        aten.arange.default: lambda stop: (0, stop, 1),
        aten.arange.start: lambda start, stop: (start, stop, 1),
        aten.arange.start_step: lambda start, stop, step=1: (start, stop, step),
    }.get(base.target)  # type: ignore[call-overload]
    shape = index.meta["val"].shape
    if bounds is None or sum(not same(size, 1) for size in shape) != 1:
        return False
    start, stop, step = bounds(*(a.meta["val"] if isinstance(a, fx.Node) else a for a in base.args))
    return same(start, 0) and same(step, 1) and same(stop, length)


def _indexed(shape: Sequence[Any], indices: Sequence[Tensor | None]) -> tuple[list[Factor], list[Factor], list[Any]]:
    """Layouts of an indexed tensor, of what is read from it, and of the indices.

    Indices broadcast together. Their dims replace the indexed dims where those are adjacent, else they come first.
    """
    dims = factors(shape)
    used = [d for d, index in enumerate(indices) if index is not None]
    for d in used:
        dims[d].replicated = True
    places = factors(torch.broadcast_shapes(*(index.shape for index in indices if index is not None)))
    layouts = [broadcast_factors(index.shape, places) for index in indices if index is not None]
    adjacent = used == list(range(used[0], used[-1] + 1))
    at = used[0] if adjacent else 0
    kept = [factor for d, factor in enumerate(dims) if d not in used]
    return dims, [*kept[:at], *places, *kept[at:]], layouts


@register(*overloads("index_put _unsafe_index_put"))
def index_put(node: fx.Node) -> OpRule | None:
    """`a [c], [b], a [b] -> a [c]`; with one mask as index and one value `a b, a b, () -> a b`."""
    args = arguments(node)
    indices, values = args["indices"], args["values"]
    masks = [i for i in indices if i is not None and i.dtype in (torch.bool, torch.uint8)]
    if masks:
        if len(indices) > 1 or not all(same(size, 1) for size in values.shape):
            return None
        dims = factors(args["self"].shape)
        operands = {"self": dims, "indices": [dims[: masks[0].ndim]], "values": [() for _ in values.shape]}
        return make_rule(node, operands, [dims])
    dims, written, layouts = _indexed(args["self"].shape, indices)
    for factor in written:
        factor.replicated = factor.replicated or factor not in dims
    source = broadcast_factors(values.shape, written)
    return make_rule(node, {"self": dims, "indices": layouts, "values": source}, [dims]) if source is not None else None


@register(aten.gather.default)
def gather(node: fx.Node) -> OpRule:
    """`a [c], a b -> a b`; dims that the index covers only in part are replicated."""
    args = arguments(node)
    out = factors(args["index"].shape)
    return make_rule(node, {"self": _around(args["self"].shape, out, args["dim"]), "index": out}, [out])


@register(aten.take_along_dim.default)
def take_along_dim(node: fx.Node) -> OpRule | None:
    """`a [c], a b -> a b`, with broadcasting."""
    args = arguments(node)
    if args["dim"] is None:
        return None
    out = factors(tensor_results(node)[0].shape)
    dim = args["dim"] % len(out)
    picked = Factor(args["self"].shape[dim], replicated=True)
    indices = broadcast_factors(args["indices"].shape, out)
    source = broadcast_factors(args["self"].shape, [picked if d == dim else factor for d, factor in enumerate(out)])
    return None if indices is None or source is None else make_rule(node, {"self": source, "indices": indices}, [out])


@register(*overloads("scatter.reduce scatter.src scatter.value scatter.value_reduce scatter_add scatter_reduce.two"))
def scatter(node: fx.Node) -> OpRule:
    """`a [b], a [c], a [c] -> a [b]`; dims that the index covers only in part are replicated."""
    args = arguments(node)
    dims = factors(args["self"].shape)
    if not dims:
        return make_rule(node, {name: [] for name in ("self", "index", "src")}, [[]])
    others = [args[name] for name in ("index", "src") if isinstance(args.get(name), Tensor)]
    dim = args["dim"] % len(dims)
    for d, factor in enumerate(dims):
        factor.replicated = d == dim or not all(same(other.shape[d], factor.size) for other in others)
    index = [Factor(s, True) if f.replicated else f for s, f in zip(args["index"].shape, dims, strict=True)]
    src = [f if same(s, f.size) else Factor(s, True) for s, f in zip(others[-1].shape, index, strict=True)]
    return make_rule(node, {"self": dims, "index": index, "src": src}, [dims])


def _around(shape: Sequence[Any], out: Sequence[Factor], dim: int) -> list[Dim]:
    """Dims of a tensor that is read along `dim`; where it is longer than the index elsewhere, both are replicated."""
    dims: list[Dim] = []
    for d, (size, factor) in enumerate(zip(shape, out, strict=True)):
        if d == dim % len(out):
            dims.append(Factor(size, replicated=True))
        elif same(size, factor.size):
            dims.append(factor)
        else:
            factor.replicated = True
            dims.append(Factor(size, replicated=True))
    return dims


@register(*overloads("index_add index_copy"))
def index_add(node: fx.Node) -> OpRule:
    """`a [b], [c], a [c] -> a [b]`."""
    args = arguments(node)
    dims = factors(args["self"].shape)
    places = factors(args["index"].shape, replicated=True)
    source = list(dims)
    if dims:
        dims[args["dim"]].replicated = True
        source[args["dim"]] = (places or [Factor(1)])[0]
    return make_rule(node, {"self": dims, "index": places, "source": source[: args["source"].ndim]}, [dims])


@register(*overloads("index_fill.int_Scalar index_fill.int_Tensor"))
def index_fill(node: fx.Node) -> OpRule:
    """`a [b], [c] -> a [b]`."""
    args = arguments(node)
    dims = factors(args["self"].shape)
    dims[args["dim"]].replicated = True
    return make_rule(node, {"self": dims, "index": factors(args["index"].shape, replicated=True), "value": []}, [dims])


@register(aten.one_hot.default)
def one_hot(node: fx.Node) -> OpRule:
    """`a b -> a b [c]`."""
    *places, classes = factors(tensor_results(node)[0].shape)
    classes.replicated = True
    return make_rule(node, {"self": places}, [[*places, classes]])


@register(*overloads("bucketize.Tensor isin.Tensor_Tensor"))
def looked_up(node: fx.Node) -> OpRule:
    """`a b, [c] -> a b`: each element is compared with all of a table."""
    args = arguments(node)
    names = [name for name, value in args.items() if isinstance(value, Tensor)]
    out = factors(args[names[0]].shape)
    return make_rule(node, {names[0]: out, names[1]: factors(args[names[1]].shape, replicated=True)}, [out])


@register(aten.searchsorted.Tensor)
def searchsorted(node: fx.Node) -> OpRule | None:
    """`[c], a b -> a b`, or `a [c], a b -> a b` with one sorted sequence per row."""
    args = arguments(node)
    if args["sorter"] is not None:
        return None
    out = factors(args["self"].shape)
    table = factors(args["sorted_sequence"].shape, replicated=True)
    return make_rule(node, {"sorted_sequence": [*(out[:-1] if len(table) > 1 else []), table[-1]], "self": out}, [out])


@register(aten.histc.default)
def histogram(node: fx.Node) -> OpRule | None:
    """`a b -> [c] | a: sum, b: sum` between given bounds, outside of which nothing counts; else `[a] [b] -> [c]`."""
    args = arguments(node)
    if args["min"] >= args["max"]:
        return data_dependent(node)
    counted, bins = factors(args["self"].shape), factors(tensor_results(node)[0].shape, replicated=True)
    return make_rule(node, {"self": counted}, [bins], sums=counted, fills={"self": args["max"] + 1.0})


@register(*overloads("masked_select nonzero bincount"))
def data_dependent(node: fx.Node) -> OpRule:
    """`[b] [c] -> [a]`: every element counts for every result."""
    operands = {k: factors(v.shape, True) for k, v in arguments(node).items() if isinstance(v, Tensor)}
    return make_rule(node, operands, [factors(tensor_results(node)[0].shape, replicated=True)])
