"""pipeline-matmuls: products hide the gather in front of them, or the scatter behind them, chunk by chunk.

Before   ag: "f64[1, 512, 64]" = spx.all_gather(x, 1, 512, 'tp', 2, 'contiguous', 'R')
         mm: "f64[512, 64]" = aten.mm(aten.view(ag, [512, 64]), weight)
After    (mm,) = spx.all_gather_matmul(x, [weight], 1, 512, 'tp', 2, False)

and matmul_reduce_scatter for products whose sum is scattered; in the forward and, for gradients of activations, in the
backward (the idea is that of Wang et al. 2023, "Overlap communication with dependent computation via decomposition").
One gather serves all products that read it. What other readers want of it, such as the product that gives a gradient of
the weight, they get whole.

Cutting costs: kernels, weights that are read again, tiles that stand idle. So a site is rewritten only where the tables
predict that this saves more than it costs; of a collective that overlap-collectives hides behind other compute there is
nothing to save.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.fx as fx
from torch import Tensor

from spcompile.passes.schedule.overlap_collectives import MEBIBYTE, OverlapCollectives
from spcompile.passes_api import Context, Example, Pass, Stage
from spcompile.schedule.exposure import exposed_seconds
from spcompile.schedule.matmul_sites import Site, rewrite, sites_of
from spcompile.schedule.op_cost import CostModel, cost_model


@dataclass(frozen=True)
class PipelineMatmuls(Pass):
    """Cut products into one chunk for each rank where that hides more than it costs.

    min_gain: seconds that are to be saved, as a part of those of the collective. -inf rewrites all sites.
    symmetric_memory: let torch's operators on symmetric memory do it, for GPUs that all reach each other's memory.
        Where it cannot, a remark says why.
    """

    name: ClassVar[str] = "pipeline-matmuls"
    stage: ClassVar[Stage] = Stage.SCHEDULE
    after: ClassVar[frozenset[str]] = frozenset({"bucket-collectives"})
    summary: ClassVar[str] = "cuts products into chunks that hide the gather before or the scatter behind them"

    min_gain: float = 0.1
    symmetric_memory: bool = False

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        """Rewrite until nothing is left that pays; returns the number of collectives that were replaced."""
        cost = cost_model(ctx.mesh, ctx.options)
        count = 0
        while chosen := self._choose(gm.graph, cost):
            for site in chosen:
                rewrite(site, self.symmetric_memory and _on_symmetric_memory(site, cost, ctx))
            count += len(chosen)
        return count

    def _choose(self, graph: fx.Graph, cost: CostModel) -> list[Site]:
        """The sites that pay, none of which wants a product of another."""
        sent = {site: cost.communication(site.collective) for site in sites_of(graph)}
        least = {site: self.min_gain * seconds for site, seconds in sent.items()}
        pays = [site for site, seconds in sent.items() if _gain(site, seconds, cost) > least[site]]
        if not pays:
            return []
        ordering = OverlapCollectives()
        exposed = exposed_seconds(graph, cost, ordering.memory_mib * MEBIBYTE, ordering.ahead)
        gains = {site: _gain(site, exposed[site.collective.name], cost) for site in pays}
        chosen: list[Site] = []
        taken: set[fx.Node] = set()
        for site in sorted(pays, key=lambda site: -gains[site]):
            if gains[site] > least[site] and taken.isdisjoint(site.products):
                chosen.append(site)
                taken.update(site.products)
        return chosen


def _on_symmetric_memory(site: Site, cost: CostModel, ctx: Context) -> bool:
    """Whether it runs there; a remark says why not."""
    why_not = site.not_on_symmetric_memory(cost.link(site.axis))
    if why_not is not None:
        ctx.remarks.add("SPR206", f"chunks are sent instead: {why_not}", site.collective)
    return why_not is None


def _gain(site: Site, exposed: float, cost: CostModel) -> float:
    """Seconds that cutting saves, if compute would wait so long for the whole collective."""
    whole = sum(cost.work(product).compute for product in site.products)
    return exposed + whole - cost.pipelined(site.chunks).seconds


def _attention_and_mlp(x_BSD: Tensor, weight_D: Tensor, up_DF: Tensor, down_FD: Tensor) -> Tensor:
    x_B1SD = x_BSD.unsqueeze(1)
    y_BSD = torch.nn.functional.scaled_dot_product_attention(x_B1SD, x_B1SD, x_B1SD).squeeze(1)
    h_BSD = torch.nn.functional.rms_norm(y_BSD, (64,), weight_D)
    return x_BSD + torch.relu(h_BSD @ up_DF) @ down_FD


def _inputs() -> tuple[Tensor, ...]:
    shapes = ((1, 511, 64), (64,), (64, 512), (512, 64))
    return tuple(torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes)


EXAMPLE = Example(
    _attention_and_mlp, _inputs, mesh=(("tp", 2),), options={"accelerator": "cpu", "links": {"tp": "loopback"}}
)
