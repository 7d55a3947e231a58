"""Sizes of tiles, warps and pipeline stages: a table, so that all ranks run the same kernels on the same shapes.

Nothing is timed at run time. Entries were chosen for compiling without spilled registers, within the architecture's
shared memory (`tests/attention/kernels/triton/test_triton_compile.py`), and among those for large tiles and few
instructions for a score (`benchmarks/kernels_static.py`). What is no default (other hops, other scores) may spill a few
bytes a thread. None has been timed on a GPU yet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from spcompile.attention.scores.provider import Scores

DESCRIPTOR_STEP = 16  # bytes: addresses and steps of what a tensor descriptor describes are multiples of it
HEAD_SIZES = (64, 128, 256)  # a head, padded to a power of two, takes the first that it fits


class Config(NamedTuple):
    """block_m query rows by block_n keys a tile; warps of a program; stages of the software pipeline.

    tma: tiles are read through tensor descriptors, where strides allow.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    tma: bool = False


class Configs(NamedTuple):
    """One configuration for each kernel: forward, dq, dk and dv, gradient of the bias."""

    forward: Config
    rows: Config
    keys: Config
    bias: Config = Config(16, 32, 4, 1)


# Variants: "plain", positions alone; "rich", data, softcap, ALiBi or dropout too; "bias", a dense bias.
# bfloat16 and float16: (architecture, head size, variant)
_HALVES = {
    ("sm80", 64, "plain"): Configs(Config(128, 32, 8, 3), Config(64, 64, 8, 2), Config(32, 64, 8, 2)),
    ("sm80", 64, "rich"): Configs(Config(128, 64, 8, 2), Config(128, 64, 8, 2), Config(32, 64, 8, 2)),
    ("sm80", 64, "bias"): Configs(Config(128, 32, 8, 3), Config(64, 32, 8, 2), Config(32, 32, 4, 2)),
    ("sm80", 128, "plain"): Configs(Config(128, 32, 8, 3), Config(64, 64, 8, 2), Config(32, 64, 8, 2)),
    ("sm80", 128, "rich"): Configs(Config(128, 32, 8, 3), Config(64, 64, 8, 2), Config(32, 64, 8, 2)),
    ("sm80", 128, "bias"): Configs(Config(64, 32, 8, 2), Config(64, 64, 8, 2), Config(32, 64, 8, 2)),
    ("sm80", 256, "plain"): Configs(Config(64, 32, 8, 2), Config(64, 32, 8, 2), Config(32, 64, 8, 1)),
    ("sm80", 256, "rich"): Configs(Config(64, 32, 8, 2), Config(64, 32, 8, 2), Config(16, 32, 8, 1)),
    ("sm80", 256, "bias"): Configs(Config(64, 32, 8, 2), Config(64, 32, 8, 2), Config(16, 32, 8, 1)),
    ("sm90", 64, "plain"): Configs(
        Config(128, 128, 8, 3, True), Config(128, 128, 8, 3, True), Config(64, 128, 8, 3, True)
    ),
    ("sm90", 64, "rich"): Configs(
        Config(128, 128, 8, 2, True), Config(128, 64, 8, 3, True), Config(64, 128, 8, 2, True)
    ),
    ("sm90", 64, "bias"): Configs(
        Config(128, 64, 8, 2, True), Config(128, 64, 8, 2, True), Config(32, 128, 8, 2, True)
    ),
    ("sm90", 128, "plain"): Configs(
        Config(128, 128, 8, 3, True), Config(128, 64, 8, 3, True), Config(64, 128, 8, 2, True)
    ),
    ("sm90", 128, "rich"): Configs(
        Config(128, 64, 8, 3, True), Config(128, 64, 8, 2, True), Config(32, 64, 8, 2, True)
    ),
    ("sm90", 128, "bias"): Configs(
        Config(128, 32, 8, 2, True), Config(128, 32, 8, 2, True), Config(32, 64, 8, 2, True)
    ),
    ("sm90", 256, "plain"): Configs(Config(64, 64, 8, 2, True), Config(64, 32, 8, 2, True), Config(32, 64, 8, 2, True)),
    ("sm90", 256, "rich"): Configs(Config(64, 64, 8, 2, True), Config(64, 32, 8, 2, True), Config(16, 64, 8, 2, True)),
    ("sm90", 256, "bias"): Configs(Config(64, 32, 8, 2, True), Config(64, 16, 8, 2, True), Config(16, 64, 8, 2, True)),
    ("sm100", 64, "plain"): Configs(
        Config(128, 128, 8, 3, True), Config(128, 64, 4, 2, True), Config(64, 128, 8, 3, True)
    ),
    ("sm100", 64, "rich"): Configs(
        Config(128, 128, 8, 2, True), Config(128, 64, 8, 3, True), Config(64, 128, 8, 2, True)
    ),
    ("sm100", 64, "bias"): Configs(
        Config(128, 64, 8, 2, True), Config(128, 64, 8, 2, True), Config(32, 128, 8, 2, True), Config(16, 16, 4, 1)
    ),
    ("sm100", 128, "plain"): Configs(
        Config(128, 128, 8, 2, True), Config(128, 64, 8, 3, True), Config(64, 128, 8, 3, True)
    ),
    ("sm100", 128, "rich"): Configs(
        Config(128, 64, 8, 3, True), Config(128, 64, 8, 2, True), Config(32, 128, 8, 2, True)
    ),
    ("sm100", 128, "bias"): Configs(
        Config(32, 32, 4, 2, True), Config(128, 32, 8, 2, True), Config(32, 64, 8, 2, True)
    ),
    ("sm100", 256, "plain"): Configs(
        Config(64, 64, 8, 2, True), Config(64, 32, 8, 2, True), Config(32, 64, 8, 1, True)
    ),
    ("sm100", 256, "rich"): Configs(Config(64, 64, 8, 2, True), Config(64, 32, 8, 1, True), Config(16, 64, 8, 1, True)),
    ("sm100", 256, "bias"): Configs(Config(64, 16, 8, 2, True), Config(64, 16, 8, 1, True), Config(16, 32, 8, 1)),
}

# float32, which no tensor core multiplies exactly, and so no architecture differently: (head size, variant)
_SINGLES = {
    (64, "plain"): Configs(Config(32, 32, 4, 1), Config(32, 32, 4, 1), Config(32, 32, 8, 1)),
    (64, "rich"): Configs(Config(32, 32, 8, 1), Config(32, 32, 4, 1), Config(32, 32, 8, 1)),
    (64, "bias"): Configs(Config(32, 16, 8, 1), Config(16, 32, 8, 1), Config(16, 32, 8, 1)),
    (128, "plain"): Configs(Config(32, 32, 8, 1), Config(32, 16, 8, 1), Config(32, 32, 8, 1)),
    (128, "rich"): Configs(Config(32, 32, 8, 1), Config(16, 16, 4, 1), Config(32, 32, 8, 1)),
    (128, "bias"): Configs(Config(32, 32, 8, 1), Config(16, 16, 4, 1), Config(32, 32, 4, 1), Config(16, 32, 8, 1)),
    (256, "plain"): Configs(Config(32, 32, 8, 1), Config(32, 32, 8, 1), Config(16, 32, 8, 1)),
    (256, "rich"): Configs(Config(32, 16, 8, 1), Config(32, 32, 8, 1), Config(16, 32, 8, 1)),
    (256, "bias"): Configs(Config(32, 32, 8, 1), Config(32, 32, 8, 1), Config(16, 32, 8, 1), Config(16, 32, 8, 1)),
}

ARCHITECTURES = ("sm80", "sm90", "sm100")
TABLE = {(arch, 2, size, variant): found for (arch, size, variant), found in _HALVES.items()}
TABLE |= {(arch, 4, *key): found for arch in ARCHITECTURES for key, found in _SINGLES.items()}
# On sm_100, ptxas takes 255 registers for a bias that keeps or drops keys, and spills: narrower tiles, which spill on
# sm_80 in turn.
TABLE["sm100", 4, 128, "bias"] = _SINGLES[128, "bias"]._replace(forward=Config(32, 16, 8, 1))


def architecture(capability: int, described: bool) -> str:
    """The rows of the table for a compute capability such as 90.

    described: tensor descriptors can describe the operands. Without, Hopper and later take the rows of Ampere.
    """
    if not described or capability < 90:
        return "sm80"
    return "sm90" if capability < 100 else "sm100"


def width_of(size: int) -> int:
    """A head size as kernels hold it: the next power of two, at least 16."""
    return max(16, 1 << (size - 1).bit_length())


def variant_of(scores: Scores) -> str:
    """Which configurations the scores ask for: what else than positions a kernel must hold in registers."""
    if scores.bias is not None:
        return "bias"
    more = (scores.alibi_slopes, scores.dropout)
    rich = (
        scores.mask.needs_data
        or scores.mask.rounded_by is not None
        or scores.softcap > 0
        or any(x is not None for x in more)
    )
    return "rich" if rich else "plain"


def configs(capability: int, described: bool, element: int, width: int, variant: str) -> Configs:
    """The row for a device, bytes of a number, the larger of the two padded head sizes, and a variant."""
    size = next(size for size in HEAD_SIZES if width <= size)
    return TABLE[architecture(capability, described), element, size, variant]


def device_configs(device: torch.device, element: int, head_size: int, v_head_size: int, variant: str) -> Configs:
    """The row for operands of these sizes; off a GPU, as under the interpreter, that of an H100.

    element: bytes of a number. Nothing but sizes decides: what a descriptor cannot describe is copied.
    """
    capability = 90
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        capability = 10 * major + minor
    described = all(size * element % DESCRIPTOR_STEP == 0 for size in (head_size, v_head_size))
    return configs(capability, described, element, width_of(max(head_size, v_head_size)), variant)


def smallest(element: int, head_size: int, v_head_size: int, variant: str) -> Configs:
    """For each kernel the fewest rows and keys of a tile on any architecture."""
    size = next(size for size in HEAD_SIZES if width_of(max(head_size, v_head_size)) <= size)
    rows = [TABLE[arch, element, size, variant] for arch in ARCHITECTURES]
    kernels = zip(*rows, strict=True)
    return Configs(*(Config(min(c.block_m for c in same), min(c.block_n for c in same), 0, 0) for same in kernels))
