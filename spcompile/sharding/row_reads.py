"""Where a model reads how many rows its batch has, and goes on with a plain number.

A symbol for the rows is followed through the graph (`row_symbols`). But `math.log(x.shape[0])`, a key of a dict or a
number of iterations needs a plain number, and `if x.shape[0] > 4` one path of two: then the graph holds what one rank's
rows led to, and nothing in it says so. The shape environment knows what was asked of the symbols, and where. Operations
ask as well, as whether a size of 1 is broadcast; what they compute does not depend on the answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import sympy
import torch
import torch.fx as fx

from spcompile.capture.capture import ROWS_READ
from spcompile.diagnostics import BatchNotSplit, SourceLine
from spcompile.sharding.propagate import Placements

_CODE = ("/torch/_dynamo/variables/", "/torch/_dynamo/symbolic_convert.py")  # the model's own code
_CALLS = "/torch/_dynamo/utils.py"  # what it calls: operations, and functions of numbers
_LOCATION = re.compile(r"(?P<text>.*)  # .*?(?P<file>[^/]+):(?P<line>\d+) in (?P<function>.*)")  # torch cuts the path
_OWN_CALL = ("trace.py", "_entry")  # where explain and verify call a model

Numbers = dict[Any, int]  # symbols -> their values


def note_reads(gm: fx.GraphModule, asked: Sequence[fx.Node], degree: int) -> None:
    """Note at each input that was given a symbol for its rows what all ranks' rows would have decided otherwise.

    gm: a Dynamo graph. asked: of its placeholders.
    """
    if not asked:
        return
    environment = asked[0].meta["example_value"].fake_mode.shape_env
    rows = {node: _symbol_of_rows(node, environment) for node in asked}
    own = _numbers(gm) | {symbol: _number(n.meta["example_value"].shape[0]) for n, symbol in rows.items() if symbol}
    of_functions = any(getattr(n.target, "__module__", None) == "math" for n in gm.graph.nodes)
    for guard in environment.guards:
        asks = str(getattr(guard.sloc.framework_loc, "filename", ""))
        if not any(place in asks for place in _CODE) and not (of_functions and _CALLS in asks):
            continue
        whole = {symbol: degree * number if symbol in rows.values() else number for symbol, number in own.items()}
        if guard.expr.subs(own) != sympy.true or guard.expr.subs(whole) != sympy.false:
            continue
        for node, symbol in rows.items():
            if symbol in guard.expr.free_symbols:
                found = f"the program is another one for {whole[symbol]} rows than for this rank's {own[symbol]}"
                node.meta.setdefault(ROWS_READ, (found, _line_of(guard.sloc.maybe_user_loc)))


def require_unread_rows(graph: fx.Graph, placements: Placements) -> None:
    """Refuse a program that depends on how many rows one rank has.

    Raises:
        BatchNotSplit: an input with rows whose number decided what the program is.
    """
    for node in graph.find_nodes(op="placeholder"):
        place = placements.places.get((node, 0))
        if place is not None and place.dim == 0 and ROWS_READ in node.meta:
            found, where = node.meta[ROWS_READ]
            legal = "numbers computed from x.shape[0] with + - * / ** min max, tensors of them, or DDP over dp"
            raise BatchNotSplit(found, where=where, legal=legal)


def _symbol_of_rows(placeholder: fx.Node, environment: Any) -> Any:
    """The symbol that the first dim had, also where it is a number by now; None where it never had one."""
    source = getattr(placeholder.meta.get("grapharg"), "source", None)
    for symbol, sources in environment.var_to_sources.items():
        if any(getattr(s, "base", None) == source and getattr(s, "idx", None) == 0 for s in sources):
            return symbol
    return None


def _numbers(gm: fx.GraphModule) -> Numbers:
    """The symbols that are sizes of inputs."""
    found: Numbers = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        value = node.meta.get("example_value")
        for size in value.shape if isinstance(value, torch.Tensor) else ():
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                found[size.node.expr] = size.node.hint
    return found


def _number(size: Any) -> int:
    return size.node.hint if isinstance(size, torch.SymInt) else int(size)


def _line_of(location: str | None) -> SourceLine | str | None:
    """None where Dynamo could not read the model's own line, and the one that it has is this package's call of it."""
    found = _LOCATION.fullmatch(location or "")
    if found is not None and (found["file"], found["function"]) == _OWN_CALL:
        return None
    return SourceLine(found["file"], int(found["line"]), found["function"], found["text"]) if found else location
