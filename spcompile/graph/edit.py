"""Typed edits of an fx graph: every new node has an example value and the origin of the node it stands for."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
import torch.fx as fx

from spcompile.torch_private import LazyGraphModule

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch._subclasses import FakeTensorMode

_ORIGIN = ("stack_trace", "nn_module_stack", "recompute", "ac_graph_id")


def call(
    graph: fx.Graph,
    target: Callable[..., Any],
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    like: fx.Node,
    before: fx.Node | None = None,
) -> fx.Node:
    """A new call node.

    args, kwargs: as fx takes them: nodes, numbers, lists of them. Sizes may be SymInt nodes, never bare SymInts.
    like: gives the origin (source line, module, checkpointed region) and, where no operand has one, the fake mode.
    before: the node in front of which the call goes; `like` itself by default.
    """
    kwargs = dict(kwargs or {})
    with graph.inserting_before(before or like):
        node = graph.call_function(target, args, kwargs)
    for key in _ORIGIN:
        if key in like.meta:
            node.meta[key] = like.meta[key]
    node.meta["val"] = _example(target, args, kwargs, like)
    return node


def replace(node: fx.Node, new: fx.Node) -> None:
    """Let all users of `node` use `new`, and erase `node`."""
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def erase_dead(gm: fx.GraphModule) -> bool:
    """Erase the nodes whose results nobody reads (those with side effects stay). True if there were some."""
    changed = gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    return bool(changed)


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    """The shape of a tensor node: ints and SymInts."""
    return tuple(node.meta["val"].shape)


def is_tensor(value: object) -> bool:
    """Whether this argument is a node with a single tensor as its result."""
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor)


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """An argument of a call by its place in the schema or by its name."""
    if len(node.args) > index:
        return node.args[index]
    return node.kwargs.get(name, default)


def _example(target: Callable[..., Any], args: Any, kwargs: Any, like: fx.Node) -> Any:
    def value(node: fx.Node) -> Any:
        return node.meta["val"]

    args, kwargs = fx.node.map_arg((args, kwargs), value)
    mode = fake_mode_of((args, kwargs)) or fake_mode_of(like.meta.get("val"))
    if mode is None:
        raise AssertionError(f"{like} has no fake example value")
    with mode, torch.no_grad():
        return target(*args, **kwargs)


def fake_mode_of(values: Any) -> FakeTensorMode | None:
    """The mode of the first fake tensor in nested values."""
    for value in torch.utils._pytree.tree_leaves(values):
        mode = getattr(value, "fake_mode", None)
        if mode is not None:
            return mode
    return None


def copy_module(gm: fx.GraphModule) -> fx.GraphModule:
    """A module with a copy of the graph, and the same attributes. Its Python code is written when it is asked for."""
    return LazyGraphModule(gm, copy_graph(gm.graph))


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy with the same node names; every node's meta is a dict of its own."""
    copy = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    result = copy.graph_copy(graph, mapping)
    output = next(n for n in reversed(graph.nodes) if n.op == "output")
    mapping[output] = copy.output(result)
    for old, new in mapping.items():
        new.meta = dict(old.meta)
    return copy


def operand(node: fx.Node, index: int) -> fx.Node:
    """The argument at `index`, which is a node."""
    found = node.args[index]
    assert isinstance(found, fx.Node), f"argument {index} of {node.format_node()}"
    return found


def is_getitem(node: fx.Node) -> bool:
    """Whether the node takes one result of a call that has several."""
    return node.op == "call_function" and node.target is operator.getitem


def result_number(getitem: fx.Node) -> int:
    """Which tensor result of its producer a getitem takes."""
    values, index = operand(getitem, 0).meta["val"], getitem.args[1]
    assert isinstance(index, int)
    return sum(isinstance(v, torch.Tensor) for v in values[:index])
