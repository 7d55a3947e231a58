"""What a collective is: one custom op of the namespace `spx`, with everything that gives it meaning beside it.

A value has one state per mesh axis (the idea is from meta-pytorch/spmd_types, docs/design.md):

    I  invariant    the same data on every rank, and so is its gradient       gradient I
    R  replicate    the same data on every rank; ranks use it differently     gradient P
    S  shard        every rank has its own part                               gradient S
    P  partial      the value is the sum over ranks, not yet taken            gradient R

A collective takes state `src` to state `dst`. Its dual, which autograd runs, takes gradient(dst) to gradient(src). A
wrong dual is a right loss with wrong gradients: the tests check each by the adjoint identity <y, A x> = <A' y, x>.

In compiler graphs the argument `axis` is a mesh axis. Before a graph runs on real processes it is replaced by the c10d
name of this rank's group along the axis (`spcompile.graph.axes.bind_axes`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spcompile import torch_private_groups
from spcompile.graph.typed_call import named_arguments
from spcompile.machine.overlaps import Overlap

Size = Any  # int or SymInt
State = str  # "I", "R", "S" or "P"
GRADIENT: Mapping[State, State] = {"I": "I", "R": "P", "S": "S", "P": "R"}

_LIBRARY = torch.library.Library("spx", "FRAGMENT")
_c10d = torch.ops._c10d_functional


@dataclass(frozen=True)
class Call:
    """A call of a collective: what follows the tensor. `shape` is the operand's shape on every rank (in examples)."""

    arguments: Mapping[str, Any]
    op: torch._ops.OpOverload | None = None
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Collective:
    """All that is known about one collective. Every function takes the arguments of the op, by the names of its schema.

    op: the OpOverload.
    summary: one sentence.
    states: value of the argument `to` ("" where the op has none) -> (state of the operand, state of the result).
    drawing: operand and result, one row per rank.
    formula: `sent` as text. n: degree, local, full: bytes of one rank's part and of the whole tensor.
    spec(parts, **arguments): all ranks' results from all ranks' operands; pure, new tensors.
    sent(x, **arguments): bytes that one rank sends, int or SymInt.
    dual(x, **arguments): the call that turns the gradient of the result into the gradient of the operand.
    lowered(x, **arguments): the same in functional c10d and ATen, `axis` being a group name; None where the rank must
        be known (such an op stays one node).
    examples(length, degree): calls on a dim of `length` elements, for tests and documentation.
    """

    op: torch._ops.OpOverload
    summary: str
    states: Mapping[str, tuple[State, State]]
    drawing: str
    formula: str
    spec: Callable[..., list[Tensor]]
    sent: Callable[..., Size]
    dual: Callable[..., Call]
    lowered: Callable[..., Tensor] | None
    examples: Callable[[int, int], Iterable[Call]]

    @property
    def name(self) -> str:
        return self.op._schema.name.split("::")[1]

    def signature(self, arguments: Mapping[str, Any]) -> tuple[State, State]:
        """States of operand and result of this call."""
        return self.states[arguments.get("to", "")]


COLLECTIVES: dict[torch._ops.OpOverload, Collective] = {}
STARTS: set[torch._ops.OpOverload] = set()  # what starts a collective besides functional c10d


def copy_overlaps(out: Tensor, x: Tensor, dim: int, pieces: Iterable[Overlap]) -> None:
    """Put pieces of `x` along `dim` where they stand in `out`."""
    for piece in pieces:
        out.narrow(dim, piece.target, piece.size).copy_(x.narrow(dim, piece.source, piece.size))


def define(
    schema: str,
    *,
    fake: Callable[..., Tensor],
    eager: Callable[..., Tensor] | None = None,
    lowered: Callable[..., Tensor] | None = None,
    **fields: Any,
) -> Collective:
    """Define `spx::<schema>`, register its kernels and its gradient, and enter it into COLLECTIVES.

    eager: the kernel for real processes; by default `lowered`.
    """
    name = schema.partition("(")[0]
    kernel = eager if eager is not None else lowered
    assert kernel is not None, name
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"spx::{name}", fake, lib=_LIBRARY)
    op = getattr(torch.ops.spx, name).default
    collective = Collective(op=op, lowered=lowered, **fields)

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.operands = len(inputs)
        ctx.dual = collective.dual(inputs[0], **call_arguments(op, inputs)[1])

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return (ctx.dual.op(grad, **ctx.dual.arguments), *[None] * (ctx.operands - 1))

    torch.library.register_autograd(f"spx::{name}", backward, setup_context=save, lib=_LIBRARY)
    COLLECTIVES[op] = collective
    return collective


def call_arguments(
    op: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None
) -> tuple[Any, dict[str, Any]]:
    """The first argument of a call, and all others by name, defaults included."""
    named = named_arguments(op, args, kwargs)
    return named.pop(next(iter(named))), named


def is_start(target: Any) -> bool:
    """Whether an op starts a collective that a `wait_tensor` ends."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return target in STARTS or (target.namespace == "_c10d_functional" and target is not _c10d.wait_tensor.default)


def rank_in(group: str) -> int:
    """This process's rank in a c10d group."""
    return torch_private_groups.resolve_process_group(group).rank()


def with_size(shape: Sequence[Size], dim: int, size: Size) -> list[Size]:
    """`shape` with another size at `dim`."""
    assert 0 <= dim < len(shape), (dim, shape)
    return [*shape[:dim], size, *shape[dim + 1 :]]


def wait(x: Tensor) -> Tensor:
    """The result of a started collective, once it has arrived."""
    return _c10d.wait_tensor.default(x)


def packed(x: Tensor) -> Tensor:
    """`x` in row-major memory, as fakes promise it; a size of 1 has the row-major stride too, unlike x.contiguous().

    With symbolic sizes always a copy: asking whether one is needed would guard on them.
    """
    if not all(isinstance(size, int) for size in (*x.shape, *x.stride())):
        return x.clone(memory_format=torch.contiguous_format)
    strides, step = [], 1
    for size in reversed(x.shape):
        strides.append(step)
        step *= max(size, 1)
    if list(x.stride()) == strides[::-1]:
        return x
    return x.clone(memory_format=torch.contiguous_format)
