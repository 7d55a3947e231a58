"""The final graphs of a small model's program, beside what the plain model computes on the same inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.fx as fx
from torch import Tensor, nn

import spcompile.check.attention_specs  # noqa: F401  (the simulator learns ring attention)
from spcompile import models
from spcompile.machine.mesh import MeshShape
from spcompile.models.llama import LlamaConfig
from spcompile.options import Options
from spcompile.passes import PIPELINE
from spcompile.program.build import build
from spcompile.program.trace import through_dynamo
from spcompile.report.example_runs import graphs_after_autograd

Graphs = dict[str, fx.GraphModule]
Mode = Literal["poison", "late"]
MODES: tuple[Mode, ...] = ("poison", "late")


def final_graphs(
    model: nn.Module, inputs: tuple[Tensor, ...], mesh: Mapping[str, int], **options: Any
) -> tuple[Graphs, Any, list[Any]]:
    """(forward and backward of one rank, Dynamo's graph as plain torch runs it, the inputs of both)."""

    found: list[Any] = []

    def backend(gm: fx.GraphModule, given: Sequence[Any]) -> None:
        program = build(gm, given, MeshShape.of(mesh), Options(outputs="loss", compiler="eager", **options), PIPELINE)
        found.extend((graphs_after_autograd(program), gm.forward, list(given)))

    through_dynamo(model, inputs, backend)
    return found[0], found[1], found[2]


def llama(layers: int = 2) -> nn.Module:
    config = LlamaConfig(vocab=64, layers=layers, heads=4, kv_heads=2, dim=32, hidden=48)
    return models.llama.build(config).double()


def tokens(length: int = 16) -> tuple[Tensor, Tensor]:
    ids_BS = torch.randint(0, 64, (2, length), generator=torch.Generator().manual_seed(0))
    return ids_BS, ids_BS
