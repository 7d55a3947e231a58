"""Which numbers of a program depend on how many rows there are.

Over dp a rank traces the model on its own rows, and Dynamo writes `x.shape[0]` as a number like any other. So the graph
is asked for again with a symbol in its place; what is computed from that symbol is noted, then it is a number again.
The program that is compiled has fixed sizes; what counts rows in it is known, and can count those of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any, NoReturn

import sympy
import torch
import torch.fx as fx

from spcompile.capture.capture import OTHER_SIZES, ROW_SYMBOL, ROWS_READ, capture, graph_break_of, is_state
from spcompile.capture.local_inputs import on_local_parts, over_local_parts
from spcompile.graph.edit import argument, copy_graph, operand, replace
from spcompile.sharding.one_row import OWN, with_rows
from spcompile.sharding.row_blocks import write_blocks_of_one_row
from spcompile.sharding.row_counts import COUNTS, ROW_DIMS, Count
from spcompile.sharding.row_reads import note_reads
from spcompile.sharding.rules.calls import overloads
from spcompile.sharding.rules.views import RESHAPES
from spcompile.torch_private import TracingContext, symbol_config, trace_again

aten = torch.ops.aten

Backend = Callable[[fx.GraphModule, Sequence[Any]], Any]
Hints = dict[Any, int]  # symbols of rows -> how many this rank has

_ASKED = "_spx_asked_for_symbols"
_FIRST, _LAST = "with symbols", "with numbers"  # what was asked for
_READ = "_spx_rows_read"  # what is known of it from a trace with symbols, for the last one
_MARKS = (
    _ASKED,
    _READ,
    "_dynamo_weak_dynamic_indices",
    "_has_dynamo_dim_marking",
)  # maybe_mark_dynamic sets the others
_RESHAPED = frozenset(overloads(RESHAPES))
_RANGES = frozenset(overloads("arange linspace logspace"))
_BEFORE: list[bool] = []  # torch's setting, while it is another one for a trace that was asked for
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


def over_known_rows(backend: Backend, degree: int) -> Backend:
    """A Dynamo backend on graphs in which it is known what counts rows, if `degree`, the ranks of dp, is above 1.

    Other symbols, as of a length that changes, stay.
    """
    if degree == 1:
        return backend

    def compile_with_numbers(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        if graph_break_of(gm) is not None:
            return backend(gm, inputs)  # which refuses it
        is_last = _ask_for_symbols(gm, inputs, degree)
        hints = _rows_of(gm)
        if not hints or is_last:
            return backend(gm, inputs)
        gm, inputs, given = _without_offsets(gm, inputs)
        kept = [i for i, x in enumerate(inputs) if not _counts_rows(x, hints)]
        try:
            known = _with_numbers(*over_local_parts(gm, inputs), hints, degree)
        except Exception:  # not everything that runs on numbers runs on symbols
            _trace_with_numbers(gm, inputs)
        run = backend(*known)
        if run is None:
            return None
        run, places = on_local_parts(run, [inputs[i] for i in kept]), [given[i] for i in kept]
        return lambda *args: run(*[args[i] for i in places])

    return compile_with_numbers


def _ask_for_symbols(gm: fx.GraphModule, inputs: Sequence[Any], degree: int) -> bool:
    """Let Dynamo trace once more, with a symbol for the first dim of each of the user's tensors.

    Dynamo has no symbols for sizes of 1, unless it is told not to rely on such sizes. Where the model asks for numbers,
    there are no symbols the second time either. Returns whether this trace is the last, whatever it has.
    """
    tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
    if _BEFORE:
        symbol_config.backed_size_oblivious = _BEFORE.pop()
    asked = [getattr(x, _ASKED) for x in tensors if hasattr(x, _ASKED)]
    placeholders = list(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True))
    note_reads(gm, [node for node, x in placeholders if getattr(x, _ASKED, None) == _FIRST], degree)
    for node, x in placeholders:
        if hasattr(x, _READ):
            node.meta[ROWS_READ] = getattr(x, _READ)
    for x, mark in product([x for x in tensors if hasattr(x, _ASKED)], _MARKS):
        if hasattr(x, mark):
            delattr(x, mark)
    if asked or TracingContext.try_get() is None:
        return _LAST in asked
    wanted = [
        (node.name, x)
        for node, x in placeholders
        if type(x) is torch.Tensor and x.ndim and not is_state(node) and not any(hasattr(x, mark) for mark in _MARKS)
        if isinstance(node.meta["example_value"].shape[0], int) and x.shape[0]
    ]
    single = {name for name, x in wanted if x.shape[0] == 1}
    rows = _that_may_have_more(gm, inputs) if single else set()
    for name, x in wanted:
        if name in rows or name not in single:
            torch._dynamo.maybe_mark_dynamic(x, 0)
            setattr(x, _ASKED, _FIRST)
    if any(hasattr(x, _ASKED) for x in tensors):
        if rows:
            _BEFORE.append(symbol_config.backed_size_oblivious)
            symbol_config.backed_size_oblivious = True
        trace_again("numbers that count rows")
    return False


def _trace_with_numbers(gm: fx.GraphModule, inputs: Sequence[Any]) -> NoReturn:
    """Let Dynamo trace a last time, as it would have without being asked."""
    for node, x in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True):
        if type(x) is torch.Tensor:
            setattr(x, _ASKED, _LAST)
            if ROWS_READ in node.meta:
                setattr(x, _READ, node.meta[ROWS_READ])
    trace_again("a graph without symbols for rows")


def _that_may_have_more(gm: fx.GraphModule, inputs: Sequence[Any]) -> set[str]:
    """The inputs with one row that may have several; others are broadcast, which a symbol would forbid."""
    try:
        captured = capture(*over_local_parts(gm, inputs))
        write_blocks_of_one_row(captured.graph)
        widened, _ = with_rows(captured.graph)
    except Exception:  # whatever it is, it comes again where it can be reported
        return set()
    return {node.name for node in widened.find_nodes(op="placeholder") if OWN in node.meta}


def _rows_of(gm: fx.GraphModule) -> Hints:
    """The symbols of rows, which are the first dim of some tensor of the user's and no other dim of any."""
    first: Hints = {}
    others = set[Any]()
    for node in gm.graph.find_nodes(op="placeholder"):
        value = node.meta.get("example_value")
        for dim, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            if dim == 0 and not is_state(node) and len(_symbols(size)) == 1:
                first[_symbols(size).pop()] = _number(size)
            else:
                others |= _symbols(size)
    return {symbol: rows for symbol, rows in first.items() if symbol not in others}


def _without_offsets(gm: fx.GraphModule, inputs: Sequence[Any]) -> tuple[fx.GraphModule, Sequence[Any], Sequence[int]]:
    """A graph without inputs for symbols that are no sizes and that nothing reads, and the places of those that stay.

    A view into a larger tensor brings the place of its first element with it, which differs between ranks.
    """
    placeholders, sizes = gm.graph.find_nodes(op="placeholder"), set[Any]()
    for node in placeholders:
        value = node.meta.get("example_value")
        sizes |= {symbol for n in (value.shape if isinstance(value, torch.Tensor) else ()) for symbol in _symbols(n)}
    is_read = [
        bool(node.users) or not _symbols(x) or not sizes.isdisjoint(_symbols(x))
        for node, x in zip(placeholders, inputs, strict=True)
    ]
    places = [place for place, read in enumerate(is_read) if read]
    if all(is_read):
        return gm, inputs, places
    result = fx.GraphModule(gm, copy_graph(gm.graph))
    for node, read in zip(result.graph.find_nodes(op="placeholder"), is_read, strict=True):
        if not read:
            result.graph.erase_node(node)
    return result, [inputs[i] for i in places], places


def _counts_rows(value: Any, hints: Hints) -> bool:
    """Whether a value is symbolic, and depends on the number of rows alone, or on nothing."""
    return isinstance(value, _SYMBOLIC) and _symbols(value) <= hints.keys()


def _with_numbers(
    gm: fx.GraphModule, inputs: Sequence[Any], hints: Hints, degree: int
) -> tuple[fx.GraphModule, list[Any]]:
    """The captured graph with numbers for the symbols of rows, and what it reads: inputs that are no such symbols."""
    given = list(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True))
    fakes = [_fixed(node, x, hints) for node, x in given if not _counts_rows(x, hints)]
    reads_others = _reads_other_sizes(gm)
    captured = capture(gm, inputs)
    _put_numbers(captured, hints, degree)
    for node in captured.graph.find_nodes(op="placeholder"):
        node.meta[OTHER_SIZES] = reads_others
    for x in inputs:
        if _counts_rows(x, hints):
            int(x)  # a guard: another number of rows is another program
    return captured, fakes


def _reads_other_sizes(gm: fx.GraphModule) -> bool:
    """Whether Dynamo met tensors that are no inputs of the graph: of `len(y)`, where nothing else is read of y."""
    context = TracingContext.get()
    met = {g.name for g in context.guards_context.dynamo_guards.inner if g.create_fn_name() == "TENSOR_MATCH"}
    grapharg = [node.meta.get("grapharg") for node in gm.graph.find_nodes(op="placeholder")]
    return not met <= {_name(arg.source) for arg in grapharg if arg is not None}


def _name(source: Any) -> str:
    """A source's name, which was a method before torch 2.12."""
    name = source.name
    return name() if callable(name) else name


def _fixed(node: fx.Node, x: Any, hints: Hints) -> Any:
    """An input whose rows have a symbol, as a fake with a number there: else tracing would give it the symbol again."""
    value = node.meta.get("example_value")
    if not isinstance(value, torch.Tensor) or not any(_symbols(n) & hints.keys() for n in value.shape):
        return x
    mode = TracingContext.get().fake_mode
    assert mode is not None
    with mode:
        shape, stride = ([_with_hints(n, hints) for n in sizes] for sizes in (value.shape, value.stride()))
        fake = torch.empty_strided(shape, stride, dtype=x.dtype, device=x.device)
    return fake.requires_grad_(x.requires_grad)


def _with_hints(size: Any, hints: Hints) -> Any:
    """A size with numbers for rows."""
    if _counts_rows(size, hints):
        return _number(size)
    if not _symbols(size) & hints.keys():
        return size
    environment = size.node.shape_env
    return environment.create_symintnode(environment.simplify(size.node.expr).subs(hints), hint=_number(size))


def _put_numbers(gm: fx.GraphModule, hints: Hints, degree: int) -> None:
    """Replace what counts rows by its number, and note where it was, and which dims are rows."""
    symbolic: dict[fx.Node, Any] = {}
    for node in list(gm.graph.nodes):
        value = node.meta.get("val", node.meta.get("example_value"))
        if isinstance(value, _SYMBOLIC):
            symbolic[node] = value
        else:
            _note(node, value, symbolic, hints, degree)
        numbers = {n: _number(symbolic[n]) for n in node.all_input_nodes if _counts_rows(symbolic.get(n), hints)}
        if numbers and not _counts_rows(value, hints):
            node.args, node.kwargs = _mapped((node.args, node.kwargs), numbers)
    for node in reversed(symbolic):
        if _counts_rows(symbolic[node], hints):
            gm.graph.erase_node(node)
    _remove_whole_slices(gm.graph)
    gm.recompile()


def _remove_whole_slices(graph: fx.Graph) -> None:
    """Of a dim that had a symbol there are cuts of all of it, where one with a number would not have been cut."""
    for node in graph.find_nodes(op="call_function", target=aten.slice.Tensor):
        if argument(node, 4, "step", 1) == 1 and _sizes(node) == _sizes(operand(node, 0)) is not None:
            replace(node, operand(node, 0))
    for node in graph.find_nodes(op="call_function", target=aten.slice_scatter.default):
        if argument(node, 5, "step", 1) == 1 and _sizes(node) == _sizes(operand(node, 1)) is not None:
            replace(node, operand(node, 1))


def _sizes(node: fx.Node) -> list[Any] | None:
    value = node.meta.get("val")
    return list(map(_number, value.shape)) if isinstance(value, torch.Tensor) else None


def _mapped(arguments: Any, numbers: dict[fx.Node, Any]) -> Any:
    return fx.node.map_arg(arguments, lambda n: numbers.get(n, n))


def _note(node: fx.Node, value: Any, symbolic: dict[fx.Node, Any], hints: Hints, degree: int) -> None:
    if node.op == "placeholder" and isinstance(value, torch.Tensor) and value.ndim:
        for symbol in _symbols(value.shape[0]) & hints.keys():  # one at most
            node.meta[ROW_SYMBOL] = str(symbol)
    if node.op != "call_function":
        return
    custom: dict[str, Any] = {}
    counts = {place: _count(symbolic[n], hints, degree) for place, n in _values(node) if n in symbolic}
    if any(count.symbols for count in counts.values()):
        custom[COUNTS] = {place: count for place, count in counts.items() if count.symbols}
    if node.target in _RESHAPED and isinstance(value, torch.Tensor):
        source = {n for size in node.all_input_nodes[0].meta["val"].shape for n in _row_names(size, hints)}
        dims = {dim: names for dim, size in enumerate(value.shape) if (names := _row_names(size, hints))}
        if source:
            custom[ROW_DIMS] = (tuple(map(_number, value.shape)), dims, tuple(sorted(source)))
    if custom:
        node.meta["custom"] = {**node.meta.get("custom", {}), **custom}


def _values(node: fx.Node) -> Iterator[tuple[int | str, fx.Node]]:
    """The arguments, by place or name, that do not say how large something is or where it is."""
    schema = getattr(node.target, "_schema", None)
    for place, described in enumerate(schema.arguments if schema is not None and node.target not in _RANGES else ()):
        given = node.args[place] if place < len(node.args) else node.kwargs.get(described.name)
        if isinstance(given, fx.Node) and not any(kind in str(described.type) for kind in ("int", "Int")):
            yield place if place < len(node.args) else described.name, given


def _count(value: Any, hints: Hints, degree: int) -> Count:
    expression = value.node.shape_env.simplify(value.node.expr)
    names = tuple(sorted(str(symbol) for symbol in expression.free_symbols & hints.keys()))
    whole = expression.subs({symbol: degree * number for symbol, number in hints.items()})
    if _counts_rows(value, hints):
        return Count(names, _number(value), int(whole) if whole.is_Integer else float(whole))
    times = sympy.simplify(whole / expression.subs(hints))
    return Count(names, None, None if not times.is_number else int(times) if times.is_Integer else float(times))


def _row_names(size: Any, hints: Hints) -> tuple[str, ...]:
    return tuple(sorted(map(str, _symbols(size) & hints.keys())))


def _symbols(size: Any) -> set[Any]:
    if not isinstance(size, _SYMBOLIC):
        return set()
    return set(size.node.shape_env.simplify(size.node.expr).free_symbols)


def _number(size: Any) -> Any:
    return size.node.hint if isinstance(size, _SYMBOLIC) else size
