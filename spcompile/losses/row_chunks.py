"""How many rows of logits stand at once.

N rows, D width of a row, C classes on this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import sympy

# A chunk of logits has at most this part of the elements of what the product reads, which stands there anyway: rows and
# weight. Beside the weight, so that few rows are not cut into chunks of which each reads the whole weight for next to
# nothing; beside the rows, since a long sequence can afford larger chunks.
PART = 8
Size = Any  # int or sympy.Expr


def rows_of_chunk(
    N: Size, D: Size, C: Size, least: Callable[..., Any] = min, greatest: Callable[..., Any] = max
) -> Size:
    """The rows of all chunks but the last; fewer than N where there are two rows or more.

    least, greatest: `sympy.Min` and `sympy.Max` for sizes that are expressions.
    """
    return least(greatest(1, D * (N + C) // (PART * greatest(1, C))), greatest(1, (N + 1) // 2))


def chunks_of_rows(N: int, D: int, C: int) -> Iterator[slice]:
    """The chunks, in order."""
    rows = rows_of_chunk(N, D, C)
    for start in range(0, N, rows):
        yield slice(start, min(N, start + rows))


def symbolic_rows_of_chunk(N: sympy.Expr, D: sympy.Expr, C: sympy.Expr) -> sympy.Expr:
    """`rows_of_chunk` of sizes that may be symbols."""
    return sympy.sympify(rows_of_chunk(N, D, C, sympy.Min, sympy.Max))
