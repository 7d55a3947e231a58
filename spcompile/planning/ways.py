"""The ways that a newcomer compares: all ranks on tp, or on cp as a ring, as Ulysses, as the best of both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from spcompile.machine.links import RANKS_PER_NODE
from spcompile.planning.candidates import Candidate, Heads, attentions
from spcompile.planning.search import Result

NAMES = ("tp", "cp ring", "cp ulysses", "cp hybrid")


@dataclass(frozen=True)
class Way:
    """One way to use all ranks. result: None where there is no such program, for the reason `why_not`."""

    name: str
    result: Result | None
    why_not: str = ""


def ways(world: int, heads: Heads, results: Callable[[Iterable[Candidate]], Sequence[Result]]) -> list[Way]:
    """Each way once, in the order of NAMES; of the hybrids the one that is fastest among those that fit.

    Parameters are split over the axis in each: over tp as the program uses them, over cp as in ZeRO-3.
    results: of candidates.
    """
    wanted, why_not = _candidates_by_way(world, heads)
    found = iter(results([one for ones in wanted.values() for one in ones]))
    rows = []
    for name in NAMES:
        made = [next(found) for _ in wanted.get(name, ())]
        good = [result for result in made if result.figures is not None]
        best = min(good, key=_better_first, default=None)
        rows.append(Way(name, best, why_not.get(name, "") if not made else "" if best else made[0].error))
    return rows


def _better_first(result: Result) -> tuple[bool, float]:
    assert result.figures is not None
    return not result.fits, result.figures.seconds if result.fits else result.figures.total


def _candidates_by_way(world: int, heads: Heads) -> tuple[dict[str, list[Candidate]], dict[str, str]]:
    wanted: dict[str, list[Candidate]] = {}
    why_not: dict[str, str] = {}
    if world > RANKS_PER_NODE or any(count % world for count in heads.heads):
        counts = " and ".join(map(str, heads.heads))
        why_not["tp"] = f"tp divides {counts} heads and stays in a node of {RANKS_PER_NODE} ranks"
    else:
        wanted["tp"] = [Candidate((("tp", world),))]
    if world > heads.tokens:
        return wanted, why_not | dict.fromkeys(NAMES[1:], f"cp is at most {heads.tokens}, one token a rank")
    for attention in attentions({"cp": world}, heads):
        name = f"cp {attention}" if isinstance(attention, str) else "cp hybrid"
        wanted.setdefault(name, []).append(Candidate((("cp", world),), attention, True, ("cp",)))
    why_not["cp ulysses"] = f"{world} ranks do not divide {' and '.join(map(str, heads.heads))} heads"
    why_not["cp hybrid"] = f"cp = {world} is no product of a divisor of the heads and another number"
    return wanted, why_not
