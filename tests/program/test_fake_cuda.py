"""The CUDA path without a device: one rank of a step is traced on fake CUDA tensors, and nothing lands on the CPU."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
CASES: list[tuple[str, dict[str, int], bool, dict[str, Any]]] = [
    (model, mesh, grad, options)
    for model in ("llama", "packed")
    for grad in (True, False)
    for mesh, options in (
        ({"cp": 8}, {"attention": "ring"}),
        ({"cp": 8}, {"attention": "ulysses"}),
        ({"cp": 8}, {"attention": {"ulysses": 4, "ring": 2}}),
        ({"tp": 2, "cp": 4}, {"attention": "ring"}),
    )
]
ON_HOST = ("agree_on_hops",)  # whose answer the host reads


def library(folder: Path) -> str:
    """The compiled guard; a build of PyTorch with CUDA has its own, and the test needs none."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    root = Path(torch.__file__).parent
    made = folder / "guard.so"
    command = [compiler, "-std=c++20", "-shared", "-fPIC", f"-I{root / 'include'}"]
    command += [str(HERE / "cuda_without_device.cpp"), "-o", str(made), f"-L{root / 'lib'}", "-lc10"]
    subprocess.run(command, check=True, capture_output=True)
    return str(made)


@pytest.mark.slow
@pytest.mark.thinned(22)
@pytest.mark.parametrize("first", range(4))
@pytest.mark.skipif(torch.version.cuda is not None, reason="for builds without CUDA")
def test_all_that_is_traced_stays_on_the_gpu(first: int, tmp_path: Path) -> None:
    cases = CASES[first::4]
    command = [sys.executable, str(HERE / "traced_on_cuda.py"), library(tmp_path), json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    for case, found in zip(cases, json.loads(done.stdout.splitlines()[-1]), strict=True):
        name, _, grad, options = case
        assert found["phases"] == (["local"] if grad else ["inference", "local"])
        for phase, nodes in found["off"].items():
            strays = {node: what for node, what in nodes.items() if not any(op in what for op in ON_HOST)}
            assert not strays, (case, phase, strays)
        ops = found["ops"]
        assert any("attention" in op for op in ops), case
        made = ops.get("spx.tile_tables.default", 0)
        copies = 1 if grad else 2  # the local and the final graph
        assert made == (2 * copies if name == "packed" else 0), (case, ops)
        if options["attention"] == "ring":
            assert "spx.ring_attention.default" in ops
