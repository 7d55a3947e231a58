"""Sharding rules of ATen and spx ops, one file per family.

Importing the package registers all of them.
"""

from __future__ import annotations

from spcompile.graph.aten_ops import tensor_operands
from spcompile.sharding.rules import (
    attention,
    collectives,
    convolution,
    creation,
    elementwise,
    grouped,
    indexing,
    joining,
    linear_losses,
    losses,
    matmul,
    matrices,
    merged,
    mixing,
    normalization,
    ordering,
    randomness,
    reductions,
    shuffled,
    views,
)
from spcompile.sharding.rules.rule import (
    Dims,
    LocalCall,
    OpRule,
    Rule,
    Size,
    register,
    registered_ops,
    rule_of,
    tensor_results,
)

__all__ = [
    "Dims",
    "LocalCall",
    "OpRule",
    "Rule",
    "Size",
    "attention",
    "collectives",
    "convolution",
    "creation",
    "elementwise",
    "grouped",
    "indexing",
    "joining",
    "linear_losses",
    "losses",
    "matmul",
    "matrices",
    "merged",
    "mixing",
    "normalization",
    "ordering",
    "randomness",
    "reductions",
    "register",
    "registered_ops",
    "rule_of",
    "shuffled",
    "tensor_operands",
    "tensor_results",
    "views",
]
