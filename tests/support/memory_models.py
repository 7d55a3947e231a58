"""Models of few lines whose memory is planned, and their joint graphs.

B batch, S sequence, D width, F width inside the MLP, N heads, H head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spcompile.graph.storage import saved_values
from spcompile.machine.accelerators import ACCELERATORS
from spcompile.machine.mesh import MeshShape
from spcompile.memory.joint import Joint
from spcompile.schedule.op_cost import CostModel
from spcompile.torch_private import aot_autograd, make_boxed_func, min_cut_rematerialization_partition

B, S, D, N, WIDE = 1, 64, 16, 4, 64
COST = CostModel(MeshShape(()), ACCELERATORS["h100"], {}, fuses=False)


class Block(nn.Module):
    """Attention and an MLP, each behind a norm; dropout behind both where `p` is not 0."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.up, self.down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)
        self.p = p

    def forward(self, x_BSD: Tensor) -> Tensor:
        B, length, _ = x_BSD.shape
        q, k, v = (t.view(B, length, N, -1).transpose(1, 2) for t in self.qkv(self.first(x_BSD)).chunk(3, -1))
        y_BNSH = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BSD = x_BSD + F.dropout(self.out(y_BNSH.transpose(1, 2).reshape(B, length, D)), self.p, self.training)
        return x_BSD + F.dropout(self.down(F.gelu(self.up(self.second(x_BSD)))), self.p, self.training)


class Decoder(nn.Module):
    """Blocks over vectors; the mean square is the loss. `again`: every block is checkpointed by the model itself."""

    def __init__(self, p: float = 0.0, again: bool = False, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(D, D)
        self.blocks = nn.ModuleList(Block(p) for _ in range(layers))
        self.again = again

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = self.embed(x_BSD)
        for block in self.blocks:
            x_BSD = checkpoint(block, x_BSD, use_reentrant=False) if self.again else block(x_BSD)
        return x_BSD.square().mean()


class Layer(nn.Module):
    """A residual MLP behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.up = nn.Linear(D, WIDE, bias=False)
        self.down = nn.Linear(WIDE, D, bias=False)

    def forward(self, x_BSD: Tensor, memory_BSD: Tensor | None = None) -> Tensor:
        y_BSD = self.norm(x_BSD) if memory_BSD is None else self.norm(x_BSD) * memory_BSD
        return x_BSD + self.down(F.gelu(self.up(y_BSD)))


class Stack(nn.Module):
    """So many layers; with `remembers`, each also reads the output of a first part."""

    def __init__(self, layers: int, remembers: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(D, D)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.remembers = remembers

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = self.first(x_BSD)
        memory_BSD = x_BSD.sigmoid() if self.remembers else None
        for layer in self.layers:
            x_BSD = layer(x_BSD, memory_BSD)
        return x_BSD.square().mean()


def joint_of(function: Callable[..., Any], *inputs: Tensor) -> tuple[Joint, list[fx.Node]]:
    """The joint graph of a function, and what torch's partitioner saves."""
    found: list[tuple[Joint, list[fx.Node]]] = []

    def partition(gm: fx.GraphModule, joint_inputs: Any, **kwargs: Any) -> Any:
        forward, backward = min_cut_rematerialization_partition(gm, joint_inputs, **kwargs)
        here = {node.name: node for node in gm.graph.nodes}
        saved = [here[n.name] for n in saved_values(forward.graph, backward.graph) if n.op == "call_function"]
        found.append((Joint.of(gm.graph, kwargs["num_fwd_outputs"], ACCELERATORS["h100"]), saved))
        return forward, backward

    def run(gm: fx.GraphModule, _: Any) -> Any:
        return make_boxed_func(gm.forward)

    torch.compile(function, backend=aot_autograd(fw_compiler=run, partition_fn=partition))(*inputs)
    return found[0]


def stack(layers: int, remembers: bool = False, length: int = S) -> tuple[Joint, list[fx.Node]]:
    return joint_of(Stack(layers, remembers), torch.randn(B, length, D))
