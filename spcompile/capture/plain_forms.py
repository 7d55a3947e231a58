"""Calls written as others that mean the same, and of which every axis knows more.

roll, pad            over several dims: over one after the other
adaptive_avg_pool    to one place: the mean over all of them
view_as_complex      of a copy, which has no meaning behind capture: the two parts put together, wherever they lie
as_strided           indices into the elements (`strided_views.py`)
embedding            with gradients by frequency: the same rows, whose gradients are divided by counts
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import Tensor

from spcompile.capture.gradient_ops import keep_gradient
from spcompile.capture.strided_views import indexed_view, indexed_write
from spcompile.diagnostics import CaptureFailed, source_of
from spcompile.graph.sizes import same
from spcompile.graph.splice import splice
from spcompile.graph.typed_call import named_arguments

# Tensors: V rows of a table, D width.
aten = torch.ops.aten
Form = Callable[..., Tensor]
Found = tuple[Form, list[Any]] | None
_REGROUPINGS = (aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, aten.unflatten.int)


def write_in_plain_forms(gm: fx.GraphModule) -> None:
    """Replace every call that has such a form."""
    for node in list(gm.graph.nodes):
        found = _FORMS[node.target](node) if node.target in _FORMS else None
        if found is not None:
            form, read = found
            node.replace_all_uses_with(splice(form, read, like=node))
            gm.graph.erase_node(node)


def _roll(node: fx.Node) -> Found:
    args = _arguments(node)
    return (_rolled(args["shifts"], args["dims"]), [args["self"]]) if len(args["dims"]) > 1 else None


def _pad(node: fx.Node) -> Found:
    args = _arguments(node)
    pairs = list(zip(args["pad"][::2], args["pad"][1::2], strict=True))
    dims = [at for at, pair in enumerate(pairs) if not all(same(n, 0) for n in pair)]
    is_constant = args.get("mode", "constant") == "constant" and all(isinstance(n, int) for n in args["pad"])
    if not is_constant or len(dims) < 2:
        return None
    return _padded_by([(at, pairs[at]) for at in dims], args["value"] or 0), [args["self"]]


def _pool(node: fx.Node) -> Found:
    args = _arguments(node)
    dims = [-1, -2][: len(args["output_size"])]
    return (partial(torch.mean, dim=dims, keepdim=True), [args["self"]]) if set(args["output_size"]) == {1} else None


def _conv1d(node: fx.Node) -> Found:
    args = _arguments(node)
    is_alone = same(args["weight"].meta["val"].shape[-1], 1) and args["padding"][0] == 0
    if not is_alone or args["groups"] != 1 or args["stride"][0] != 1:
        return None
    return _as_linear, [args["input"], args["weight"], args["bias"]]


def _glu(node: fx.Node) -> Found:
    """Halves that a transpose has brought to another dim are cut in front of it: they may be those of a linear."""
    args = _arguments(node)
    x, dim = args["self"], args["dim"] % args["self"].meta["val"].ndim
    if x.target is aten.transpose.int:
        swapped = {n % x.meta["val"].ndim for n in x.args[1:]}
        if dim in swapped and len(swapped) == 2:
            (other,) = swapped - {dim}
            return partial(_gated_before, other, dim), [x.args[0]]
    return partial(_gated, dim), [x]


def _embedding(node: fx.Node) -> Found:
    """Raises `CaptureFailed` for sparse gradients, which no collective here takes."""
    args = _arguments(node)
    if args.get("sparse"):
        legal = "sparse=False"
        raise CaptureFailed("an embedding with sparse gradients", where=source_of(node), legal=legal)
    if not args.get("scale_grad_by_freq"):
        return None
    return partial(_by_frequency, args["padding_idx"]), [args["weight"], args["indices"]]


def _by_frequency(padding_idx: int, weight_VD: Tensor, indices: Tensor) -> Tensor:
    rows = aten.embedding.default(weight_VD, indices, padding_idx)
    flat = indices.reshape(-1)
    counts_V = weight_VD.new_zeros(weight_VD.shape[0]).scatter_add(0, flat, weight_VD.new_ones(flat.shape))
    return keep_gradient(rows / counts_V[indices].unsqueeze(-1), rows.detach())


def _parts_of_copy(node: fx.Node) -> Found:
    value = node.args[0]
    while isinstance(value, fx.Node) and value.target in _REGROUPINGS:
        value = value.args[0]
    return (_together, [node.args[0]]) if isinstance(value, fx.Node) and value.target is aten.clone.default else None


def _together(x: Tensor) -> Tensor:
    return torch.complex(x.select(-1, 0), x.select(-1, 1))


def _arguments(node: fx.Node) -> dict[str, Any]:
    return named_arguments(node.target, node.args, node.kwargs)


def _as_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """X [..., C, S], weight [D, C, 1] -> [..., D, S]."""
    return F.linear(x.transpose(-2, -1), weight.squeeze(-1), bias).transpose(-2, -1)


def _gated(dim: int, x: Tensor) -> Tensor:
    half, gate = x.chunk(2, dim)
    return half * gate.sigmoid()


def _gated_before(dim: int, to: int, x: Tensor) -> Tensor:
    return _gated(dim, x).transpose(dim, to)


def _rolled(shifts: list[Any], dims: list[int]) -> Form:
    def form(x: Tensor) -> Tensor:
        for shift, dim in zip(shifts, dims, strict=True):
            x = torch.roll(x, shift, dim)
        return x

    return form


def _padded_by(amounts: list[tuple[int, tuple[int, int]]], value: float) -> Form:
    """amounts: dims, counted from the last, and what stands before and behind."""

    def form(x: Tensor) -> Tensor:
        for at, pair in amounts:
            x = aten.constant_pad_nd.default(x, [0, 0] * at + list(pair), value)
        return x

    return form


_FORMS: dict[Any, Callable[[fx.Node], Found]] = {
    aten.roll.default: _roll,
    aten.pad.default: _pad,
    aten.constant_pad_nd.default: _pad,
    aten.adaptive_avg_pool1d.default: _pool,
    aten.adaptive_avg_pool2d.default: _pool,
    aten.conv1d.default: _conv1d,
    aten.glu.default: _glu,
    aten.view_as_complex.default: _parts_of_copy,
    aten.as_strided.default: indexed_view,
    aten.as_strided_scatter.default: indexed_write,
    aten.embedding.default: _embedding,
}
