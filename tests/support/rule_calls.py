"""Calls of ops on random operands that are described, not made: what the table of rules is written in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv


@dataclass(frozen=True)
class Spec:
    """A tensor operand: its shape and the range its random elements come from."""

    shape: tuple[int, ...]
    low: float
    high: float
    dtype: torch.dtype = torch.float64
    gradient: bool = True  # False where the op has no derivative for this operand
    definite: bool = False  # square matrices, symmetric and positive definite

    def make(self, generator: torch.Generator) -> torch.Tensor:
        if self.dtype in (torch.int64, torch.uint8):
            return torch.randint(int(self.low), int(self.high), self.shape, generator=generator, dtype=self.dtype)
        x = self.low + (self.high - self.low) * torch.rand(self.shape, generator=generator, dtype=torch.float64)
        if self.definite:
            return x @ x.mT + torch.eye(x.shape[-1], dtype=x.dtype)
        if self.dtype.is_complex:
            return torch.polar(x, 3 * x)
        return x > (self.low + self.high) / 2 if self.dtype == torch.bool else x.to(self.dtype)


def x(*shape: int) -> Spec:
    """Floats of both signs."""
    return Spec(shape, -0.9, 0.9)


def definite(*shape: int) -> Spec:
    """Symmetric matrices, positive definite."""
    return Spec(shape, -0.9, 0.9, definite=True)


def pos(*shape: int) -> Spec:
    """Floats in (0.1, 0.9)."""
    return Spec(shape, 0.1, 0.9)


def fixed(*shape: int) -> Spec:
    """Floats in (0.1, 0.9), for operands that an op has no derivative for."""
    return Spec(shape, 0.1, 0.9, gradient=False)


def big(*shape: int) -> Spec:
    """Floats in (1.1, 3)."""
    return Spec(shape, 1.1, 3.0)


def ints(high: int, *shape: int) -> Spec:
    """Integers in [0, high)."""
    return Spec(shape, 0, high, torch.int64)


def flags(*shape: int) -> Spec:
    """Booleans."""
    return Spec(shape, 0, 1, torch.bool)


def cplx(*shape: int) -> Spec:
    """Complex numbers."""
    return Spec(shape, 0.1, 0.9, torch.complex128)


@dataclass(frozen=True)
class Call:
    """One call of one op."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def op(self) -> Any:
        packet, _, overload = self.name.partition(".")
        return getattr(getattr(torch.ops.aten, packet), overload or "default")

    def node(self) -> fx.Node:
        """The call in a graph, on fake tensors."""
        mode = FakeTensorMode(shape_env=ShapeEnv())
        graph = fx.Graph()
        generator = torch.Generator()

        def placeholder(spec: Any) -> Any:
            if isinstance(spec, list):
                return [placeholder(s) for s in spec]
            if not isinstance(spec, Spec):
                return spec
            node = graph.placeholder(f"arg{len(graph.nodes)}")
            node.meta["val"] = mode.from_tensor(spec.make(generator), static_shapes=True)
            return node

        args = tuple(placeholder(a) for a in self.args)
        kwargs = {k: placeholder(v) for k, v in self.kwargs.items()}
        node = graph.call_function(self.op, args, kwargs)
        values = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        with mode:
            node.meta["val"] = self.op(*values[0], **values[1])
        return node


def call(name: str, *args: Any, **kwargs: Any) -> Call:
    return Call(name, args, kwargs)
