"""Products of which every group of rows has a matrix of its own: the experts of a mixture.

Where a group ends is said by offsets, so rows cannot be split; what each matrix contracts or keeps can.
"""

from __future__ import annotations

import torch.fx as fx

from spcompile.graph.aten_ops import tensor_operands
from spcompile.sharding.rules.factors import factors, make_rule
from spcompile.sharding.rules.rule import OpRule, register, tensor_results


@register("aten::_grouped_mm", "transformers::grouped_mm_fallback")
def grouped_mm(node: fx.Node) -> OpRule | None:
    """`[a] c, [d] c b, [d] -> [a] b | c: sum`; no rule with a bias, or for other forms than rows with offsets."""
    values = [x.meta["val"] for x in tensor_operands(node)]
    if [v.ndim for v in values] != [2, 3, 1] or tensor_results(node)[0].ndim != 2:
        return None
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    rows, contracted = factors(values[0].shape)
    (groups,) = factors(values[2].shape)
    (columns,) = factors(values[1].shape[2:])
    rows.replicated = groups.replicated = True
    operands = {names[0]: [rows, contracted], names[1]: [groups, contracted, columns], "offs": [groups]}
    fills = dict.fromkeys(names[:2], 0.0)
    return make_rule(node, operands, [[rows, columns]], sums=[contracted], fills=fills)
