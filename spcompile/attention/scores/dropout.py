"""Dropout of attention weights as a function of positions: which weights fall does not depend on who computes them.

Weight (b, n, q, k) falls where Philox2x32-7 (Salmon et al., SC 2011), counter words (k, q), key seed[b, n], gives a
first word below p * 2^32. q and k are positions in the global sequence, so every block of every rank, forward and
backward, sees its part of one mask, and no [S, T] mask is ever kept.

B batch, N query heads, S query rows, T keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from spcompile.diagnostics import IllegalOption

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MULTIPLIER = 0xD256D193
KEY_STEP = 0x9E3779B9
ROUNDS = 7
WORD = 0xFFFFFFFF


@dataclass(frozen=True, eq=False)
class Dropout:
    """p: share of the weights that fall, 0 <= p < 1. seed: int64 [B|1, N], of which the low 32 bits count.

    One seed for each head: where heads are spread over ranks, each takes its seed along.

    Raises:
        IllegalOption: another p.
    """

    p: float
    seed: Tensor

    def __post_init__(self) -> None:
        if not 0 <= self.p < 1:
            raise IllegalOption(f"attention dropout p={self.p}", legal="0 <= p < 1")

    @property
    def threshold(self) -> int:
        """Words below it fall."""
        return int(self.p * 2**32)

    def factors(self, q_positions: Tensor, k_positions: Tensor, dtype: torch.dtype) -> Tensor:
        """[B|1, N, S, T]: 0 where a weight falls, 1 / (1 - p) elsewhere. Positions are [S] and [T]."""
        key = (self.seed & WORD)[:, :, None, None]
        word = first_word(k_positions.long(), q_positions.long()[:, None], key)
        return (word >= self.threshold).to(dtype) / (1 - self.p)


def first_word(low: Tensor, high: Tensor, key: Tensor) -> Tensor:
    """The first word of Philox2x32-7 of the counter (low, high): int64 that holds 32 bits, operands broadcast.

    A product of two words wraps in int64, but its bits are those of the unsigned product.
    """
    for _ in range(ROUNDS):
        product = low * MULTIPLIER
        low, high = (product >> 32 & WORD) ^ key ^ high, product & WORD
        key = key + KEY_STEP & WORD
    return low
