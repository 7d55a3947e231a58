"""What a model changes when it runs, put back: attributes, what containers hold, and numbers in tensors."""

from __future__ import annotations

import contextlib
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.utils import _pytree as pytree

_DICTS = (dict, OrderedDict, defaultdict)
_SEQUENCES = (list, deque)
_PLAIN = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device)


class KeptTensors:
    """The numbers of some tensors, to be put back. A sparse tensor, or another without strides, is known to be written
    to by its version alone.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        found = {id(x): x for x in tensors}.values()
        self._before = [(x, x.detach().clone(), x._version) for x in found]

    def changed(self) -> list[Tensor]:
        """Those that hold other numbers now."""
        return [x for x, old, version in self._before if _differs(x, old, version)]

    def put_back(self) -> None:
        """Write the old numbers."""
        for x, old, version in self._before:
            if _differs(x, old, version):
                x.data.copy_(old)


@contextlib.contextmanager
def put_back(model: nn.Module, inputs: Any = ()) -> Iterator[KeptTensors]:
    """Leave the model with the attributes, the contents of containers and the numbers in tensors that it had.

    A cache beside a buffer, such as how many positions of a table are filled, would else belong to another run. So
    would a tensor that is no buffer, or an object that a module holds. inputs: theirs are put back too.
    """
    holders = _holders([*model.modules(), inputs])
    kept = KeptTensors(holders.tensors)
    try:
        yield kept
    finally:
        for restore in holders.restores:
            restore()
        kept.put_back()


class _Holders:
    """Everything that a walk has found, and how to put each back."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.restores: list[Callable[[], None]] = []
        self.seen: dict[int, Any] = {}  # keeps what was seen alive, so that no id comes twice


def _holders(roots: Iterable[Any]) -> _Holders:
    found = _Holders()
    pending = list(roots)
    while pending:
        value = pending.pop()
        if isinstance(value, _PLAIN) or id(value) in found.seen:
            continue
        found.seen[id(value)] = value
        if isinstance(value, Tensor):
            found.tensors.append(value)
        elif type(value) in _DICTS:
            found.restores.append(_of_dict(value))
            pending += value.values()
        elif type(value) in _SEQUENCES:
            found.restores.append(_of_sequence(value))
            pending += value
        elif type(value) is set:
            found.restores.append(_of_set(value))
        elif isinstance(value, nn.Module) or _is_plain_object(value):
            found.restores.append(_of_dict(vars(value)))
            pending += vars(value).values()
        elif isinstance(value, tuple):
            pending += value
        else:
            pending += pytree.tree_leaves(value)
    return found


def _is_plain_object(value: Any) -> bool:
    """Whether this is an instance of a class of Python, whose attributes are all that it is."""
    return not isinstance(value, type) and isinstance(getattr(value, "__dict__", None), dict) and not callable(value)


def _of_dict(value: dict[Any, Any]) -> Callable[[], None]:
    before = dict(value)

    def restore() -> None:
        if list(value) != list(before) or any(value[key] is not before[key] for key in before):
            value.clear()
            value.update(before)

    return restore


def _of_sequence(value: Any) -> Callable[[], None]:
    before = list(value)

    def restore() -> None:
        if len(value) != len(before) or any(a is not b for a, b in zip(value, before, strict=True)):
            value.clear()
            value.extend(before)

    return restore


def _of_set(value: set[Any]) -> Callable[[], None]:
    before = set(value)

    def restore() -> None:
        value.clear()
        value.update(before)

    return restore


def _differs(x: Tensor, old: Tensor, version: int) -> bool:
    if x.is_meta or isinstance(x, FakeTensor):
        return False
    if x._version != version:
        return True
    has_numbers = x.layout is torch.strided and not (x.is_nested or x.is_quantized)
    return has_numbers and not torch.equal(x, old)  # what `.data` was written to shows in no version
