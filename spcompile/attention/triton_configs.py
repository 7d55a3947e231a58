"""Sizes of tiles, warps and pipeline stages: a table, so that all ranks run the same kernels on the same shapes.

Nothing is timed at run time. Every row compiles without spilled registers, within the architecture's shared memory, see
`tests/test_triton_compile.py`. Halves are bfloat16 and float16, singles float32.
"""

from __future__ import annotations

from typing import NamedTuple

HEAD_SIZES = (64, 128, 256)  # a head, padded to a power of two, takes the first row that it fits


class Config(NamedTuple):
    """block_m query rows by block_n keys a tile; warps of a program; stages of the software pipeline."""

    block_m: int
    block_n: int
    warps: int
    stages: int


class Configs(NamedTuple):
    """One configuration for each kernel: forward, dq, dk and dv, gradient of the bias."""

    forward: Config
    rows: Config
    keys: Config
    bias: Config


# (architecture, bytes of a number, head size)
TABLE = {
    ("sm80", 2, 64): Configs(Config(128, 64, 4, 3), Config(128, 64, 8, 2), Config(64, 128, 8, 2), Config(64, 64, 4, 1)),
    ("sm80", 2, 128): Configs(Config(128, 64, 8, 3), Config(64, 64, 4, 2), Config(64, 64, 4, 2), Config(64, 64, 4, 1)),
    ("sm80", 2, 256): Configs(Config(64, 64, 8, 2), Config(64, 32, 8, 2), Config(32, 64, 8, 1), Config(32, 32, 4, 1)),
    ("sm80", 4, 64): Configs(Config(64, 32, 4, 2), Config(32, 32, 4, 2), Config(32, 32, 4, 1), Config(32, 32, 4, 1)),
    ("sm80", 4, 128): Configs(Config(32, 32, 4, 2), Config(32, 32, 4, 1), Config(32, 32, 8, 1), Config(32, 32, 4, 1)),
    ("sm80", 4, 256): Configs(Config(32, 32, 8, 1), Config(32, 32, 8, 1), Config(32, 32, 8, 1), Config(32, 32, 8, 1)),
    ("sm90", 2, 64): Configs(
        Config(128, 128, 8, 3), Config(128, 64, 8, 3), Config(64, 128, 8, 3), Config(64, 64, 4, 1)
    ),
    ("sm90", 2, 128): Configs(
        Config(128, 128, 8, 2), Config(128, 64, 8, 2), Config(64, 128, 8, 2), Config(64, 64, 4, 1)
    ),
    ("sm90", 2, 256): Configs(Config(128, 64, 8, 2), Config(64, 64, 8, 2), Config(64, 64, 8, 1), Config(64, 32, 4, 1)),
    ("sm90", 4, 64): Configs(Config(64, 32, 4, 2), Config(32, 32, 4, 2), Config(32, 32, 4, 1), Config(32, 32, 4, 1)),
    ("sm90", 4, 128): Configs(Config(32, 32, 4, 2), Config(32, 32, 4, 1), Config(32, 32, 8, 1), Config(32, 32, 4, 1)),
    ("sm90", 4, 256): Configs(Config(32, 32, 8, 1), Config(32, 32, 8, 1), Config(32, 32, 8, 1), Config(32, 32, 8, 1)),
}


def architecture(capability: int) -> str:
    """The rows of the table for a compute capability such as 90."""
    return "sm90" if capability >= 90 else "sm80"


def configs(capability: int, element: int, width: int) -> Configs:
    """The row for a device, bytes of a number, and the larger of the two padded head sizes."""
    size = next(size for size in HEAD_SIZES if width <= size)
    return TABLE[architecture(capability), element, size]
