"""Ops that communicate over another axis, already there when the next axis is placed.

Only the dim along which an op moves data is bound to its axis; every other dim passes, and may be split again.
"""

from __future__ import annotations

import torch.fx as fx

from spcompile.collectives import (
    ALL_GATHER,
    ALL_REDUCE,
    ALL_TO_ALL,
    HALO,
    HALO_SUM,
    MASK_PADDING,
    MOVE,
    PICK,
    PLACE,
    REDUCE_SCATTER,
    REORDER,
    SHARD,
    VARY,
)
from spcompile.sharding.rules.calls import arguments
from spcompile.sharding.rules.factors import Factor, factors, make_rule
from spcompile.sharding.rules.rule import OpRule, register, tensor_results


@register(ALL_REDUCE.op, VARY.op)
def whole(node: fx.Node) -> OpRule:
    """`a b -> a b`."""
    dims = factors(arguments(node)["x"].shape)
    return make_rule(node, {"x": dims}, [dims])


@register(
    *(ALL_GATHER.op, HALO.op, HALO_SUM.op, MASK_PADDING.op, MOVE.op, PICK.op, PLACE.op, REDUCE_SCATTER.op),
    *(REORDER.op, SHARD.op),
)
def along_a_dim(node: fx.Node) -> OpRule:
    """`a [c] -> a [b]`: the communicated dim is another one on each side."""
    args = arguments(node)
    dims = factors(args["x"].shape)
    dims[args["dim"]].replicated = True
    out = list(dims)
    out[args["dim"]] = Factor(tensor_results(node)[0].shape[args["dim"]], replicated=True)
    return make_rule(node, {"x": dims}, [out])


@register(ALL_TO_ALL.op)
def blocks(node: fx.Node) -> OpRule:
    """`[a] b -> [c] b`: blocks from other ranks."""
    first, *others = arguments(node)["x"].shape
    dims = factors(others)
    sent, received = (Factor(first, replicated=True) for _ in range(2))
    return make_rule(node, {"x": [sent, *dims]}, [[received, *dims]])
