"""In which messages q, k and v travel to the ranks of their heads, and how long attention waits for them.

Text, as remarks have it: messages in the order in which they leave, "+" joins what one of them carries, a number is a
group of heads. kv are keys and values side by side.

    q+kv                        one message: it leaves when all three are there, and attention waits for all of it
    q | k | v                   q travels while k and v are projected
    q1+kv1 | q2+kv2             attention of the first group hides the second message, that of the second the result
    q1 | k1 | v1 | q2+kv2       both
    q1 | k | v | q2             the same, where both groups read the same keys
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from spcompile.attention.ulysses.head_groups import HeadGroups
from spcompile.attention.ulysses.head_shares import HeadSplit
from spcompile.machine.links import Link

KERNELS = 6  # of a step for each message more: packed and unpacked forward, backward, and by a group's attention


class Piece(NamedTuple):
    """What travels together: "q", "k", "v" or "kv", of one group of heads or of all (None)."""

    name: str
    group: int | None = None

    def __str__(self) -> str:
        return self.name if self.group is None else f"{self.name}{self.group + 1}"


Message = tuple[Piece, ...]


@dataclass(frozen=True)
class Messages:
    """messages: to the ranks of the heads, in order. groups: of heads; each result travels back in its own message."""

    messages: tuple[Message, ...]
    groups: int = 1

    def __str__(self) -> str:
        return " | ".join("+".join(map(str, message)) for message in self.messages)


def together(heads: HeadSplit, groups: int = 1, *, keys_apart: bool = False) -> Messages:
    """As few messages as there are groups. keys_apart: none of them carries both queries and keys."""
    messages = [m for group in range(groups) for m in _of_group(heads, groups, group, keys_apart)]
    return Messages(tuple(messages), groups)


def apart(groups: int = 1) -> Messages:
    """q, k and v each in one message, in the order in which models project them; results by groups."""
    return Messages(((Piece("q"),), (Piece("k"),), (Piece("v"),)), groups)


def first_apart(heads: HeadSplit, groups: int, *, keys_apart: bool = False) -> Messages:
    """The first group, which nothing but projections can hide, in a message each for q, k and v; then as `together`."""
    if groups == 1:
        return apart()
    own = 0 if HeadGroups(heads, groups).cuts_keys else None
    first: tuple[Message, ...] = ((Piece("q", 0),), (Piece("k", own),), (Piece("v", own),))
    rest = [m for group in range(1, groups) for m in _of_group(heads, groups, group, keys_apart)]
    return Messages((*first, *rest), groups)


def _of_group(heads: HeadSplit, groups: int, group: int, keys_apart: bool) -> list[Message]:
    """What a group needs and those before it did not, in one message or in one each."""
    own = group if groups > 1 else None
    cuts_keys = HeadGroups(heads, groups).cuts_keys
    keys = [Piece("kv", own if cuts_keys else None)] if cuts_keys or group == 0 else []
    pieces = (Piece("q", own), *keys)
    return [(piece,) for piece in pieces] if keys_apart else [pieces]


WAYS = ("together", "apart", "first apart")


def candidates(
    heads: HeadSplit, groups: Sequence[int], ways: Sequence[str] = WAYS, *, keys_apart: bool
) -> Iterator[Messages]:
    """The messages in some of WAYS, for the numbers of groups that the heads allow."""
    for count in groups:
        if HeadGroups.divides(heads, count):
            made = {
                "together": together(heads, count, keys_apart=keys_apart),
                "apart": apart(count),
                "first apart": first_apart(heads, count, keys_apart=keys_apart),
            }
            yield from (made[way] for way in ways)


@dataclass(frozen=True)
class Times:
    """Of one attention on one rank, in seconds.

    ready: "q", "k", "v" -> compute until it is projected, from when q is. sent: the bytes of each, and of "out".
    attention: compute of all groups. kernel: what each kernel costs beside its work. link: that of the all-to-all.
    """

    ready: Mapping[str, float]
    sent: Mapping[str, float]
    attention: float
    kernel: float
    link: Link

    def until_back(self, messages: Messages) -> float:
        """From when q is projected until all results are back, with what more kernels take in a step."""
        free, arrivals = 0.0, []
        for message in messages.messages:
            parts = [(name, piece.group) for piece in message for name in piece.name]
            leaves = max(free, *(self.ready[name] for name, _ in parts))
            size = sum(self.sent[name] / (1 if group is None else messages.groups) for name, group in parts)
            free = leaves + self.link.seconds(size)
            arrivals.append((free, {group for _, group in parts}))
        now = max(self.ready.values())
        for group in range(messages.groups):
            now = max(now, *(at for at, carries in arrivals if carries & {None, group}))
            now += self.attention / messages.groups
            free = max(free, now) + self.link.seconds(self.sent["out"] / messages.groups)
        more = len(messages.messages) + messages.groups - 2
        return free + more * KERNELS * self.kernel
