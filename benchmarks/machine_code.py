"""What the inner loops of a compiled kernel are made of, read from the machine code: no device is needed.

The loops of tiles are the innermost natural loops that multiply matrices: what comes back to an instruction that all of
it has passed. The code that spins on a barrier often stands behind the kernel's end, and counts where it belongs.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import networkx
import triton

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
KINDS = {
    "matrix": r"HGMMA|HMMA|UTC\w*MMA",
    "exp": r"MUFU\.EX2",
    "other special": r"MUFU",
    "shared": r"LDS|STS|LDSM|STSM|ATOMS|LDTM|STTM|LDT|STT",
    "global": r"LDG|STG|LDGSTS|UTMA|UBLK|RED|ATOMG|LD\b|ST\b",
    "barrier": r"BAR|SYNCS|WARPSYNC|WARPGROUP|DEPBAR|LDGDEPBAR|UTCBAR|FENCE|MEMBAR|ARRIVES|ELECT|CCTL|ERRBAR",
    "float": r"FADD|FMUL|FFMA|FMNMX|FSEL|FSETP|FSET|HADD2|HMUL2|HFMA2|F2F|FCHK|FRND|FMNMX3",
}


class Card(NamedTuple):
    """Per multiprocessor and cycle: bfloat16 operations of tensor cores, exponentials, float32 results, instructions.

    Whole card: multiprocessors, cycles a second under load. Data sheets and the CUDA programming guide, section
    "arithmetic instructions".
    """

    tensor: int
    special: int
    float: int
    issued: int
    processors: int
    hertz: float


# H100 SXM: 989.4 TFLOP/s dense, 132 SMs, 1.83 GHz. B200: 2250 TFLOP/s dense, 148 SMs, 1.85 GHz.
CARDS = {90: Card(4096, 16, 128, 4, 132, 1.83e9), 100: Card(8192, 16, 128, 4, 148, 1.85e9)}
REGISTERS, THREADS, RESIDENT = 65536, 2048, 32  # of a multiprocessor
SHARED = 228 * 1024  # bytes of a multiprocessor, of which each program takes 1 KiB for itself


class Instruction(NamedTuple):
    """One line of a listing; name: with what modifies it; condition: of the line, empty without one."""

    address: int
    condition: str
    name: str
    rest: str

    @property
    def target(self) -> int | None:
        """Where it jumps to."""
        found = re.search(r"0x([0-9a-f]+)\s*$", self.rest) if self.name.startswith("BRA") else None
        return int(found[1], 16) if found else None

    @property
    def ends(self) -> bool:
        """Whether the next instruction is never the next one: a jump or an exit without a condition."""
        return self.name.startswith(("BRA", "EXIT", "RET")) and not self.condition and "UP" not in self.rest


@dataclass(frozen=True)
class TileLoop:
    """One loop over tiles: instructions of a warp in a turn, by kind."""

    counts: Counter[str]

    @property
    def instructions(self) -> int:
        """All."""
        return sum(self.counts.values())

    def cycles(self, card: Card, warps: int, operations: float) -> dict[str, float]:
        """The least cycles of a multiprocessor for one turn of one program, by what would be busy.

        operations: bfloat16 operations of the tile's matrix products.
        """
        lanes = 32 * warps
        special = self.counts["exp"] + self.counts["other special"]
        return {
            "tensor": operations / card.tensor,
            "special": special * lanes / card.special,
            "float": self.counts["float"] * lanes / card.float,
            "issue": self.instructions * warps / card.issued,
        }


@dataclass(frozen=True)
class MachineCode:
    """A kernel: registers and spilled bytes of a thread, shared bytes and warps of a program, and its loops."""

    registers: int
    spilled: int
    shared: int
    warps: int
    loops: list[TileLoop]

    @property
    def programs(self) -> int:
        """How many a multiprocessor holds at once."""
        registers = -(-self.registers // 8) * 8 * 32 * self.warps
        shared = self.shared + 1024
        return min(REGISTERS // registers, SHARED // shared, THREADS // (32 * self.warps), RESIDENT)


def read(kernel: Any) -> MachineCode:
    """Of what triton compiled."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, text = (
            subprocess.run([CUOBJDUMP, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    spilled = int(found["STACK"]) + int(found["LOCAL"])
    return MachineCode(int(found["REG"]), spilled, kernel.metadata.shared, kernel.metadata.num_warps, loops_of(text))


def loops_of(text: str) -> list[TileLoop]:
    """The innermost loops that multiply matrices, of a listing by cuobjdump, in the order of the code."""
    code = [Instruction(int(at, 16), *others) for at, *others in INSTRUCTION.findall(text)]
    loops = natural_loops(code)
    innermost = {}
    for place, instruction in enumerate(code):
        around = [(len(loop), head) for head, loop in loops.items() if place in loop]
        if kind_of(instruction.name) == "matrix" and around:
            _, head = min(around)
            innermost[head] = loops[head]
    return [TileLoop(Counter(kind_of(code[place].name) for place in loop)) for _, loop in sorted(innermost.items())]


def natural_loops(code: Sequence[Instruction]) -> dict[int, set[int]]:
    """By the place of their first instruction, the places of all (Aho et al., "Compilers", section 9.6)."""
    flow = networkx.DiGraph()
    place_of = {instruction.address: place for place, instruction in enumerate(code)}
    for place, instruction in enumerate(code):
        target = instruction.target
        if target in place_of:
            flow.add_edge(place, place_of[target])
        if place + 1 < len(code) and not instruction.ends:
            flow.add_edge(place, place + 1)
    reached = {0} | networkx.descendants(flow, 0)
    flow = flow.subgraph(reached).copy()
    above = networkx.immediate_dominators(flow, 0)
    loops: dict[int, set[int]] = {}
    for place, head in flow.edges:
        if head <= place and dominates(above, head, place):
            behind = flow.subgraph(set(flow) - {head}).reverse(copy=False)
            body = {head, place} | (networkx.descendants(behind, place) if place != head else set())
            loops[head] = loops.get(head, set()) | body
    return loops


def dominates(above: Mapping[int, int | None], head: int, place: int) -> bool:
    """Whether each way to `place` passes `head`."""
    at: int | None = place
    while at is not None and at > 0 and at != head:
        at = above[at]
    return at == head


def kind_of(name: str) -> str:
    """The first kind whose pattern begins the instruction's name; "integer and moves" for all others."""
    return next((kind for kind, pattern in KINDS.items() if re.match(pattern, name)), "integer and moves")
