"""The blocks of docs/works-with.md run on two or four processes, with the losses of one."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import hf_models
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from trainer_runs import ddp_does_not_crash, shared_folder
from worker_pool import WorkerPool

import spcompile
from spcompile.options import Options

PoolOf = Callable[[int], WorkerPool]
PAGE = Path(__file__).parents[2] / "docs" / "works-with.md"
STEP, *BLOCKS = [
    (section.partition("\n")[0], *re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL))
    for section in re.split(r"^##? ", PAGE.read_text(), flags=re.MULTILINE)[1:]
]
STEPS, LENGTH = 3, 24


def own_rows(batch: dict[str, Tensor], mesh: DeviceMesh) -> dict[str, Tensor]:
    return {name: value.chunk(mesh.size())[mesh.get_local_rank()] for name, value in batch.items()}


def model_and_batch() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    ids = torch.randint(1, hf_models.VOCAB, (4, LENGTH))
    return hf_models.build("llama", layers=1), {"input_ids": ids, "labels": ids}


def losses_of(block: str) -> tuple[list[float], list[float]]:
    """(those of a block, those of one process)."""
    model, batch = model_and_batch()
    names: dict[str, Any] = {"torch": torch, "spcompile": spcompile, "own_rows": own_rows, "batch": batch}
    names |= {"model": copy.deepcopy(model), "folder": shared_folder()}
    exec(compile(STEP[1], str(PAGE), "exec"), names)
    imports = "\n".join(re.findall(r"^from .*|^import .*", "\n".join(text for _, text in BLOCKS), flags=re.MULTILINE))
    exec(compile(imports, str(PAGE), "exec"), names)
    whole = Options.parse  # graphs that run as they are: Inductor is what other tests are about
    quick = mock.patch.object(Options, "parse", lambda given: whole({"compiler": "eager", **(given or {})}))
    with ddp_does_not_crash(), quick:
        exec(compile(block.replace('"cuda"', '"cpu"'), str(PAGE), "exec"), names)
    plain = names["with_adapters"](model) if "with_adapters" in names else model
    optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=1e-2)
    return names["losses"], [names["step"](plain, optimizer, batch) for _ in range(STEPS)]


@pytest.mark.slow
@pytest.mark.thinned(14)
@pytest.mark.parametrize(("title", "block"), BLOCKS, ids=[title for title, _ in BLOCKS])
def test_blocks(worker_pool: PoolOf, title: str, block: str) -> None:
    results = worker_pool(4 if "(2, 2)" in block else 2).run(losses_of, block)
    plain = torch.tensor(results[0][1])
    found = torch.tensor([losses for losses, _ in results]).mean(0)  # over dp, each has those of its rows
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)


def test_every_section_has_a_block() -> None:
    assert [len(section) for section in (STEP, *BLOCKS)] == [2] * 6
