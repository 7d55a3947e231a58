"""Which values share memory, and how much each takes.

A *storage* stands for all views of it and is named by the node that made it. A result of an op with several results
is a storage of its own, born with the op.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable
from typing import Any

import sympy
import torch
import torch.fx as fx
from torch.utils import _pytree as pytree

from spcompile.graph.edit import is_getitem
from spcompile.graph.sizes import expression, numel_hint

_c10d = torch.ops._c10d_functional


def root_of(node: fx.Node) -> fx.Node:
    """The node that made the storage of a value."""
    while (base := base_of(node)) is not None:
        node = base
    return node


def base_of(node: fx.Node) -> fx.Node | None:
    """The operand whose storage the value of this node shares; None where it has one of its own."""
    if node.op != "call_function":
        return None
    if node.target is operator.getitem:
        source = node.args[0]
        return source if isinstance(source, fx.Node) and base_of(source) is not None else None
    if node.target in (torch.ops.aten._unsafe_view.default, _c10d.wait_tensor.default):
        return node.args[0]  # type: ignore[return-value]
    for place in _shared_arguments(node.target):
        if place < len(node.args) and isinstance(value := node.args[place], fx.Node):
            return value
    return None


@functools.cache
def _shared_arguments(target: Any) -> tuple[int, ...]:
    """Which arguments of an op its result may share the storage of."""
    schema = getattr(target, "_schema", None)
    if schema is None or not schema.returns or schema.returns[0].alias_info is None:
        return ()
    return tuple(place for place, argument in enumerate(schema.arguments) if argument.alias_info is not None)


def born_at(root: fx.Node) -> fx.Node:
    """The call that allocates a storage: of a result of several, the call that has them all."""
    source = root.args[0] if is_getitem(root) else None
    return source if isinstance(source, fx.Node) else root


def storage_bytes(node: fx.Node) -> int:
    """What a node itself allocates, at traced sizes: 0 for a view."""
    return sum(numel_hint(part) * part.element_size() for part in _allocated(node))


def storage_size(node: fx.Node) -> sympy.Expr:
    """`storage_bytes` for any size of the inputs."""
    return sum((expression(part.numel()) * part.element_size() for part in _allocated(node)), sympy.Integer(0))


def _allocated(node: fx.Node) -> Iterable[torch.Tensor]:
    """The tensors that a node allocates; of several results those that no node of their own takes."""
    value: Any = node.meta.get("val")
    if node.op == "output" or root_of(node) is not node:
        return []
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        taken = {user.args[1] for user in node.users if is_getitem(user)}
        value = [part for index, part in enumerate(value) if index not in taken]
    return [part for part in pytree.tree_leaves(value) if isinstance(part, torch.Tensor)]


def saved_values(forward: fx.Graph, backward: fx.Graph) -> list[fx.Node]:
    """The outputs of `forward` that `backward` takes: its last ones, as many as backward has inputs but tangents."""
    taken = [n for n in backward.nodes if n.op == "placeholder" and "tangents" not in str(n.target)]
    outputs = outputs_of(forward)
    return [n for n in outputs[len(outputs) - len(taken) :] if isinstance(n, fx.Node)]


def saved_pairs(forward: fx.Graph, backward: fx.Graph) -> list[tuple[fx.Node, fx.Node]]:
    """Each output of `forward` that `backward` takes, with its input there. Sizes are saved last and taken first."""
    taken = [n for n in backward.nodes if n.op == "placeholder" and "tangents" not in str(n.target)]
    saved = sorted(saved_values(forward, backward), key=lambda node: isinstance(node.meta.get("val"), torch.Tensor))
    return list(zip(saved, taken, strict=True))


def outputs_of(graph: fx.Graph) -> list[Any]:
    """What a graph returns, flat."""
    return list(pytree.arg_tree_leaves(*graph.output_node().args))
