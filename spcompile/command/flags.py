"""Flags that several commands have."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

Sizes = Annotated[list[str] | None, Parameter(name="--mesh", help="Axis sizes, as cp=8 or tp=2,cp=4.", negative="")]
Settings = Annotated[
    list[str] | None, Parameter(name="--set", help="A setting of the model, as layers=2; may be repeated.", negative="")
]
Options = Annotated[
    list[str] | None,
    Parameter(name="--option", help="Another backend option, as strict=True; may be repeated.", negative=""),
]
Json = Annotated[bool, Parameter(name="--json", help="Print JSON for programs.", negative="")]
