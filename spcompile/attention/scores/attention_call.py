"""The calls of spx.attention and of its backward, by the names of their arguments.

B batch, N query heads, G key heads, S query rows, T keys, H head size of q and k, V of v.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from spcompile.attention.scores.dropout import Dropout
from spcompile.attention.scores.mask import AttentionMask
from spcompile.attention.scores.provider import Scores
from spcompile.graph.sizes import Size, hint, same
from spcompile.graph.typed_call import Operand, TypedCall, named_arguments, value_of


class Sizes(NamedTuple):
    """Of q [B, N, S, H], k [B, G, T, H] and v [B, G, T, V]: numbers or symbols."""

    batch: Size
    heads: Size
    kv_heads: Size
    q_rows: Size
    k_rows: Size
    qk_size: Size
    v_size: Size

    def hints(self) -> Sizes:
        """The same with every symbol at its value at trace time."""
        return Sizes(*map(hint, self))


@dataclass(frozen=True, kw_only=True)
class Attention(TypedCall):
    """What all attention ops have. mask: text of an AttentionMask; what the others mean says `Scores`.

    dropout_seed, dropout_p: of `Dropout`; no dropout where either is missing, or the share is 0.
    tables: as in `Scores`.
    """

    q: Operand
    k: Operand
    v: Operand
    q_documents: Operand = None
    k_documents: Operand = None
    key_valid: Operand = None
    bias: Operand = None
    mask: str
    scale: float
    alibi_slopes: Operand = None
    sinks: Operand = None
    dropout_seed: Operand = None
    softcap: float = 0.0
    dropout_p: float = 0.0
    tables: Operand = None

    @property
    def attention_mask(self) -> AttentionMask:
        """The mask that the text says."""
        return AttentionMask.parse(self.mask)

    @property
    def has_softcap(self) -> bool:
        """Whether scores are capped."""
        return self.softcap != 0

    @property
    def has_dropout(self) -> bool:
        """Whether weights fall."""
        return self.dropout_p != 0

    @property
    def bias_has_rows(self) -> bool:
        """Whether there is a bias whose rows may differ."""
        return self.bias is not None and not same(value_of(self.bias).shape[2], 1)

    @property
    def sizes(self) -> Sizes:
        """Of the operands."""
        (B, N, S, H), (_, G, T, V) = value_of(self.q).shape, value_of(self.v).shape
        return Sizes(B, N, G, S, T, H, V)

    def scores(self) -> Scores:
        """What the op does to scores; where it runs."""
        has_dropout = self.dropout_seed is not None and self.has_dropout
        return Scores(
            mask=self.attention_mask,
            scale=self.scale,
            q_documents=self.q_documents,
            k_documents=self.k_documents,
            key_valid=self.key_valid,
            bias=self.bias,
            softcap=self.softcap,
            alibi_slopes=self.alibi_slopes,
            sinks=self.sinks,
            dropout=Dropout(self.dropout_p, self.dropout_seed) if has_dropout else None,
            tables=self.tables,
        )


@dataclass(frozen=True, kw_only=True)
class GradientCall(TypedCall):
    """What the backward of an attention op has besides: results, their gradients, and which gradients are wanted."""

    grad_out: Operand
    grad_lse: Operand
    out: Operand
    lse: Operand
    bias_gradient: bool
    sinks_gradient: bool = False

    def gradients(self, forward: type[Attention], *results: Any) -> list[Any]:
        """Of every argument of the forward, from this op's results; None of those that have none or are not wanted."""
        found = dict(zip(("q", "k", "v", "bias", "sinks"), results, strict=True))
        unwanted = {"bias": not self.bias_gradient, "sinks": not self.sinks_gradient}
        return [None if unwanted.get(name) else found.get(name) for name in named_arguments(forward.target(), ())]


@dataclass(frozen=True, kw_only=True)
class AttentionCall(Attention):
    """spx.attention. Positions int32 [S] and [T] of rows and keys; None: they count from 0. Nobody sees PADDING."""

    NAME: ClassVar[str] = "attention"

    q_positions: Operand = None
    k_positions: Operand = None


@dataclass(frozen=True, kw_only=True)
class AttentionBackwardCall(GradientCall, AttentionCall):
    """spx.attention_backward."""

    NAME: ClassVar[str] = "attention_backward"
