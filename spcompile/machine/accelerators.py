"""How fast one rank computes: with `spcompile.machine.links` the tables behind every decision that depends on time.

Round numbers; decisions read them and never a clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Accelerator:
    """flops: dense products per second at best, by bytes of an element. reached, attention_reached: parts of that.

    bytes_per_second: of its memory, as reached. seconds_per_kernel: the least that anything takes.
    seconds_per_sync: that it idles after the host waited for one of its results. units: what computes one tile of a
    product's result each, at once; a product takes whole rounds of them. memory: bytes; None: as many as one likes.
    capability: of NVIDIA's GPUs, such as 90, which decides on kernels.
    """

    name: str
    flops: Mapping[int, float]
    reached: float
    attention_reached: float
    bytes_per_second: float
    seconds_per_kernel: float
    seconds_per_sync: float = 0.0
    units: int = 1
    memory: int | None = None
    capability: int | None = None

    @property
    def fused_attention(self) -> bool:
        """Whether attention runs in kernels of its own there, not block by block in PyTorch's."""
        return self.capability is not None

    @property
    def usable_memory(self) -> int | None:
        """Bytes for a step: a tenth is left to the driver, to communication and to gaps between tensors."""
        return None if self.memory is None else int(0.9 * self.memory)

    def rounding(self, tiles: int) -> float:
        """By how much a product of so many tiles takes longer since units stand idle in the last round."""
        return -(-tiles // self.units) * self.units / tiles

    def peak(self, itemsize: int) -> float:
        """Products and sums per second at best, on elements of so many bytes."""
        return self.flops[max(min(self.flops), min(8, itemsize))]

    def attention_flops(self, itemsize: int) -> float:
        """Products and sums per second that attention reaches on elements of so many bytes."""
        return self.peak(itemsize) * self.attention_reached

    def __str__(self) -> str:
        peak, memory = self.flops[min(self.flops)] / 1e12, self.bytes_per_second / 1e12
        return (
            f"{self.name}: {self.reached:.0%} of {peak:g} TFLOP/s ({self.attention_reached:.0%} in attention), "
            f"{memory:g} TB/s"
        )


# As nvidia-smi shows them for the cards "with 80 GB".
_H100, _A100 = 81_559 * 2**20, 81_920 * 2**20

ACCELERATORS = {
    # Data sheets: dense bf16, float32 without TF32, float64 tensor cores. Reached: by large cuBLAS products and by
    # FlashAttention. A sync: a copy to the host and the launches that the host has not made meanwhile.
    "h100": Accelerator(
        "H100 SXM", {2: 989e12, 4: 67e12, 8: 67e12}, 0.65, 0.5, 0.8 * 3.35e12, 3e-6, 100e-6, 132, _H100, 90
    ),
    "a100": Accelerator(
        "A100 SXM", {2: 312e12, 4: 19.5e12, 8: 19.5e12}, 0.75, 0.6, 0.8 * 2.04e12, 4e-6, 100e-6, 108, _A100, 80
    ),
    "cpu": Accelerator("one CPU core", {4: 80e9, 8: 40e9}, 0.6, 0.4, 6e9, 5e-6),
}
