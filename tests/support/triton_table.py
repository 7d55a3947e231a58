"""What the Triton kernels are compiled for: every row of the table, every kernel, every kind of hop and scores.

A kernel is specialised on its tiles, on the hop's place in the ring, and on which conditions and which other changes of
the scores there are. Of each row the default is what needs most of what models ask for together: that compiles in
minutes, all else in an hour or two. "everything" is every condition and every change at once, which no model asks for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from spcompile.attention.kernels.triton.configs import ARCHITECTURES, HEAD_SIZES, TABLE
from spcompile.attention.kernels.triton.launch import ForwardTensors, Hop, Launch, RowTensors
from spcompile.attention.scores.dropout import Dropout
from spcompile.attention.scores.mask import AttentionMask
from spcompile.attention.scores.provider import Scores
from spcompile.attention.scores.runs import natural_runs

DTYPES = {2: torch.bfloat16, 4: torch.float32}
B, N, G, S = 2, 8, 2, 256
VARIANTS = ("plain", "rich", "bias")
SPILLED = {2: 128, 4: 64}  # bytes that a thread of a kernel that is no default may spill, by bytes of a number
HOPS = {"alone": (True, True), "first": (True, False), "middle": (False, False), "last": (False, True)}
POSITIONS = "causal prefix=64 window=100 window_right=90 chunk=128"
HEAVY_SCORES = {"plain": ("sinks",), "rich": ("packed", "dropout"), "bias": ("added",)}
HEAVY_HOPS = {"forward": "last", "rows": "last", "keys": "middle", "bias": "alone"}


class Compilation(NamedTuple):
    """One kernel to compile: its row of the table, what happens to scores, the kernel, the hop's place in the ring."""

    arch: str
    element: int
    size: int
    variant: str
    scores: str
    kernel: str
    hop: str

    def __str__(self) -> str:
        return "-".join(map(str, self))

    @property
    def capability(self) -> int:
        return int(self.arch.removeprefix("sm"))

    def launch(self, size: int | None = None) -> Launch:
        """With operands that are never read. size: another head size."""
        size = size or self.size
        configs = TABLE[self.arch, self.element, self.size, self.variant]
        dtype = DTYPES[self.element]
        q, k, v, grad_out = (torch.empty(B, n, S, size, dtype=dtype) for n in (N, G, G, N))
        row, wide = torch.empty(B, N, S), torch.empty(B, N, S, size)
        hop = Hop(q, k, v, natural_runs(S), natural_runs(S), scores_of(self.variant)[self.scores], configs)
        rows, place = RowTensors(grad_out, row, row), HOPS[self.hop]
        if self.kernel == "forward":
            return hop.forward(ForwardTensors(grad_out, row, wide, row, row), *place)
        if self.kernel == "rows":
            return hop.row_gradients(rows, wide, q, *place)
        if self.kernel == "keys":
            alone = self.hop == "alone"
            return hop.key_gradients(rows, k if alone else k.float(), v if alone else v.float())
        return hop.bias_gradient(rows, torch.empty(1, N, S, S))

    @property
    def is_default(self) -> bool:
        """Whether it stands for its row and kernel."""
        return self.scores in HEAVY_SCORES[self.variant] and self.hop == HEAVY_HOPS[self.kernel]

    @property
    def number(self) -> int:
        """The same on every machine, and spread evenly: for samples."""
        return int.from_bytes(hashlib.sha256(str(self).encode()).digest()[:4], "big")


def scores_of(variant: str) -> dict[str, Scores]:
    """What each variant of the table has to compute, by name."""
    ids = torch.zeros(B, S, dtype=torch.int64)
    data = {"q_documents": ids, "k_documents": ids, "key_valid": ids == 0}
    packed = {"q_documents": ids.int(), "k_documents": ids.int()}
    sinks, slopes = torch.ones(N), torch.ones(N)
    dropout = Dropout(0.1, torch.zeros(B, N, dtype=torch.int64))
    more = {"softcap": 30.0, "alibi_slopes": slopes, "dropout": dropout, "sinks": sinks}
    bias = torch.ones(1, N, S, S, dtype=torch.bfloat16)
    found: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
        "plain": {
            "full": ("full", {}),
            "causal": ("causal", {}),
            "window": ("causal window=100", {}),
            "sinks": ("causal window=100", {"sinks": sinks}),
            "everything": (POSITIONS, {"sinks": sinks}),
        },
        "rich": {
            "data": ("causal documents key_padding", data),
            "softcap": ("causal window=100", {"softcap": 30.0}),
            "alibi": ("causal key_padding", {"alibi_slopes": slopes, "key_valid": ids == 0}),
            "dropout": ("causal", {"dropout": dropout}),
            "packed": ("causal window=100 documents", packed | {"softcap": 30.0, "sinks": sinks}),
            "rounded": ("causal documents rounded_by=-1e+30", packed),
            "filled": ("causal documents fill=-1e+30", packed),
            "everything": (f"{POSITIONS} documents key_padding", data | more),
        },
        "bias": {
            "added": ("causal", {"bias": bias}),
            "kept": ("full", {"bias": bias != 0}),
            "everything": (f"{POSITIONS} documents key_padding", data | more | {"bias": bias}),
        },
    }
    return {name: Scores(AttentionMask.parse(text), 0.1, **kw) for name, (text, kw) in found[variant].items()}


def compilations() -> Iterator[Compilation]:
    """All of them."""
    for arch in ARCHITECTURES:
        for element in DTYPES:
            for size in HEAD_SIZES:
                for variant in VARIANTS:
                    for scores in scores_of(variant):
                        row = (arch, element, size, variant, scores)
                        for hop in HOPS:
                            yield Compilation(*row, "forward", hop)
                            yield Compilation(*row, "rows", hop)
                        yield Compilation(*row, "keys", "alone")
                        yield Compilation(*row, "keys", "middle")
                        if scores in ("added", "everything") and variant == "bias":
                            yield Compilation(*row, "bias", "alone")
