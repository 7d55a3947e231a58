"""Compiles kernel launches for GPUs that are not there, and reads from the machine code what they would need."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from spcompile.attention.kernels.triton.launch import Launch

TENSOR_MEMORY = 512  # columns that one program may have; with more, the kernel is nothing but a trap
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Resources(NamedTuple):
    """Per program: bytes of shared memory, columns of tensor memory (sm_100), of which there are TENSOR_MEMORY.

    Per thread: registers, bytes of spilled registers (stack and local).
    """

    shared: int
    columns: int
    registers: int
    spilled: int
    assembly: str


class AbsentDevice:
    """A driver that knows its target and can do nothing else."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def compiled(launch: Launch, capability: int) -> Any:
    """What triton would run for this launch on a device of this capability, through its own choice of signature."""
    previous = driver._active
    driver.set_active(AbsentDevice(capability))
    try:
        return launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.options)
    finally:
        driver._active = previous


def resources(launch: Launch, capability: int) -> Resources:
    """Compiles and reads the cubin's own table."""
    kernel = compiled(launch, capability)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    spilled = int(found["STACK"]) + int(found["LOCAL"])
    columns = kernel.metadata.tmem_size
    return Resources(kernel.metadata.shared, columns, int(found["REG"]), spilled, kernel.asm["ptx"])
