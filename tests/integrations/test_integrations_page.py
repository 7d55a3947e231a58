"""The blocks of docs/integrations.md run, as two processes that a launcher started."""

from __future__ import annotations

import copy
import os
import re
import tempfile
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from unittest import mock

import hf_models
import pytest
from trainer_runs import Rows, launched, padded
from worker_pool import WorkerPool

PoolOf = Callable[[int], WorkerPool]
PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"


def blocks_run() -> int:
    """All blocks, with graphs that run as they are: Inductor is what other tests are about."""
    from spcompile.integrations.accelerate import SequenceParallelAccelerator

    whole = SequenceParallelAccelerator._options
    quick = partialmethod(lambda self, given: whole(self, {"compiler": "eager", **(given or {})}))
    made = hf_models.build("llama", layers=1)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    for block in blocks:
        names = {"model": copy.deepcopy(made), "rows": Rows(8), "collate": padded, "output_dir": tempfile.mkdtemp()}
        on_cpu = mock.patch.dict(os.environ, ACCELERATE_USE_CPU="true")
        with launched(2), on_cpu, mock.patch.object(SequenceParallelAccelerator, "_options", quick):
            exec(compile(block, str(PAGE), "exec"), names)
    return len(blocks)


@pytest.mark.slow
@pytest.mark.thinned(3)
def test_blocks(worker_pool: PoolOf) -> None:
    assert worker_pool(2).run(blocks_run) == [3, 3]
