"""What a candidate takes at least, without compiling it: products at full speed, and attention as it is spread.

With many ranks most meshes send keys through a slow network for longer than all else takes. They need no compile.
"""

from __future__ import annotations

import math
from dataclasses import replace

from spcompile.attention.strategy import Strategy
from spcompile.attention.strategy_cost import Problem, cost
from spcompile.machine.accelerators import ACCELERATORS
from spcompile.machine.links import link_of
from spcompile.machine.mesh import MeshShape
from spcompile.options import Options
from spcompile.planning.candidates import Candidate
from spcompile.planning.search import Depths
from spcompile.planning.short_step import Short
from spcompile.sharding.tensor_parallel import heads_on_a_rank

_PASSES = 3  # over each product: forward, and two of the backward


def least_seconds(depths: Depths, candidate: Candidate, options: Options, itemsize: int) -> float:
    """Of a step. depths: of the model with the whole batch. itemsize: bytes of an element of its products.

    Nothing but attention communicates, and nothing is made again, so a compile predicts more.
    """
    found = [_of_blocks(short, candidate, options, itemsize) for short in depths.shorts]
    if len(found) == 1:
        return found[0]
    few, more = depths.shorts
    return found[0] + (found[1] - found[0]) * (depths.count - few.blocks) / (more.blocks - few.blocks)


def _of_blocks(short: Short, candidate: Candidate, options: Options, itemsize: int) -> float:
    accelerator = ACCELERATORS[options.accelerator]
    products = _PASSES * short.flops[0] / candidate.ranks / (accelerator.peak(itemsize) * accelerator.reached)
    return products + sum(_of_attention(one, candidate, options) for one in short.attentions)


def _of_attention(whole: Problem, candidate: Candidate, options: Options) -> float:
    accelerator = ACCELERATORS[options.accelerator]
    heads, kv_heads = heads_on_a_rank(whole.heads, whole.kv_heads, candidate.size("tp"))
    one = replace(whole, batch=math.ceil(whole.batch / candidate.size("dp")), heads=heads, kv_heads=kv_heads)
    strategy, mesh = _strategy(candidate), MeshShape(candidate.mesh)
    inner, outer = (link_of(mesh, "cp", options.links, degree, accelerator.links) for degree in (strategy.inner, None))
    flops = accelerator.attention_flops(one.itemsize)
    return min(cost(one, strategy, order, inner, outer, flops).seconds for order in ("zigzag", "contiguous"))


def _strategy(candidate: Candidate) -> Strategy:
    cp = candidate.size("cp")
    if not isinstance(candidate.attention, str):
        parts = dict(candidate.attention)
        return Strategy(parts["ulysses"], parts["ring"])
    return Strategy(cp, 1) if candidate.attention == "ulysses" else Strategy(1, cp)
