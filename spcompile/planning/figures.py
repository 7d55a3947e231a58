"""Figures of a step that are linear in the number of layers, and what they are for many."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

Sent = Mapping[tuple[str, str, str, str], tuple[float, float]]  # (op, axis, phase, origin) -> (count, bytes)


@dataclass(frozen=True)
class Figures:
    """Of one rank, and one step without the optimizer.

    seconds, compute, communication, exposed: as in `spcompile.schedule.timeline`. again: seconds of `compute` that make
    values again. parameters, gradients, states: bytes of parameters, their gradients and states of the optimizer.
    saved: bytes of activations that are kept for the backward. peaks: of what is alive besides parameters and states,
    in the forward and in both ends of the backward. products, attention, attention_full: flops of the forward of the
    whole model on one device: of products, of attention as masked and without its mask. sent: by kind of collective.
    host: bytes in the memory of the host.
    """

    seconds: float
    compute: float
    communication: float
    exposed: float
    again: float
    parameters: float
    gradients: float
    states: float
    saved: float
    peaks: tuple[float, float, float]
    products: float
    attention: float
    attention_full: float
    sent: Sent = field(default_factory=dict)
    host: float = 0.0

    @property
    def total(self) -> float:
        """Bytes of everything on a rank when most is alive."""
        return self.parameters + self.states + max(self.peaks)

    @property
    def sent_bytes(self) -> float:
        """By one rank, in all collectives."""
        return sum(size for _, size in self.sent.values())


def extrapolated(few: Figures, more: Figures, blocks: tuple[int, int], count: int) -> Figures:
    """Of `count` blocks, from programs of `blocks[0]` and `blocks[1]` blocks.

    Exact for bytes that grow by the same for each block. Peaks and seconds may differ by what is at the edge of
    a bucket of gradients. Where more blocks hide more than they send, nothing is exposed, and not less than nothing.
    """
    found = between(few, more, (count - blocks[0]) / (blocks[1] - blocks[0]))
    return replace(found, seconds=found.seconds - found.exposed, exposed=0.0) if found.exposed < 0 else found


def between(few: Figures, more: Figures, steps: float) -> Figures:
    """`few` and so many times what `more` differs from it by."""

    def along(a: Any, b: Any) -> Any:
        if isinstance(a, tuple):
            return tuple(along(x, y) for x, y in zip(a, b, strict=True))
        return a + (b - a) * steps

    numbers = {name: along(value, getattr(more, name)) for name, value in vars(few).items() if name != "sent"}
    kinds = dict.fromkeys([*few.sent, *more.sent])
    sent = {kind: along(few.sent.get(kind, (0, 0)), more.sent.get(kind, (0, 0))) for kind in kinds}
    return Figures(**numbers, sent=sent)
