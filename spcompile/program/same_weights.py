"""Do all ranks hold the same parameters and buffers, and are about to run the same ones?

The values are compared when a graph is first called with a set of them, and again when they were written to by
something else than an optimizer or the graph itself, such as a checkpoint that is loaded. Between, ranks compare the
number of the set alone. After a step of an optimizer values are not compared: replicated arithmetic on GPUs may round
differently, and drifts that small are no mistake.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from spcompile.program.checksum import can_be_summed, checksums
from spcompile.program.facts import Fact, Record, some_of
from spcompile.program.same_inputs import split_axes

_LEGAL = (
    "seed before the model is built, load one checkpoint on all ranks, or spcompile.broadcast(model, mesh), which "
    "makes rank 0's the truth"
)
_MOST_KEPT = 64  # sets whose number is remembered


@dataclass(eq=False)
class ParameterSet:
    """Tensors that a graph was called with, together. number: the same on all ranks that first saw their sets alike."""

    number: int
    tensors: list[weakref.ref[Tensor]]
    versions: list[int]

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether it is the set of these very tensors."""
        return len(self.tensors) == len(tensors) and all(
            ref() is t for ref, t in zip(self.tensors, tensors, strict=True)
        )

    def written_to(self, tensors: Sequence[Tensor]) -> bool:
        """Whether something that was not accepted has written to a tensor."""
        return self.versions != _versions_of(tensors)

    def accept(self, ids: Iterable[int] | None = None) -> None:
        """What was written until now is no reason to compare again: to all tensors, or to those of these ids."""
        among = None if ids is None else set(ids)
        for i, ref in enumerate(self.tensors):
            tensor = ref()
            if tensor is not None and (among is None or id(tensor) in among):
                self.versions[i] = _version(tensor)


_ALL: weakref.WeakSet[ParameterSet] = weakref.WeakSet()


class ParameterSets:
    """The sets that programs of one mesh were called with, numbered as they came."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._sets: list[ParameterSet] = []

    def of(self, tensors: Sequence[Tensor], last: ParameterSet | None) -> tuple[ParameterSet, bool]:
        """(the set of these tensors, whether it is a new one). last: that of the call before, which is likely."""
        if last is not None and last.holds(tensors):
            return last, False
        known = next((one for one in self._sets if one.holds(tensors)), None)
        if known is not None:
            return known, False
        new = ParameterSet(next(self._numbers), [weakref.ref(t) for t in tensors], _versions_of(tensors))
        self._sets = [one for one in self._sets if all(ref() is not None for ref in one.tensors)][1 - _MOST_KEPT :]
        self._sets.append(new)
        _ALL.add(new)
        return new, True


def fact_of_set(found: ParameterSet, names: Sequence[str]) -> Fact:
    """Which parameters are about to be used."""
    own = f"set {found.number} of those seen, with {some_of(names)}" if names else "none"
    return Fact("parameters", own, legal="models called in the same order on every rank")


def record_of_values(names: Sequence[str], tensors: Sequence[Tensor], where: str) -> Record:
    """The values of parameters and buffers, to be compared; waits for the device."""
    summed = [i for i, value in enumerate(tensors) if can_be_summed(value)]
    numbers = checksums([tensors[i] for i in summed])()
    facts = [
        Fact(f"{_kind_of(tensors[i])} {names[i]}", f"checksum {number % 2**64:016x}", split_axes(tensors[i]), _LEGAL)
        for i, number in zip(summed, numbers, strict=True)
    ]
    return Record(f"compares the parameters for {where}", tuple(facts))


def _kind_of(tensor: Tensor) -> str:
    return "parameter" if isinstance(tensor, nn.Parameter) else "buffer"


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _versions_of(tensors: Sequence[Tensor]) -> list[int]:
    return [_version(t) for t in tensors]


def _accept_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if len(_ALL):
        ids = [id(p) for group in optimizer.param_groups for p in group["params"]]
        for one in _ALL:
            one.accept(ids)


register_optimizer_step_post_hook(_accept_step)
