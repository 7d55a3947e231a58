"""What a rank is about to do, as named facts; which of them must be equal on which ranks, and what differs.

Ranks compare a record by a few numbers: one hash for each set of axes over which facts may differ. Only where hashes
differ do they exchange the facts themselves, and every rank makes the same text of them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from spcompile.machine.mesh import AXES

STOPPED = "stopped with "
SAME_PROGRAM = "the same model, options and input shapes everywhere"
MOST_SHOWN = 3  # facts that differ
MOST_NAMED = 12
_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{6,}\b")
_DEVICE = re.compile(r"\b(cuda|xpu|hpu|mtia):\d+\b")


@dataclass(frozen=True)
class Fact:
    """One thing that must be equal on all ranks, but over the axes `but_over`. legal: what to do where it is not."""

    name: str
    value: str
    but_over: tuple[str, ...] = ()
    legal: str = SAME_PROGRAM


@dataclass(frozen=True)
class Record:
    """What a rank is about to do.

    wishes: for what all ranks do if one of them wishes; not compared itself.
    mark: the place in the program, where it has a name of its own; all ranks that have come there have the same.
    """

    doing: str
    facts: tuple[Fact, ...] = ()
    wishes: bool = False
    mark: str = ""

    def numbers(self) -> list[int]:
        """A hash of the facts for each set of axes that they may differ over, then the wish."""
        texts = [self.doing] + [""] * (2 ** len(AXES) - 1)
        for fact in self.facts:
            texts[_set_of(fact.but_over)] += f"\0{fact.name}\0{fact.value}"
        return [_hash(text) if text else 0 for text in texts] + [int(self.wishes)]

    def to_json(self) -> str:
        """As text, for the store."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Record:
        """From `to_json`."""
        fields = json.loads(text)
        facts = tuple(Fact(**{**fact, "but_over": tuple(fact["but_over"])}) for fact in fields.pop("facts"))
        return cls(facts=facts, **fields)


Coordinates = Mapping[int, Mapping[str, int]]  # rank -> axis -> place


def comparable_text(error: BaseException | str) -> str:
    """An error's text without what differs between processes by right: addresses of objects, numbers of devices."""
    return _DEVICE.sub(r"\1", _ADDRESS.sub("0x...", str(error)))


def agree(numbers: Mapping[int, Sequence[int]], coordinates: Coordinates) -> bool:
    """Whether these ranks, by `Record.numbers`, do the same."""
    for place in range(2 ** len(AXES)):
        found: dict[tuple[int, ...], int] = {}
        for rank, own in numbers.items():
            if found.setdefault(_among(coordinates[rank], _axes_of(place)), own[place]) != own[place]:
                return False
    return True


def wished(numbers: Mapping[int, Sequence[int]]) -> bool:
    """Whether a rank wishes to compare parameters."""
    return any(own[-1] for own in numbers.values())


def disagreement(records: Mapping[int, Record], coordinates: Coordinates) -> tuple[str, str]:
    """(what differs between ranks, what would be legal). Depends on nothing else, so that all ranks say the same."""
    doings = {rank: record.doing for rank, record in records.items()}
    if any(doing.startswith(STOPPED) for doing in doings.values()):
        stopped = {rank: doing if doing.startswith(STOPPED) else "went on" for rank, doing in doings.items()}
        return _by_rank(stopped), SAME_PROGRAM
    facts = _facts_that_differ(records, coordinates)
    parts = [next(iter(doings.values()))] if len(set(doings.values())) == 1 else []
    parts += [_fact_text(name, values) for name, values in list(facts.items())[:MOST_SHOWN]]
    if len(facts) > MOST_SHOWN:
        parts.append(f"\n  and {len(facts) - MOST_SHOWN} more: {some_of(list(facts)[MOST_SHOWN:])}")
    if len(set(doings.values())) > 1:
        parts.append(_by_rank(doings))
        if facts and next(iter(facts)).startswith("input "):
            return "".join(parts), SAME_PROGRAM
        return "".join(parts), "the same calls, and backwards of them, in the same order on every rank"
    first = next(iter(facts), None)
    legal = next((f.legal for r in records.values() for f in r.facts if f.name == first), SAME_PROGRAM)
    return "".join(parts), legal


def some_of(names: Sequence[str]) -> str:
    """A list of names, cut where it is long."""
    rest = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def list_ranks(ranks: Iterable[int]) -> str:
    """`rank 3`, `ranks 0, 1, 4`."""
    listed = sorted(ranks)
    return f"rank{'s' if len(listed) > 1 else ''} {', '.join(map(str, listed))}"


def _facts_that_differ(records: Mapping[int, Record], coordinates: Coordinates) -> dict[str, dict[int, str]]:
    """Name -> rank -> value, of facts that ranks have that should have them equal."""
    found: dict[str, dict[int, Fact]] = {}
    for rank, record in records.items():
        for fact in record.facts:
            found.setdefault(fact.name, {})[rank] = fact
    same_doing = len({record.doing for record in records.values()}) == 1
    result = {}
    for name, by_rank in found.items():
        groups: dict[tuple[int, ...], set[str]] = {}
        for rank, fact in by_rank.items():
            groups.setdefault(_among(coordinates[rank], fact.but_over), set()).add(fact.value)
        values = {rank: fact.value for rank, fact in by_rank.items()}
        if any(len(group) > 1 for group in groups.values()) or (same_doing and len(by_rank) < len(records)):
            result[name] = values | {rank: "(none)" for rank in records if rank not in values and same_doing}
    return result


def _fact_text(name: str, values: Mapping[int, str]) -> str:
    if any("\n" in value for value in values.values()):
        return f"\n  {first_difference(name, dict(sorted(values.items())))}"
    return f"\n  {name}" + _by_rank(values, "    ")


def _by_rank(texts: Mapping[int, str], indent: str = "  ") -> str:
    """One line for each text, with its ranks."""
    ranks: dict[str, list[int]] = {}
    for rank, text in sorted(texts.items()):
        ranks.setdefault(text, []).append(rank)
    return "".join(f"\n{indent}{list_ranks(of_text)}: {text}" for text, of_text in ranks.items())


def first_difference(name: str, texts: Mapping[int, str]) -> str:
    """The ranks whose text differs from the first rank's, and the first line that does."""
    reference_rank, reference = next(iter(texts.items()))
    found = []
    for rank, text in texts.items():
        if text == reference:
            continue
        pairs = zip(reference.splitlines(), text.splitlines(), strict=False)
        number, ours, theirs = next(((i, a, b) for i, (a, b) in enumerate(pairs, 1) if a != b), (0, "", "(length)"))
        found.append(f"line {number}:\n  rank {reference_rank}: {ours}\n  rank {rank}: {theirs}")
    return f"{name} differ at " + "\n".join(found)


def _set_of(axes: Sequence[str]) -> int:
    return sum(1 << AXES.index(axis) for axis in axes)


def _axes_of(place: int) -> list[str]:
    return [axis for i, axis in enumerate(AXES) if place >> i & 1]


def _among(coordinate: Mapping[str, int], axes: Iterable[str]) -> tuple[int, ...]:
    """Ranks with equal results must agree on facts that may differ over `axes`."""
    return tuple(coordinate.get(axis, 0) for axis in sorted(axes))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)
