"""How fast one rank computes: with `spcompile.machine.links` the tables behind every decision that depends on time.

Figures and their sources are in `hardware.json`. Decisions read them and never a clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from spcompile.machine.curves import TimeCurve
from spcompile.machine.hardware import HARDWARE


@dataclass(frozen=True)
class Accelerator:
    """flops: dense products per second at best, by bytes of an element. reached, attention_reached: parts of that.

    bytes_per_second: of its memory, as reached. seconds_per_kernel: the least that anything takes.
    seconds_per_sync: that it idles after the host waited for one of its results. units: what computes one tile of a
    product's result each, at once; a product takes whole rounds of them. memory: bytes; None: as many as one likes.
    capability: of NVIDIA's GPUs, such as 90, which decides on kernels.
    links: what "nvlink" and "network" are in machines with it, where they are not those of `LINKS`.
    host_memory: bytes of the host of a node; None: the host's memory is its own. host_bytes_per_second: between both,
    each way, as reached. products, attention: flops -> seconds by bytes of an element, where they were measured.
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
    links: Mapping[str, str] = field(default_factory=dict, hash=False)
    host_memory: int | None = None
    host_bytes_per_second: float = 1e9
    products: Mapping[int, TimeCurve] = field(default_factory=dict, hash=False)
    attention: Mapping[int, TimeCurve] = field(default_factory=dict, hash=False)

    @property
    def fused_attention(self) -> bool:
        """Whether attention runs in kernels of its own there, not block by block in PyTorch's."""
        return self.capability is not None

    @property
    def usable_memory(self) -> int | None:
        """Bytes for a step: a tenth is left to the driver, to communication and to gaps between tensors."""
        return None if self.memory is None else int(0.9 * self.memory)

    @property
    def usable_host_memory(self) -> int:
        """Bytes of a node for values of its ranks: a tenth is left to the system, to data and to the processes."""
        return 0 if self.host_memory is None else int(0.9 * self.host_memory)

    def rounding(self, tiles: int) -> float:
        """By how much a product of so many tiles takes longer since units stand idle in the last round."""
        return -(-tiles // self.units) * self.units / tiles

    def peak(self, itemsize: int) -> float:
        """Products and sums per second at best, on elements of so many bytes."""
        return self.flops[max(min(self.flops), min(8, itemsize))]

    def product_seconds(self, flops: float, itemsize: int) -> float:
        """Of a product of so many flops."""
        measured = self.products.get(itemsize)
        return measured.seconds(flops) if measured is not None else flops / (self.peak(itemsize) * self.reached)

    def attention_seconds(self, flops: float, itemsize: int) -> float:
        """Of an attention, forward or backward."""
        measured = self.attention.get(itemsize)
        return measured.seconds(flops) if measured is not None else flops / self.attention_flops(itemsize)

    def attention_flops(self, itemsize: int) -> float:
        """Products and sums per second that attention reaches on elements of so many bytes."""
        return self.peak(itemsize) * self.attention_reached

    def __str__(self) -> str:
        peak, memory = self.flops[min(self.flops)] / 1e12, self.bytes_per_second / 1e12
        return (
            f"{self.name}: {self.reached:.0%} of {peak:g} TFLOP/s ({self.attention_reached:.0%} in attention), "
            f"{memory:g} TB/s"
        )


def _accelerator(row: Mapping[str, Any]) -> Accelerator:
    return Accelerator(
        name=row["name"],
        flops={int(size): flops for size, flops in row["peak_flops_by_bytes_of_an_element"].items()},
        reached=row["reached_by_products"],
        attention_reached=row["reached_by_attention"],
        bytes_per_second=row["reached_by_memory"] * row["memory_bytes_per_second"],
        seconds_per_kernel=row["seconds_per_kernel"],
        seconds_per_sync=row["seconds_per_sync"],
        units=row["units"],
        memory=row["memory_bytes"],
        capability=row["capability"],
        links=row["links"],
        host_memory=row["host_memory_bytes_of_a_node"],
        host_bytes_per_second=row["host_bytes_per_second_one_way"] * row["reached_to_host"],
    )


ACCELERATORS = {name: _accelerator(row) for name, row in HARDWARE["accelerators"].items()}
