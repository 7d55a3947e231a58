"""Which numbers of a program depend on how many rows there are.

Over dp a rank traces the model on its own rows, and Dynamo writes `x.shape[0]` as a number like any other. So the graph
is asked for again with a symbol in its place; what is computed from that symbol is noted, then it is a number again.
The program that is compiled has fixed sizes; what counts rows in it is known, and can count those of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import torch
import torch.fx as fx

from spcompile.capture import OTHER_SIZES, ROW_SYMBOL, capture, is_state
from spcompile.graph import argument, copy_graph, operand, replace
from spcompile.local_inputs import on_local_parts, over_local_parts
from spcompile.row_counts import COUNTS, ROW_DIMS, Count
from spcompile.rules.calls import overloads
from spcompile.rules.views import RESHAPES
from spcompile.torch_private import TracingContext, trace_again

Backend = Callable[[fx.GraphModule, Sequence[Any]], Any]

_MARK = "_dynamo_weak_dynamic_indices"  # what torch._dynamo.maybe_mark_dynamic sets
_MARKS = (_MARK, "_has_dynamo_dim_marking")
_RESHAPED = frozenset(overloads(RESHAPES))
_RANGES = frozenset(overloads("arange linspace logspace"))
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


def over_known_rows(backend: Backend, degree: int) -> Backend:
    """A Dynamo backend on graphs in which it is known what counts rows, if `degree`, the ranks of dp, is above 1.

    Graphs that have symbols for anything else than the first dims of the user's tensors are left as they are.
    """
    if degree == 1:
        return backend

    def compile_with_numbers(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        _ask_for_symbols(gm, inputs)
        tensors = [i for i, x in enumerate(inputs) if not isinstance(x, _SYMBOLIC)]
        if len(tensors) == len(inputs) or not _only_rows_are_symbols(gm):
            return backend(gm, inputs)
        run = backend(*_with_numbers(*over_local_parts(gm, inputs), degree))
        if run is None:
            return None
        run = on_local_parts(run, [inputs[i] for i in tensors])
        return lambda *args: run(*[args[i] for i in tensors])

    return compile_with_numbers


def _users_tensors(gm: fx.GraphModule, inputs: Sequence[Any]) -> Iterator[tuple[fx.Node, torch.Tensor]]:
    for node, x in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True):
        if type(x) is torch.Tensor and x.ndim and not is_state(node):
            yield node, x


def _ask_for_symbols(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Let Dynamo trace once more, with a symbol for the first dim of each of the user's tensors.

    A dim of size 1 has no symbol in Dynamo. Where the model asks for numbers, there are none the second time either.
    """
    tensors = [x for _, x in _users_tensors(gm, inputs)]
    asked = [x for x in tensors if hasattr(x, _MARK) and getattr(x, _MARK) == {0}]
    if asked:
        for x, mark in product(asked, _MARKS):
            if hasattr(x, mark):
                delattr(x, mark)
        return
    if any(isinstance(x, _SYMBOLIC) for x in inputs) or TracingContext.try_get() is None:
        return
    wanted = [x for x in tensors if x.shape[0] > 1 and not any(hasattr(x, mark) for mark in _MARKS)]
    for x in wanted:
        torch._dynamo.maybe_mark_dynamic(x, 0)
    if wanted:
        trace_again("numbers that count rows")


def _only_rows_are_symbols(gm: fx.GraphModule) -> bool:
    first, others = set[Any](), set[Any]()
    for node in gm.graph.find_nodes(op="placeholder"):
        value = node.meta.get("example_value")
        if isinstance(value, torch.Tensor):
            of_user = not is_state(node)
            for dim, size in enumerate(value.shape):
                (first if dim == 0 and of_user else others).update(_symbols(size))
    return bool(first) and first.isdisjoint(others)


def _with_numbers(gm: fx.GraphModule, inputs: Sequence[Any], degree: int) -> tuple[fx.GraphModule, list[Any]]:
    """The captured graph with numbers for its symbols, and what it reads: the inputs that are no symbols."""
    fakes = [_fixed(node, x) for node, x in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True)]
    fakes = [x for x in fakes if not isinstance(x, _SYMBOLIC)]
    reads_others = _reads_other_sizes(gm)
    try:
        captured = capture(gm, inputs)
    except Exception:  # not everything that runs on numbers runs on symbols: nothing is known of such a graph
        captured = fx.GraphModule(gm, copy_graph(gm.graph))
        _put_numbers(captured, note=False, degree=degree)
    else:
        _put_numbers(captured, note=True, degree=degree)
        for node in captured.graph.find_nodes(op="placeholder"):
            node.meta[OTHER_SIZES] = reads_others
    for x in inputs:
        if isinstance(x, _SYMBOLIC):
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


def _fixed(node: fx.Node, x: Any) -> Any:
    """An input whose rows have a symbol, as a fake of fixed shape: else tracing would give it the symbol again."""
    value = node.meta.get("example_value")
    if not isinstance(value, torch.Tensor) or not any(map(_symbols, value.shape)):
        return x
    mode = TracingContext.get().fake_mode
    assert mode is not None
    with mode:
        shape, stride = [_number(n) for n in value.shape], [_number(n) for n in value.stride()]
        fake = torch.empty_strided(shape, stride, dtype=x.dtype, device=x.device)
    return fake.requires_grad_(x.requires_grad)


def _put_numbers(gm: fx.GraphModule, *, note: bool, degree: int) -> None:
    """Replace every symbolic value by its number; note which arguments of other calls count rows, and which dims."""
    symbolic: dict[fx.Node, Any] = {}
    hints: dict[Any, int] = {}
    for node in list(gm.graph.nodes):
        value = node.meta.get("val", node.meta.get("example_value"))
        if isinstance(value, _SYMBOLIC):
            symbolic[node] = value
            continue
        if note:
            _note(node, value, symbolic, hints, degree)
        numbers = {n: _number(symbolic[n]) for n in node.all_input_nodes if n in symbolic}
        if numbers:
            node.args, node.kwargs = _mapped((node.args, node.kwargs), numbers)
    for node in reversed(symbolic):
        gm.graph.erase_node(node)
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.slice.Tensor):
        if _is_whole(node):  # of a dim that had a symbol, where one with a number would not have been cut
            replace(node, operand(node, 0))
    gm.recompile()


def _is_whole(cut: fx.Node) -> bool:
    before, after = operand(cut, 0).meta.get("val"), cut.meta.get("val")
    if before is None or after is None or argument(cut, 4, "step", 1) != 1:
        return False
    return list(map(_number, before.shape)) == list(map(_number, after.shape))


def _mapped(arguments: Any, numbers: dict[fx.Node, Any]) -> Any:
    return fx.node.map_arg(arguments, lambda n: numbers.get(n, n))


def _note(node: fx.Node, value: Any, symbolic: dict[fx.Node, Any], hints: dict[Any, int], degree: int) -> None:
    if node.op == "placeholder" and isinstance(value, torch.Tensor) and value.ndim:
        for symbol in _symbols(value.shape[0]):  # one at most
            node.meta[ROW_SYMBOL] = str(symbol)
            hints[symbol] = _number(value.shape[0])
    if node.op != "call_function":
        return
    custom: dict[str, Any] = {}
    counts = {place: _count(symbolic[n], hints, degree) for place, n in _values(node) if n in symbolic}
    if counts:
        custom[COUNTS] = counts
    if node.target in _RESHAPED and isinstance(value, torch.Tensor):
        source = {str(symbol) for size in node.all_input_nodes[0].meta["val"].shape for symbol in _symbols(size)}
        dims = {dim: tuple(map(str, _symbols(size))) for dim, size in enumerate(value.shape) if _symbols(size)}
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


def _count(value: Any, hints: dict[Any, int], degree: int) -> Count:
    expression = value.node.shape_env.simplify(value.node.expr)
    whole = expression.subs({symbol: degree * number for symbol, number in hints.items()})
    number = int(whole) if whole.is_Integer else float(whole)
    return tuple(sorted(map(str, expression.free_symbols))), _number(value), number


def _symbols(size: Any) -> set[Any]:
    if not isinstance(size, _SYMBOLIC):
        return set()
    return set(size.node.shape_env.simplify(size.node.expr).free_symbols)


def _number(size: Any) -> Any:
    return size.node.hint if isinstance(size, _SYMBOLIC) else size
