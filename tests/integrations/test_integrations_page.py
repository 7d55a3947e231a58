"""The blocks of docs/integrations.md run, as two processes that a launcher started."""

from __future__ import annotations

import copy
import importlib.util
import os
import re
import tempfile
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from typing import Any
from unittest import mock

import hf_models
import pytest
import torch
from trainer_runs import Rows, launched, padded
from worker_pool import WorkerPool

PoolOf = Callable[[int], WorkerPool]
PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"


def lightning_module(model: torch.nn.Module) -> Any:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, at: int) -> Any:
            return self.model(**batch).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters())

    return Module()


def blocks_run() -> int:
    """All blocks, with graphs that run as they are: Inductor is what other tests are about.

    Those with lightning run where it is installed.
    """
    from spcompile.integrations.batch_mesh import BatchMesh

    whole = BatchMesh.backend_options
    quick = partialmethod(lambda self, given: whole(self, {"compiler": "eager", **(given or {})}))
    made = hf_models.build("llama", layers=1)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    has_lightning = importlib.util.find_spec("lightning") is not None
    for block in blocks:
        if "lightning" in block and not has_lightning:
            continue
        names = {"model": copy.deepcopy(made), "rows": Rows(8), "collate": padded, "output_dir": tempfile.mkdtemp()}
        names["loader"] = torch.utils.data.DataLoader(Rows(8), 2, collate_fn=padded)
        if has_lightning:
            names["lightning_module"] = lightning_module(copy.deepcopy(made))
        on_cpu = mock.patch.dict(os.environ, ACCELERATE_USE_CPU="true")
        with launched(2), on_cpu, mock.patch.object(BatchMesh, "backend_options", quick):
            exec(compile(block, str(PAGE), "exec"), names)
    return len(blocks)


@pytest.mark.slow
@pytest.mark.thinned(3)
def test_blocks(worker_pool: PoolOf) -> None:
    assert worker_pool(2).run(blocks_run) == [7, 7]
