"""Writes that autograd does not see: under `no_grad`, and through `.data` or `.detach()`.

Such a write changes the numbers of a tensor. The gradient of what reads the tensor later still goes to where it went
before: the numbers alone are new. A graph without writes says that as `spx.keep_gradient(old, new)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from spcompile.capture.gradient_ops import keep_gradient
from spcompile.graph.dtypes import takes_gradient
from spcompile.graph.typed_call import named_arguments
from spcompile.torch_private import FunctionalTensor, FunctionalTensorMode
from spcompile.torch_private_func import treat_alike

aten = torch.ops.aten
SEEN = "spx_seen_by_autograd"  # in meta["custom"] of what a trace runs with gradients among calls without


class QuietWrites(FunctionalTensorMode):
    """Functionalisation in which a write that autograd does not see leaves gradients where they are.

    Functionalisation itself knows nothing of autograd: for it a tensor is what was written to it last.
    """

    def __init__(self) -> None:
        super().__init__(pre_dispatch=True, export=True, _allow_token_discovery=True)
        treat_alike(QuietWrites, FunctionalTensorMode)
        self._seen: Any = WeakTensorKeyDictionary()  # an alias without a gradient -> a call that gives one with it

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an op. Without gradients, aliases of what was written before are renewed with theirs."""
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():
            with _gradients():
                for tensor in _functional((args, kwargs)):
                    tensor.sync()
        written = [tensor for tensor in _written_to(func, args, kwargs) if self._is_quiet(tensor)]
        if written:
            return self._write(func, types, args, kwargs, written)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self._note_alias(func, args, kwargs, result)
        return result

    def _is_quiet(self, tensor: Tensor) -> bool:
        return takes_gradient(tensor) and (not torch.is_grad_enabled() or tensor in self._seen)

    def _note_alias(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Keep how an alias is made: of what has a gradient, that is, and where gradients are."""
        is_alias = any(value.alias_info is not None and not value.alias_info.is_write for value in func._schema.returns)
        source = args[0] if args else None
        if not is_alias or not isinstance(source, FunctionalTensor):
            return
        if func is aten.detach.default:
            self._seen[result] = lambda: self._with_gradient(source)
        elif source in self._seen or not torch.is_grad_enabled():
            for number, alias in enumerate(_functional(result)):
                self._seen[alias] = self._made_again(func, args, kwargs, number)

    def _made_again(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], number: int
    ) -> Callable[[], FunctionalTensor]:
        return lambda: _functional(func(self._with_gradient(args[0]), *args[1:], **kwargs))[number]

    def _with_gradient(self, tensor: FunctionalTensor) -> FunctionalTensor:
        again = self._seen.get(tensor)
        return tensor if again is None else again()

    def _write(
        self, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any], written: list[FunctionalTensor]
    ) -> Any:
        """Run an op on copies of what it writes to, then give the originals its numbers."""
        with self:
            copies = [(tensor, tensor.clone()) for tensor in written]

        def swapped(values: Any, pairs: list[tuple[Any, Any]]) -> Any:
            found = {id(one): other for one, other in pairs}
            return pytree.tree_map_only(FunctionalTensor, lambda value: found.get(id(value), value), values)

        on_copies, named = swapped((args, kwargs), copies)
        result = super().__torch_dispatch__(func, types, on_copies, named)
        for tensor, copy in copies:
            with self, _gradients():
                seen = self._with_gradient(tensor)
                seen.replace_(_inner(keep_gradient(seen, copy)))
                seen.commit_update()
                seen.sync()
                tensor.sync()
            if seen is not tensor:
                tensor.replace_(_inner(copy))  # what was written to an alias itself may have a gradient there
        return swapped(result, [(copy, tensor) for tensor, copy in copies])


@contextmanager
def _gradients() -> Iterator[None]:
    with torch.enable_grad(), fx.traceback.annotate({SEEN: True}):
        yield


def _inner(tensor: Any) -> Tensor:
    tensor.sync()
    inner: Tensor = torch._from_functional_tensor(tensor.elem)
    return inner


def _functional(values: Any) -> list[FunctionalTensor]:
    return [value for value in pytree.tree_leaves(values) if isinstance(value, FunctionalTensor)]


def _written_to(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[FunctionalTensor]:
    """Whose numbers an op changes, by its schema."""
    if not func._schema.is_mutable or torch.Tag.inplace_view in func.tags:
        return []
    parameters = func._schema.arguments
    values = {**dict(zip([one.name for one in parameters], args, strict=False)), **kwargs}
    taken = [values.get(one.name) for one in parameters if one.alias_info is not None and one.alias_info.is_write]
    return list({id(tensor): tensor for tensor in _functional(taken)}.values())


def settle_kept_gradients(graph: fx.Graph) -> None:
    """Leave `keep_gradient` where its first operand has a gradient: anywhere else the new numbers are all there is.

    Under `no_grad` nothing has one.
    An input that is written to takes the new numbers, which are all that a write to it can give.
    """
    has_gradient = set[fx.Node]()
    for node in list(graph.nodes):
        if node.target is not torch.ops.spx.keep_gradient.default:
            is_on_way = node.target is not aten.detach.default and not has_gradient.isdisjoint(node.all_input_nodes)
            value = node.meta.get("val")
            is_float = not isinstance(value, Tensor) or takes_gradient(value)
            if is_float and (is_on_way or node.meta.get("trainable")) and torch.is_grad_enabled():
                has_gradient.add(node)
            continue
        named = named_arguments(node.target, node.args, node.kwargs)
        old, new = named["old"], named["new"]
        with graph.inserting_before(node):
            constant = graph.call_function(aten.detach.default, (new,))
        constant.meta = dict(node.meta)
        node.args = (old, constant)
        for user in list(node.users):
            if old not in has_gradient or user.target is aten.copy_.default:
                user.replace_input_with(node, constant)
        if node.users:
            has_gradient.add(node)
        else:
            graph.erase_node(node)
