"""Traces one rank of a step on fake CUDA tensors, for test_fake_cuda.py; in a process of its own.

A build of PyTorch without CUDA lacks what its dispatcher asks for every CUDA tensor, even a fake one. The library whose
path is the first argument brings it. Autograd's engine asks for more, so what is traced is the graph before autograd
where there are gradients, and all graphs where there are none.
"""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

ctypes.CDLL(sys.argv[1])

from spcompile import models  # noqa: E402
from spcompile.machine.mesh import MeshShape  # noqa: E402
from spcompile.models.llama import LlamaConfig  # noqa: E402
from spcompile.options import Options  # noqa: E402
from spcompile.passes import PIPELINE  # noqa: E402
from spcompile.program.build import build  # noqa: E402
from spcompile.program.emit import Emission, emit_nothing  # noqa: E402
from spcompile.program.trace import through_dynamo  # noqa: E402


class Packed(nn.Module):
    """Documents and left padding, a window in the second layer, a loss inside."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 64)
        self.qkv = nn.ModuleList(nn.Linear(64, 192) for _ in range(3))
        self.head = nn.Linear(64, 64)

    def forward(self, ids: Tensor, documents: Tensor, valid: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(ids)
        at = torch.arange(ids.shape[1], device=ids.device)
        keep = (documents[:, None, :, None] == documents[:, None, None]) & (at[:, None] >= at) & valid[:, None, None]
        for number, layer in enumerate(self.qkv):
            q, k, v = (t.unflatten(-1, (8, -1)).transpose(1, 2) for t in layer(x).chunk(3, -1))
            mask = keep & (at[:, None] - at < 20) if number == 1 else keep
            x = x + F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def on_fake_cuda(model: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    """The inputs; parameters and buffers are replaced."""
    with FakeTensorMode():

        def moved(x: Tensor) -> Tensor:
            return torch.empty(x.shape, dtype=x.dtype, device="cuda")

        for module in model.modules():
            for name, x in module._parameters.items():
                module._parameters[name] = None if x is None else nn.Parameter(moved(x))
            for name, x in module._buffers.items():
                module._buffers[name] = None if x is None else moved(x)
        return [moved(x) for x in inputs]


def model_of(name: str) -> tuple[nn.Module, list[Tensor]]:
    with torch.device("meta"):
        ids = torch.empty((4, 61), dtype=torch.int64)
        if name == "packed":
            return Packed().bfloat16(), [ids, ids, torch.empty((4, 61), dtype=torch.bool), ids]
        config = LlamaConfig(vocab=64, layers=2, heads=8, kv_heads=2, dim=64, hidden=96)
        return models.llama.build(config).bfloat16(), [ids, ids]


def devices(graph: fx.Graph) -> dict[str, str]:
    """The nodes whose results are not on the GPU."""
    found = {}
    for node in graph.nodes:
        for x in pytree.tree_leaves(node.meta.get("val")):
            if isinstance(x, Tensor) and x.device.type != "cuda":
                found[node.name] = f"{node.target} {x.device} {x.dtype} {tuple(x.shape)}"
    return found


def run(name: str, mesh: dict[str, int], grad: bool, options: dict[str, Any]) -> dict[str, Any]:
    """What is off the GPU, what stays unchecked, and how many ops of ours there are."""
    model, given = model_of(name)
    inputs = on_fake_cuda(model, given)
    graphs: dict[str, fx.GraphModule] = {}

    def backend(gm: fx.GraphModule, values: Any) -> None:
        program = build(gm, values, MeshShape.of(mesh), Options(outputs="loss", **options), PIPELINE)
        graphs["local"] = program.gm
        if not grad:
            emission = Emission(program, bind=lambda graph: None)
            emit_nothing(emission)
            graphs.update(emission.graphs)

    with torch.set_grad_enabled(grad):
        through_dynamo(model, tuple(inputs), backend)
    off = {phase: devices(gm.graph) for phase, gm in graphs.items()}
    ops = [str(n.target) for gm in graphs.values() for n in gm.graph.nodes if "spx" in str(n.target)]
    return {"off": off, "phases": sorted(graphs), "ops": {op: ops.count(op) for op in sorted(set(ops))}}


if __name__ == "__main__":
    cases = json.loads(sys.argv[2])
    print(json.dumps([run(*case) for case in cases]))
