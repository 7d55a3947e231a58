"""A condition or an id over (b, t) written back into the graph as a [B or 1, T] vector.

Where the expression is a look-up of a node of the graph, that node itself is the vector and nothing is added.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import sympy
import torch
import torch.fx as fx
from sympy.logic.boolalg import Boolean

from spcompile.recognition.masks.index_maps import size_expr, sizes_of
from spcompile.recognition.masks.match import B, K
from spcompile.recognition.masks.values import Element, Int

aten = torch.ops.aten


class Unwritable(Exception):
    """The expression needs something that no vector of the graph holds."""


@dataclass(frozen=True)
class VectorWriter:
    """Writes vectors of one length.

    leaves: the nodes behind Element look-ups.
    batch: the batch size; length: an int, or a node with the SymInt.
    new: makes a call node from its target and arguments.
    """

    leaves: Mapping[str, fx.Node]
    batch: Int
    length: int | fx.Node
    device: torch.device
    new: Callable[..., fx.Node]

    def condition(self, condition: Boolean) -> fx.Node:
        """A bool [B or 1, T]. K stands for the position.

        Raises:
            Unwritable: see there.
        """
        return self._spread(self._condition(condition))

    def document_id(self, ids: tuple[Int, ...]) -> fx.Node:
        """Integers [B or 1, T], equal exactly where all `ids` are equal; K stands for the position.

        Raises:
            Unwritable: see there.
        """
        vectors = [self._spread(self._integers(e)) for e in ids]
        return reduce(self._pair, vectors)

    def _pair(self, first: fx.Node, second: fx.Node) -> fx.Node:
        # (a, b) -> a * (max b - min b + 1) + b is injective
        low = self.new(aten.amin.default, second)
        span = self.new(aten.add.Tensor, self.new(aten.sub.Tensor, self.new(aten.amax.default, second), low), 1)
        return self.new(aten.add.Tensor, self.new(aten.mul.Tensor, first, span), second)

    def _spread(self, vector: fx.Node | int) -> fx.Node:
        if not isinstance(vector, fx.Node):
            raise Unwritable
        if sizes_of(vector)[1] == size_expr(self.length):
            return vector
        return self.new(aten.expand.default, vector, [-1, self.length])

    def _condition(self, condition: Boolean) -> fx.Node:
        if isinstance(condition, sympy.And | sympy.Or):
            op = aten.logical_and.default if isinstance(condition, sympy.And) else aten.logical_or.default
            parts = [self._condition(arg) for arg in sorted(condition.args, key=sympy.default_sort_key)]
            return reduce(lambda a, b: self.new(op, a, b), parts)
        e = condition.lhs
        if isinstance(e, Element) and self.leaves[e.node_name].meta["val"].dtype == torch.bool:
            valid = self._look_up(e)
            return valid if isinstance(condition, sympy.Ne) else self.new(aten.logical_not.default, valid)
        ops = {sympy.Ge: aten.ge.Scalar, sympy.Eq: aten.eq.Scalar, sympy.Ne: aten.ne.Scalar}
        constant, rest = e.as_coeff_Add()
        numbers = self._integers(rest)
        if not isinstance(numbers, fx.Node) or not constant.is_Integer:
            raise Unwritable
        return self.new(ops[type(condition)], numbers, int(-constant))

    def _integers(self, e: Int) -> fx.Node | int:
        if e.is_Integer:
            return int(e)
        if e == K:
            positions = self.new(aten.arange.default, self.length, dtype=torch.int64, device=self.device)
            return self.new(aten.unsqueeze.default, positions, 0)
        if isinstance(e, Element):
            vector = self._look_up(e)
            if vector.meta["val"].dtype == torch.bool:
                vector = self.new(aten.to.dtype, vector, torch.int64)
            return vector
        if isinstance(e, sympy.Add):
            return reduce(self._sum, (self._integers(term) for term in e.args))
        if isinstance(e, sympy.Mul):
            factor, rest = e.as_coeff_Mul()
            if factor.is_Integer and factor != 1:
                numbers = self._integers(rest)
                return self.new(aten.mul.Tensor, numbers, int(factor))
        if isinstance(e, sympy.floor):
            numerator, divisor = sympy.fraction(sympy.together(e.args[0]))
            if divisor.is_Integer:
                numbers = self._integers(sympy.expand(numerator))
                return self.new(aten.floor_divide.default, numbers, int(divisor))
        raise Unwritable

    def _sum(self, a: fx.Node | int, b: fx.Node | int) -> fx.Node | int:
        if isinstance(a, fx.Node):
            return self.new(aten.add.Tensor, a, b)
        return self.new(aten.add.Tensor, b, a) if isinstance(b, fx.Node) else a + b

    def _look_up(self, element: Element) -> fx.Node:
        vector = self.leaves[element.node_name]
        dims: list[sympy.Symbol] = []
        for i in element.indices:
            dim, offset = len(dims), i - K
            size = sizes_of(vector)[dim]
            if (i == B and size == self.batch) or (i == 0 and size == 1 and not dims):
                dims.append(B)
            elif offset.is_Integer and offset >= 0 and K not in dims:
                vector = self._cut(vector, dim, int(offset))
                dims.append(K)
            elif i.is_Integer:
                vector = self.new(aten.select.int, vector, dim, int(i))
            else:
                raise Unwritable
        if dims == [K, B]:
            vector = self.new(aten.transpose.int, vector, 0, 1)
        elif dims in ([K], []):
            vector = self.new(aten.unsqueeze.default, vector, 0)
        if K not in dims:
            vector = self.new(aten.unsqueeze.default, vector, 1)
        return vector

    def _cut(self, vector: fx.Node, dim: int, start: int) -> fx.Node:
        if start == 0 and sizes_of(vector)[dim] == size_expr(self.length):
            return vector
        end: Any = self.length if start == 0 else None
        if start != 0:
            if not isinstance(self.length, int):
                raise Unwritable
            end = operator.add(self.length, start)
        return self.new(aten.slice.Tensor, vector, dim, start, end)
