"""What `verify` returns: one row per compared tensor, and on a mismatch where it begins."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from spcompile.diagnostics import Remark, SourceLine, remark_lines
from spcompile.machine.mesh import MeshShape
from spcompile.plain_text import one_line, some_lines

SCHEMA_VERSION = 1
Kind = Literal["output", "gradient", "new value"]


@dataclass(frozen=True)
class TensorError:
    """How far one tensor is from the plain model's, on the worst rank.

    graph: "local" (before autograd), "final" (forward and backward as they run), or "late": final graphs that are only
        wrong where a collective reads its operand as late as it may; "parts": all graphs of a model that breaks.
    kind: a "new value" is that of a buffer, parameter or input which the model writes to.
    relative: max_abs over the largest element of the plain model's tensor.
    """

    graph: str
    kind: Kind
    name: str
    max_abs: float
    relative: float
    ok: bool


@dataclass(frozen=True)
class Culprit:
    """Where a mismatch begins: the first pass behind which the result is wrong, and the first value that is.

    what: "value" or "gradient" of `node`; node is None where no value could be compared.
    """

    pass_name: str
    node: str | None = None
    what: str = "value"
    source: SourceLine | None = None

    def __str__(self) -> str:
        text = f"first wrong after pass {self.pass_name}"
        if self.node is not None:
            text += f": the {self.what} of {one_line(self.node)}"
        return text + (f"\n  at {self.source}" if self.source else "")


@dataclass
class Report:
    """The result of `verify`. notes: what could not be compared, and why."""

    mesh: MeshShape
    tolerance: float
    rows: list[TensorError]
    culprit: Culprit | None = None
    remarks: list[Remark] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every tensor agrees."""
        return all(row.ok for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        culprit = self.culprit
        source = culprit.source if culprit else None
        return {
            "schema_version": SCHEMA_VERSION,
            "ok": self.ok,
            "mesh": dict(self.mesh.axes),
            "tolerance": self.tolerance,
            "tensors": [dict(vars(row)) for row in self.rows],
            "culprit": {
                "pass": culprit.pass_name,
                "node": culprit.node,
                "what": culprit.what,
                "source": {"file": source.file, "line": source.line, "text": source.text} if source else None,
            }
            if culprit
            else None,
            "remarks": [remark.to_dict() for remark in self.remarks],
            "notes": self.notes,
        }

    def __str__(self) -> str:
        from rich.console import Console  # where nothing is printed, nothing but torch is needed
        from rich.table import Table

        out = io.StringIO()
        console = Console(file=out, width=120, highlight=False, color_system=None, markup=False, emoji=False)
        console.print(f"mesh {self.mesh}, tolerance {self.tolerance:g}")
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for name in ("", "graph", "kind", "tensor", "max abs", "relative"):
            table.add_column(name, justify="right" if name in ("max abs", "relative") else "left", overflow="fold")
        for row in self.rows:
            verdict = "ok" if row.ok else "WRONG"
            table.add_row(verdict, row.graph, row.kind, one_line(row.name), f"{row.max_abs:.2e}", f"{row.relative:.2e}")
        console.print(table)
        for line in (*remark_lines(self.remarks), *self.notes):
            console.print(some_lines(line), soft_wrap=True)
        wrong = sum(not row.ok for row in self.rows)
        count = len(self.rows)
        console.print(f"{wrong} of {count} tensors are wrong" if wrong else f"all {count} tensors agree")
        if self.culprit is not None:
            console.print(str(self.culprit), soft_wrap=True)
        return out.getvalue().rstrip() + "\n"


def is_exact(x: Tensor) -> bool:
    """Whether numbers of this dtype are not rounded."""
    return not (x.is_floating_point() or x.is_complex())


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest absolute difference; of integers, how many differ. inf where just one is NaN."""
    found, expected = found.detach(), expected.detach()
    if expected.numel() == 0:
        return 0.0
    if is_exact(expected):
        return float((found != expected).sum())
    agree = (found == expected) | (found.isnan() & expected.isnan())
    worst = torch.where(agree, 0.0, (found - expected).abs()).max()
    return float("inf") if worst.isnan() else float(worst)


def largest(x: Tensor) -> float:
    """The largest absolute value."""
    if x.numel() == 0:
        return 0.0
    x = x.detach()
    size = x.abs() if x.is_complex() else x.to(torch.float64).abs()
    return float(size.to(torch.float64).nan_to_num(posinf=0.0).max())
