"""place-host-copies: copies to the host and back are on their way while compute runs that does not need them.

Before   h = aten.add(...)                       After    h = aten.add(...)
         to_host = spx.to_host(h)                         to_host = spx.to_host(h)
         wait_copy = spx.wait_copy(to_host, h)            mm = aten.mm(h, ...)
         mm = aten.mm(h, ...)                             ...
         ...                                              wait_copy = spx.wait_copy(to_host, h)   # h is gone from here

A copy to the host starts behind the call that makes the value, and is waited for behind the last one that reads it. A
copy back starts ahead of the first reader. How far is in `spcompile/schedule/host_windows.py`; the plan of memory
counts with the same windows. No node is added or removed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.fx as fx
from torch import Tensor

from spcompile.collectives.host_copy import HOST_COPIES, TO_DEVICE, TO_HOST, WAIT_COPY
from spcompile.graph.storage import root_of, storage_bytes
from spcompile.passes_api import Context, Example, Pass, Stage
from spcompile.schedule.host_windows import Window, windows_back, windows_out
from spcompile.schedule.op_cost import CostModel, cost_model
from spcompile.schedule.timeline import is_wait, starts


@dataclass(frozen=True)
class PlaceHostCopies(Pass):
    """Start copies early and wait for them late, in the order that the graph has."""

    name: ClassVar[str] = "place-host-copies"
    stage: ClassVar[Stage] = Stage.SCHEDULE
    after: ClassVar[frozenset[str]] = frozenset({"overlap-collectives"})
    summary: ClassVar[str] = "orders copies to the host and back so that compute hides them"

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        """Move starts and waits; returns how many nodes follow another node than before."""
        copies = [node for node in gm.graph.nodes if node.target in HOST_COPIES]
        if not copies:
            return 0
        old = list(gm.graph.nodes)
        calls = [node for node in old if node.op == "call_function" and not _is_copy_or_wait(node)]
        cost = cost_model(ctx.mesh, ctx.options).of_one_graph()
        for start, window in _windows(copies, calls, cost):
            _place_copy(start, window, [*calls, gm.graph.output_node()])
        return sum(a is not b for a, b in zip(old, gm.graph.nodes, strict=True))


def _is_copy_or_wait(node: fx.Node) -> bool:
    return node.target in HOST_COPIES or node.target is WAIT_COPY


def _windows(copies: Sequence[fx.Node], calls: Sequence[fx.Node], cost: CostModel) -> list[tuple[fx.Node, Window]]:
    """Of each start, in the order in which they are to be placed."""
    place = {node: at for at, node in enumerate(calls)}
    seconds = [0.0 if starts(node) or is_wait(node) else cost.work(node).seconds for node in calls]
    out = sorted((n for n in copies if n.target is TO_HOST.op), key=lambda n: place[n.all_input_nodes[0]])
    last = _last_reads(calls)
    leaving = windows_out(
        seconds,
        [(place[value], last[root_of(value)], _takes(n, cost)) for n in out for value in [n.all_input_nodes[0]]],
    )
    first = {n: _first_read(n, place, len(calls)) for n in copies if n.target is TO_DEVICE.op}
    back = sorted(first, key=first.__getitem__)
    coming = windows_back(seconds, [(first[n], _takes(n, cost)) for n in back])
    return [*zip(out, leaving, strict=True), *zip(back, coming, strict=True)]


def _takes(start: fx.Node, cost: CostModel) -> float:
    return cost.host_copy(storage_bytes(start))


def _last_reads(calls: Sequence[fx.Node]) -> dict[fx.Node, int]:
    """Of each storage the place of the last call that makes, reads or views it."""
    return {root_of(value): at for at, node in enumerate(calls) for value in (node, *node.all_input_nodes)}


def _first_read(start: fx.Node, place: Mapping[fx.Node, int], end: int) -> int:
    return min((place.get(reader, end) for wait in start.users for reader in wait.users), default=end)


def _place_copy(start: fx.Node, window: Window, calls: Sequence[fx.Node]) -> None:
    calls[window.start].prepend(start)
    for wait in list(start.users):
        calls[window.end].prepend(wait)


def _residual_products(x_SD: Tensor, w_DD: Tensor) -> Tensor:
    for _ in range(4):
        x_SD = x_SD + (x_SD @ w_DD).sin()
    return x_SD.square().mean()


def _inputs() -> tuple[Tensor, ...]:
    return tuple(torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((64, 4), (4, 4)))


EXAMPLE = Example(_residual_products, _inputs, options={"memory": 20_000, "optimizer": "none"})
