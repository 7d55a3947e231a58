"""What autocast does to one call, written as nodes.

Found by running the call on its example values, once under autocast and once without, and noting the kernels that run
and the dtypes that they read. Where casts of operands explain the difference they are inserted; where the call has an
argument `dtype` that does, it is set; else the call is opened into the kernels that run under autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from spcompile.graph.edit import call
from spcompile.graph.splice import signature_of, splice
from spcompile.torch_private import detect_fake_mode

aten = torch.ops.aten
_TO_FLOAT = (aten._softmax.default, aten._log_softmax.default)  # their third argument casts the first to float32


@dataclass(frozen=True)
class _Effect:
    """What autocast does to a call: which operands it casts, by place among the nodes that the call reads.

    sets_dtype: it gives an argument `dtype`. opens: neither says it.
    """

    casts: dict[int, torch.dtype] = field(default_factory=dict)
    sets_dtype: torch.dtype | None = None
    opens: bool = False


class Explicit:
    """Rewrites calls; remembers what it found, as calls of other layers are alike."""

    def __init__(self) -> None:
        self._known: dict[Any, _Effect] = {}

    def __call__(self, node: fx.Node, state: str) -> bool:
        """Rewrite one call for the autocast that is on here, which `state` names; whether there was need to."""
        if not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.is_mutable:
            return False
        values = [n.meta.get("val") for n in node.all_input_nodes]
        if not any(isinstance(x, Tensor) and x.is_floating_point() for x in values):
            return False
        shape = fx.node.map_arg((node.args, node.kwargs), node.all_input_nodes.index)
        key = (node.target, state, repr(shape), signature_of(node.all_input_nodes))
        if key not in self._known:
            self._known[key] = _effect(node)
        return _write_casts(node, self._known[key])


def _write_casts(node: fx.Node, effect: _Effect) -> bool:
    if effect.opens:
        _open(node)
        return True
    operands = node.all_input_nodes
    new = {
        operands[place]: call(node.graph, aten._to_copy.default, (operands[place],), {"dtype": dtype}, like=node)
        for place, dtype in sorted(effect.casts.items(), key=lambda item: item[0])
    }
    node.args, node.kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: new.get(n, n))
    if effect.sets_dtype is not None:
        node.update_kwarg("dtype", effect.sets_dtype)
    return bool(new) or effect.sets_dtype is not None


def _open(node: fx.Node) -> None:
    """Replace a call by the kernels that run under autocast, and the casts between them."""
    operands = node.all_input_nodes
    result = splice(lambda *values: _called(node, values), operands, like=node, pre_dispatch=False)
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(result)
    else:
        for user in list(node.users):
            user.replace_all_uses_with(result[user.args[1]])
            node.graph.erase_node(user)
    node.graph.erase_node(node)


def _called(node: fx.Node, values: Any, **more: Any) -> Any:
    """The result of a call on other values of the nodes that it reads."""
    given = dict(zip(node.all_input_nodes, values, strict=True))
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: given[n])
    return node.target(*args, **{**kwargs, **more})  # type: ignore[operator]


def _effect(node: fx.Node) -> _Effect:
    values = [n.meta["val"] for n in node.all_input_nodes]
    wanted = _kernels(lambda: _called(node, values), values)
    assert wanted is not None, f"{node.format_node()} does not run again"
    with _off():
        if _same_kernels(wanted, _kernels(lambda: _called(node, values), values)):
            return _Effect()
        cast = [x.to(wanted.casts[at]) if at in wanted.casts else x for at, x in enumerate(values)]
        if _same_kernels(wanted, _kernels(lambda: _called(node, cast), cast), apart_from_casts=True):
            return _Effect(wanted.casts)
        if any(a.name == "dtype" for a in node.target._schema.arguments):  # type: ignore[union-attr]
            found = _kernels(lambda: _called(node, values, dtype=torch.float32), values)
            if _same_kernels(wanted, found):
                return _Effect(sets_dtype=torch.float32)
    return _Effect(opens=True)


@dataclass
class _Kernels:
    """The kernels that a call ran, with dtypes, but for casts of its operands."""

    ran: list[Any] = field(default_factory=list)
    casts: dict[int, torch.dtype] = field(default_factory=dict)


def _same_kernels(wanted: _Kernels, found: _Kernels | None, *, apart_from_casts: bool = False) -> bool:
    return found is not None and wanted.ran == found.ran and (apart_from_casts or wanted.casts == found.casts)


def _kernels(run: Callable[[], Any], values: list[Any]) -> _Kernels | None:
    """What `run` does to the operands `values`; None where a kernel refuses them."""
    noted = _Note([id(x) for x in values])
    fake_mode = detect_fake_mode(values)
    assert fake_mode is not None
    try:
        with torch.no_grad(), fake_mode, noted:
            run()
    except RuntimeError:
        return None
    return noted.kernels


class _Note(TorchDispatchMode):
    def __init__(self, operands: list[int]) -> None:
        super().__init__()
        self._operands = operands
        self.kernels = _Kernels()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is aten._to_copy.default and id(args[0]) in self._operands and set(kwargs) == {"dtype"}:
            self.kernels.casts[self._operands.index(id(args[0]))] = kwargs["dtype"]
            return result
        if not any(isinstance(x, Tensor) for x in pytree.tree_leaves(result)):
            return result  # a question for a device or a size
        read = [_dtype_of(x) for x in pytree.tree_leaves((args, kwargs or {}))]
        if func in _TO_FLOAT and args[2] and id(args[0]) in self._operands:
            self.kernels.casts[self._operands.index(id(args[0]))] = read[0] = torch.float32
        self.kernels.ran.append((func, read, [_dtype_of(x) for x in pytree.tree_leaves(result)]))
        return result


def _dtype_of(x: Any) -> torch.dtype | None:
    return x.dtype if isinstance(x, Tensor) else x if isinstance(x, torch.dtype) else None


@contextmanager
def _off() -> Iterator[None]:
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield
