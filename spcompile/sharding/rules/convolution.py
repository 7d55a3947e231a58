"""Convolutions: products along channels, windows along places.

    conv1d    "a d [e], b d [f] -> a b [c] | d: sum"

On an axis whose ranks send each other what windows have in common (`OpRule.moving`) places are split too: each rank
reads the windows of its own places, and pads nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.fx as fx
import torch.nn.functional as F

from spcompile.graph.aten_ops import overloads
from spcompile.graph.sizes import same
from spcompile.graph.typed_call import named_arguments
from spcompile.sharding.rules.calls import arguments
from spcompile.sharding.rules.factors import Factor, factors, make_rule
from spcompile.sharding.rules.rule import LocalCall, OpRule, register, tensor_results

aten = torch.ops.aten


@register(*overloads("conv1d conv2d conv3d conv1d.padding conv2d.padding conv3d.padding"))
def convolution(node: fx.Node) -> OpRule:
    """`a d [e], b d [f] -> a b [c] | d: sum`, with one, two or three e, f, c; in groups `a (g d) [e], (g b) d [f] ->
    a (g b) [c]`.

    Along a dim with a kernel of 1, step 1 and no padding each place is computed alone: `a d e, b d 1 -> a b e`.
    """
    args = arguments(node)
    space, has_bias = args["weight"].ndim - 2, args["bias"] is not None
    batch, (row_count, inner) = factors(args["input"].shape[: -space - 1]), args["weight"].shape[:2]
    groups = Factor(args["groups"])
    channels, rows = Factor(inner, replicated=has_bias), Factor(row_count // groups.size)
    if groups.size > 1:
        channels.replicated = True
    places, taps, made = (
        [Factor(size, replicated=True) for size in shape[-space:]]
        for shape in (args["input"].shape, args["weight"].shape, tensor_results(node)[0].shape)
    )
    windows: dict[Factor, Any] = {}
    for dim in range(space):
        step, before = _along(args["stride"], dim), _padding(node, dim)[0]
        extent = _along(args["dilation"], dim) * (taps[dim].size - 1) + 1
        if step == extent == 1 and before == 0:
            made[dim] = places[dim]
            places[dim].replicated = False
        elif not same(places[dim].size, 1) and not same(made[dim].size, 1):
            windows[made[dim]] = (places[dim], step, before, extent, partial(_convolve, node, dim))
    operands: dict[str, Any] = {
        "input": [*batch, (groups, channels), *places],
        "weight": [(groups, rows), channels, *taps],
        "bias": [(groups, rows)] if has_bias else [],
    }
    fills = {"input": 0.0, "weight": 0.0}
    local = None if groups.size == 1 else partial(_convolve, node, None)
    made_of = partial(make_rule, node, operands, [[*batch, (groups, rows), *made]], sums=[channels], fills=fills)
    rule = made_of(local=local)
    if not windows:
        return rule
    for factor, (of, *_) in windows.items():
        factor.replicated = of.replicated = False
    return replace(rule, moving=made_of(local=local, windows=windows))


def _convolve(node: fx.Node, unpadded: int | None, call: LocalCall) -> Any:
    """The call on a part of its places, which along place dim `unpadded` is all that the result is made of; or on a
    part of its groups.
    """
    args = named_arguments(node.target, call.args, call.kwargs)
    x, weight = args["input"], args["weight"]
    space = weight.ndim - 2
    padding = [(0, 0) if dim == unpadded else _padding(node, dim) for dim in range(space)]
    if any(before != after for before, after in padding):
        x = F.pad(x, [n for pair in reversed(padding) for n in pair])
        padding = [(0, 0)] * space
    groups = x.shape[-space - 1] // weight.shape[1]
    stride, dilation = ([_along(args[name], dim) for dim in range(space)] for name in ("stride", "dilation"))
    op = (aten.conv1d, aten.conv2d, aten.conv3d)[space - 1].default
    return op(x, weight, args["bias"], stride, [before for before, _ in padding], dilation, groups)


def _padding(node: fx.Node, dim: int) -> tuple[int, int]:
    """How many zeros stand before and behind a place dim."""
    args = arguments(node)
    if args["padding"] == "valid":
        return 0, 0
    if args["padding"] != "same":
        return (_along(args["padding"], dim),) * 2
    both = _along(args["dilation"], dim) * (args["weight"].shape[2 + dim] - 1)
    return both // 2, both - both // 2


def _along(setting: Sequence[int], dim: int) -> int:
    """A convolution's setting of one dim; one number is that of all."""
    return setting[min(dim, len(setting) - 1)]
