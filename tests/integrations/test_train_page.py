"""docs/train-at-128k.md: its script trains on two processes, its commands run, with a small model and short rows."""

from __future__ import annotations

import os
import re
import shlex
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import hf_models
import pytest
import torch
import torch.distributed as dist
from trainer_runs import LENGTH, Rows, launched, padded
from worker_pool import WorkerPool

from spcompile.command.cli import app
from spcompile.options import Options

PoolOf = Callable[[int], WorkerPool]
PAGE = (Path(__file__).parents[2] / "docs" / "train-at-128k.md").read_text()
(SCRIPT,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
COMMANDS = [
    line for block in re.findall(r"```\n(spcompile .*?)```", PAGE, flags=re.DOTALL) for line in block.splitlines()
]
SMALL = {
    "131_072": str(LENGTH),
    '"cuda", (8,)': '"cpu", (2,)',
    "bfloat16": "float32",
    "models:llama3-8b": "models:llama-tiny",
    "128k": "128",
    "--world 8": "--world 2",
    "cp=8": "cp=2",
}


def small(text: str) -> str:
    for name, instead in SMALL.items():
        text = text.replace(name, instead)
    return text


def run_script() -> tuple[int, list[str]]:
    """(steps that were made, files that were written)."""
    folders = [tempfile.mkdtemp(), tempfile.mkdtemp()]
    dist.broadcast_object_list(folders)
    if dist.get_rank() == 0:
        hf_models.build("llama", layers=1).save_pretrained(folders[0])
    dist.barrier()
    names = {"rows": Rows(8), "collate": padded, "folder": folders[0], "output": folders[1]}
    whole = Options.parse  # graphs that run as they are: Inductor is what other tests are about
    quick = mock.patch.object(Options, "parse", lambda given: whole({"compiler": "eager", **(given or {})}))
    with launched(2), mock.patch.dict(os.environ, ACCELERATE_USE_CPU="true"), quick:
        exec(compile(small(SCRIPT), "train-at-128k.md", "exec"), names)
    dist.barrier()
    return names["trainer"].state.global_step, sorted(os.listdir(folders[1]))


@pytest.mark.slow
@pytest.mark.thinned(2)
def test_script(worker_pool: PoolOf) -> None:
    for steps, files in worker_pool(2).run(run_script):
        assert steps == 3
        assert "model.safetensors" in files


@pytest.mark.slow
@pytest.mark.thinned(6)
@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch._dynamo.reset()
    assert not app(shlex.split(small(command))[1:], result_action="return_value", exit_on_error=False)


def test_the_page_has_commands() -> None:
    assert [line.split()[1] for line in COMMANDS] == ["plan", "explain", "verify"]
