"""A call of an op as a value: a dataclass whose fields are the arguments of the op, by the names of its schema.

    call = AttentionCall.of(node)               what a node says; what it leaves out has the schema's default
    call.but(mask="causal").write(node)         the node says something else
    call.insert(like=node)                      a new node
    AttentionCall.bind(*args).run()             the same of tensors, where the op runs

Only this file knows where an argument stands in a schema. Fields come in any order, since all are given by name.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
import torch.fx as fx

from spcompile.graph.edit import call

if TYPE_CHECKING:
    from typing_extensions import Self, TypeIs

Operand = Any  # a node in a graph, a tensor where the op runs, None where the schema allows it
_Other = TypeVar("_Other", bound="TypedCall")


def named_arguments(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Every argument of a call by its name, in the schema's order, defaults included."""
    kwargs = kwargs or {}
    named = {}
    for place, argument in enumerate(op._schema.arguments):
        given = place < len(args)
        named[argument.name] = args[place] if given else kwargs.get(argument.name, argument.default_value)
    return named


def value_of(operand: Any) -> Any:
    """The tensor or the size that an argument stands for: of a node its example value."""
    return operand.meta["val"] if isinstance(operand, fx.Node) else operand


@dataclass(frozen=True, kw_only=True)
class TypedCall:
    """A call of `spx::<NAME>`. A subclass has a field for every argument, with the schema's default or none."""

    NAME: ClassVar[str]

    @classmethod
    @functools.cache
    def target(cls) -> Any:
        """The op; the module that defines it must have been imported."""
        return getattr(torch.ops.spx, cls.NAME).default

    @classmethod
    def is_call(cls, node: object) -> TypeIs[fx.Node]:
        """Whether something is a node that calls this op."""
        return isinstance(node, fx.Node) and node.op == "call_function" and node.target is cls.target()

    @classmethod
    def bind(cls, *args: Any, **kwargs: Any) -> Self:
        """The call with these arguments, given as the op takes them."""
        return cls(**named_arguments(cls.target(), args, kwargs))

    @classmethod
    def of(cls, node: fx.Node) -> Self:
        """What a node of this op says."""
        assert cls.is_call(node), f"{node.format_node()} is no call of spx.{cls.NAME}"
        return cls.bind(*node.args, **node.kwargs)

    @classmethod
    def all_in(cls, graph: fx.Graph) -> list[fx.Node]:
        """The nodes of a graph that call this op, in order."""
        return list(graph.find_nodes(op="call_function", target=cls.target()))

    def named(self) -> dict[str, Any]:
        """All arguments by their names, in the schema's order: `bind(*named().values())` is the same call."""
        return {argument.name: getattr(self, argument.name) for argument in self.target()._schema.arguments}

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments as a node has them: like PyTorch, without those at the end that equal their defaults."""
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        needed = 0
        for argument, value in zip(self.target()._schema.arguments, self.named().values(), strict=True):
            differs = not argument.has_default_value() or not _equals(value, argument.default_value)
            if not argument.kwarg_only:
                args.append(value)
                needed = len(args) if differs else needed
            elif differs:
                kwargs[argument.name] = value
        return tuple(args[:needed]), kwargs

    def write(self, node: fx.Node) -> None:
        """Let a node of this op say what this call says. Its example value stays."""
        assert self.is_call(node)
        node.args, node.kwargs = self.arguments()

    def insert(self, *, like: fx.Node, before: fx.Node | None = None) -> fx.Node:
        """A new node; `like` and `before` as in `edit.call`."""
        args, kwargs = self.arguments()
        return call(like.graph, self.target(), args, kwargs, like=like, before=before)

    def run(self) -> Any:
        """The results of the op on these arguments, which are values."""
        args, kwargs = self.arguments()
        return self.target()(*args, **kwargs)

    def but(self, **changes: Any) -> Self:
        """The same call with some arguments changed."""
        return replace(self, **changes)

    def into(self, kind: type[_Other], **more: Any) -> _Other:
        """A call of another op with the arguments that both have, and with `more`."""
        shared = {field.name for field in fields(kind)} & {field.name for field in fields(self)}
        return kind(**{**{name: getattr(self, name) for name in shared}, **more})


def _equals(value: Any, default: Any) -> bool:
    """Whether an argument is its default: a number, a text, None; never a node, a tensor or a symbol."""
    return value is default or (isinstance(value, bool | int | float | str) and value == default)
