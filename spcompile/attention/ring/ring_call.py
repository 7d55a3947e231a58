"""The calls of spx.ring_attention, of its backward, and of what asks which of its hops are needed, by names."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.fx as fx

from spcompile.attention.ring.ring import Ring
from spcompile.attention.scores.attention_call import Attention, AttentionBackwardCall, AttentionCall, GradientCall
from spcompile.graph.sizes import Size, hint
from spcompile.graph.typed_call import Operand, TypedCall, value_of


@dataclass(frozen=True, kw_only=True)
class RingCall(Attention):
    """spx.ring_attention: q, k, v are one rank's rows. The layout is that of `Ring`; hops: as in `ring_forward`."""

    NAME: ClassVar[str] = "ring_attention"

    q_length: Size
    k_length: Size
    axis: str
    degree: int
    order: str
    inner: int = 1
    hops: Operand = None

    @property
    def ring(self) -> Ring:
        """The layout; lengths that are symbols have their value at trace time."""
        q_length, k_length = (hint(value_of(length)) for length in (self.q_length, self.k_length))
        return Ring(q_length, k_length, self.degree, self.order, self.inner)

    @property
    def most_hops(self) -> int:
        """How often keys and values move on, if documents leave no hop empty."""
        return len(self.ring.distances(self.attention_mask))


@dataclass(frozen=True, kw_only=True)
class RingBackwardCall(GradientCall, RingCall):
    """spx.ring_attention_backward."""

    NAME: ClassVar[str] = "ring_attention_backward"


@dataclass(frozen=True, kw_only=True)
class RingHopsCall(TypedCall):
    """spx.ring_hops: which hops documents leave anything of, as a rank finds it."""

    NAME: ClassVar[str] = "ring_hops"

    q_documents: Operand
    k_documents: Operand
    mask: str
    degree: int
    order: str
    inner: int


@dataclass(frozen=True, kw_only=True)
class AgreeOnHopsCall(TypedCall):
    """spx.agree_on_hops: the same, once all ranks have found it."""

    NAME: ClassVar[str] = "agree_on_hops"

    hops: Operand
    axis: str


@functools.cache
def _kinds() -> Mapping[Any, type[Attention]]:
    kinds: tuple[type[Attention], ...] = (AttentionCall, AttentionBackwardCall, RingCall, RingBackwardCall)
    return {kind.target(): kind for kind in kinds}


def is_attention(node: fx.Node) -> bool:
    """Whether a node is an attention op, forward or backward."""
    return node.target in _kinds()


def attention_of(node: fx.Node) -> Attention | None:
    """The call of an attention op, forward or backward; None of another node."""
    kind = _kinds().get(node.target)
    return None if kind is None else kind.of(node)


def ring_of(node: fx.Node) -> RingCall | None:
    """The call of a ring, forward or backward; None of another node."""
    found = attention_of(node)
    return found if isinstance(found, RingCall) else None
