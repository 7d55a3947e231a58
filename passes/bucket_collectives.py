"""bucket-collectives: the sums of parameter gradients of one axis travel together.

Before: one all-reduce per parameter. After: one per bucket, over the gradients laid end to end:
    flat = cat(g1.flatten(), g2.flatten()); sum = all_reduce(flat); g1', g2' = split(sum)
Buckets close in the order in which the backward produces gradients, so an early bucket travels while later ones are
still computed (Li et al. 2020, PyTorch Distributed, section 3.2).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.fx as fx
from torch import Tensor

from spcompile.collectives import call_arguments
from spcompile.passes_api import Context, Example, Pass, Stage
from spcompile.sizes import numel_hint
from spcompile.splice import splice

spx = torch.ops.spx
MEBIBYTE = 2**20


@dataclass(frozen=True)
class BucketCollectives(Pass):
    """Fuse the all-reduces whose results only leave the graph.

    bucket_mib: a bucket is closed when it holds this many MiB.
    """

    name: ClassVar[str] = "bucket-collectives"
    stage: ClassVar[Stage] = Stage.SCHEDULE
    summary: ClassVar[str] = "fuses the all-reduces of parameter gradients into buckets"

    bucket_mib: float = 25.0

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        """Fuse; returns the number of all-reduces that were replaced."""
        count = 0
        for bucket in list(self._buckets(gm.graph)):
            _fuse(bucket)
            count += len(bucket)
        gm.recompile()
        return count

    def _buckets(self, graph: fx.Graph) -> Iterator[list[fx.Node]]:
        """Runs of all-reduces of one axis and dtype, in order, of at least two members."""
        open_buckets: dict[tuple[object, ...], list[fx.Node]] = {}
        for node in graph.nodes:
            if not _leaves_graph(node):
                continue
            value: Tensor = node.meta["val"]
            bucket = open_buckets.setdefault((*node.args[1:], value.dtype, value.device), [])
            bucket.append(node)
            if sum(numel_hint(n.meta["val"]) * value.element_size() for n in bucket) >= self.bucket_mib * MEBIBYTE:
                if len(bucket) > 1:
                    yield list(bucket)
                bucket.clear()
        yield from (bucket for bucket in open_buckets.values() if len(bucket) > 1)


def _leaves_graph(node: fx.Node) -> bool:
    """An all-reduce whose result is read by nobody but the output: a complete parameter gradient."""
    return node.target is spx.all_reduce.default and all(user.op == "output" for user in node.users)


def _fuse(bucket: list[fx.Node]) -> None:
    last = bucket[-1]
    _, arguments = call_arguments(last.target, last.args, last.kwargs)  # type: ignore[arg-type]
    operands = [node.args[0] for node in bucket]

    def fused(*gradients: Tensor) -> list[Tensor]:
        flat = torch.cat([g.reshape(-1) for g in gradients])
        total = spx.all_reduce(flat, *arguments.values())
        parts = total.split([g.numel() for g in gradients])
        return [part.reshape(g.shape) for part, g in zip(parts, gradients, strict=True)]

    results = splice(fused, operands, like=last, pre_dispatch=False)
    for node, result in zip(bucket, results, strict=True):
        node.replace_all_uses_with(result)
        node.graph.erase_node(node)


def _attention_of_two_weights(x_BNSH: Tensor, q_HH: Tensor, k_HH: Tensor) -> Tensor:
    k_BNSH = x_BNSH @ k_HH
    return torch.nn.functional.scaled_dot_product_attention(x_BNSH @ q_HH, k_BNSH, k_BNSH)


def _inputs() -> tuple[Tensor, ...]:
    x_BNSH = torch.randn(1, 4, 7, 2, dtype=torch.float64)
    return x_BNSH, *(torch.randn(2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))


EXAMPLE = Example(_attention_of_two_weights, _inputs, options={"attention": "ring"})
