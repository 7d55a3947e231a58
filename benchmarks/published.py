"""Measurements that others published, with their sources, to hold predictions against. Units are in the names."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Trained:
    """A model of Korthikanti et al., arXiv 2205.05198, tables 3 to 5: tensor parallel 8, GELU of width 4 dim."""

    layers: int
    heads: int
    dim: int
    micro_batch: int
    seq: int = 2048


KORTHIKANTI = {
    "22B": Trained(48, 64, 6144, 4),
    "175B": Trained(96, 96, 12288, 1),
    "530B": Trained(105, 128, 20480, 1),
    "1T": Trained(128, 160, 25600, 1),
}

# Figure 7: activation bytes in percent of tensor parallelism alone, as read off it for the validation of
# calculon-ai/calculon (calculon/llm/validation.py). (what is made again, Megatron SP) -> percent.
WAYS = {
    "none": ("none", False),
    "SP": ("none", True),
    "selective": ("selective", False),
    "SP + selective": ("selective", True),
    "full": ("full", False),
}
FIGURE_7 = {
    "22B": {"none": 100.0, "SP": 66.84, "selective": 49.42, "SP + selective": 16.18, "full": 7.64},
    "175B": {"none": 100.0, "SP": 62.04, "selective": 56.53, "SP + selective": 18.49, "full": 8.71},
    "530B": {"none": 100.0, "SP": 58.31, "selective": 62.04, "SP + selective": 20.27, "full": 9.42},
    "1T": {"none": 100.0, "SP": 58.31, "selective": 62.04, "SP + selective": 20.27, "full": 9.42},
}
# Of the same rows, as that validation computes them: mean and worst error in percent.
CALCULON_FIGURE_7 = (6.69, 30.4)

# Table 4: milliseconds of one layer of the 22B model on A100, forward and backward. From memory of the paper.
TABLE_4 = {
    "none": (7.7, 11.9),
    "SP": (7.2, 11.8),
    "full": (7.7, 19.5),
    "selective": (7.7, 13.2),
    "SP + selective": (7.2, 13.1),
}
# Table 5: seconds of an iteration of the 22B model.
TABLE_5 = {"full": 1.42, "SP + selective": 1.10}


@dataclass(frozen=True)
class Shape:
    """A published model, with the names of `models:llama`. source: where its sizes stand."""

    layers: int
    heads: int
    kv_heads: int
    dim: int
    hidden: int
    vocab: int
    source: str


SHAPES = {
    "llama2-7b": Shape(32, 32, 32, 4096, 11008, 32000, "config.json of meta-llama/Llama-2-7b-hf"),
    "llama3-8b": Shape(32, 32, 8, 4096, 14336, 128256, "arXiv 2407.21783, table 3"),
    "llama2-13b": Shape(40, 40, 40, 5120, 13824, 32000, "config.json of meta-llama/Llama-2-13b-hf"),
    "qwen2.5-32b": Shape(64, 40, 8, 5120, 27648, 152064, "config.json of Qwen/Qwen2.5-32B"),
    "llama3-70b": Shape(80, 64, 8, 8192, 28672, 128256, "arXiv 2407.21783, table 3"),
}


@dataclass(frozen=True)
class TableRow:
    """A row of the table that this project exists for, which names neither model nor batch nor what is made again.

    ways: how the row can be read, by name in project_table.CANDIDATES: its ring has "8", of one axis or beside tp.
    """

    tokens: int
    ways: tuple[str, ...]
    activation_gb: float
    mfu: float


TABLE_ROWS = {
    "no sequence parallelism": TableRow(32_768, ("tp 8",), 60, 0.45),
    "Megatron SP": TableRow(131_072, ("tp 8, Megatron SP",), 15, 0.58),
    "ring": TableRow(1_048_576, ("tp 8, ring 8", "ring 8"), 8, 0.55),
}
