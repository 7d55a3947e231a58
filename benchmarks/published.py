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
