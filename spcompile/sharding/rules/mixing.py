"""Ops that mix the elements along some dims, whose size may change, and leave the rest alone: `a b [c] -> a b [d]`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.fx as fx

from spcompile.graph.aten_ops import overloads
from spcompile.graph.sizes import same
from spcompile.sharding.rules.calls import arguments
from spcompile.sharding.rules.factors import Factor, Layout, factors, make_rule
from spcompile.sharding.rules.rule import LocalCall, OpRule, register, tensor_results

ALONG_LAST_DIM = """
    adaptive_avg_pool1d adaptive_max_pool1d avg_pool1d max_pool1d max_pool1d_with_indices upsample_linear1d
    upsample_linear1d.vec upsample_nearest1d upsample_nearest1d.vec
"""
ALONG_LAST_TWO_DIMS = """
    adaptive_avg_pool2d adaptive_max_pool2d avg_pool2d max_pool2d max_pool2d_with_indices upsample_bicubic2d
    upsample_bicubic2d.vec upsample_bilinear2d upsample_bilinear2d.vec upsample_nearest2d upsample_nearest2d.vec
"""
ALONG_ONE_DIM = "fft_fft fft_hfft fft_ifft fft_ihfft fft_irfft fft_rfft"
ALONG_SOME_DIMS = "fft_fft2 fft_fftn fft_ifft2 fft_ifftn fft_irfft2 fft_irfftn fft_rfft2 fft_rfftn"


def mixed(node: fx.Node, dims: Iterable[int]) -> OpRule:
    """The rule of a call that mixes the elements of its first argument along `dims`. All its results have one shape."""
    name, value = next(iter(arguments(node).items()))
    before = factors(value.shape)
    places = {dim % len(before) for dim in dims} if before else set()
    for dim in places:
        before[dim].replicated = True
    results = tensor_results(node)
    after = [
        Factor(size, replicated=True) if dim in places and not same(size, before[dim].size) else before[dim]
        for dim, size in enumerate(results[0].shape)
    ]
    return make_rule(node, {name: before}, [after for _ in results])


@register(*overloads(ALONG_LAST_DIM))
def rows_of_windows(node: fx.Node) -> OpRule:
    """`a b [c] -> a b [d]`, also of indices, which are places in one row of one channel."""
    return mixed(node, [-1])


@register(*overloads(ALONG_LAST_TWO_DIMS))
def images_of_windows(node: fx.Node) -> OpRule:
    """`a b [e] [f] -> a b [c] [d]`, also of indices, which are places in one image of one channel."""
    return mixed(node, [-2, -1])


@register(*overloads(ALONG_ONE_DIM))
def transform(node: fx.Node) -> OpRule:
    """`a [b] -> a [b]`; the real half of a spectrum is `a [c]`."""
    return mixed(node, [arguments(node)["dim"]])


@register(*overloads(ALONG_SOME_DIMS))
def transform_dims(node: fx.Node) -> OpRule:
    """`a [b] [c] -> a [b] [c]`; without dims along the last ones, as many as sizes are given, or all."""
    args = arguments(node)
    count = args["self"].dim() if args["s"] is None else len(args["s"])
    return mixed(node, range(-count, 0) if args["dim"] is None else args["dim"])


@register(torch.ops.aten.instance_norm.default)
def instance_norm(node: fx.Node) -> OpRule | None:
    """`a b [c], b, b -> a b [c]`; running statistics are those of all rows."""
    args = arguments(node)
    if args["running_mean"] is not None or not args["use_input_stats"]:
        return None
    batch, channels, *rest = args["input"].shape
    dims = [Factor(batch), Factor(channels), *factors(rest, replicated=True)]
    return make_rule(node, {"input": dims, "weight": dims[1:2], "bias": dims[1:2]}, [dims])


@register(torch.ops.aten.cdist.default)
def distances(node: fx.Node) -> OpRule | None:
    """`a b [d], a c [d] -> a b c`."""
    args = arguments(node)
    x1, x2 = args["x1"].shape, args["x2"].shape
    if len(x1) != len(x2) or not all(map(same, x1[:-2], x2[:-2])):
        return None
    batch, rows, columns = factors(x1[:-2]), Factor(x1[-2]), Factor(x2[-2])
    width = Factor(x1[-1], replicated=True)
    return make_rule(node, {"x1": [*batch, rows, width], "x2": [*batch, columns, width]}, [[*batch, rows, columns]])


@register(*overloads("im2col col2im"))
def windows(node: fx.Node) -> OpRule:
    """`a b [c] [d] -> a (b [e]) ([f] [g])`: e places in each of f * g windows; and back."""
    args, (result,) = arguments(node), tensor_results(node)
    takes = node.target is torch.ops.aten.im2col.default
    *batch, channels, height, width = args["self"].shape if takes else result.shape
    leading, channel = factors(batch), Factor(channels)
    image, kernel, settings = (height, width), args["kernel_size"], ("stride", "padding", "dilation")
    steps, before, gaps = (args[name] for name in settings)
    extents = [gap * (taps - 1) + 1 for gap, taps in zip(gaps, kernel, strict=True)]
    counts = [(image[d] + 2 * before[d] - extents[d]) // steps[d] + 1 for d in (0, 1)]
    places, taps = factors(image, replicated=True), Factor(math.prod(kernel), replicated=True)
    count = factors(counts, replicated=True)
    layouts: list[Layout] = [[*leading, channel, *places], [*leading, (channel, taps), tuple(count)]]
    made_of = partial(make_rule, node, {"self": layouts[not takes]}, [layouts[takes]])
    rule = made_of()
    split = [d for d in (0, 1) if takes and not same(image[d], 1) and not same(counts[d], 1)]
    for d in split:
        places[d].replicated = count[d].replicated = False

    def local(unpadded: int, call: LocalCall) -> Any:
        padding = [0 if d == unpadded else before[d] for d in (0, 1)]
        return torch.ops.aten.im2col.default(call.args[0], kernel, gaps, padding, steps)

    made = {count[d]: (places[d], steps[d], before[d], extents[d], partial(local, d)) for d in split}
    return replace(rule, moving=made_of(windows=made)) if made else rule
