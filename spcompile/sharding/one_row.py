"""One row of the batch a rank: a dim of size 1 has no factor, so the batch gets a size that can be followed.

A graph that was captured on one row is computed again, on shapes only, with several rows in the inputs. Every value
must stay what it was, but for one dim that is `rows` times as long: that one is the batch. Sizes among the arguments
follow; a value that comes from no input of the user is repeated where an op needs all operands to be equally long.
Lowering gives each rank its one row back, so what a rank computes on it never changes: what is found here decides only
over which dims sums go on over the ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.fx as fx

from spcompile.diagnostics import BatchNotSplit, source_of
from spcompile.graph.edit import call, copy_graph, operand
from spcompile.graph.sizes import Size, hint, same
from spcompile.sharding.row_places import NoPlace, Rows, before_in, reshaped
from spcompile.sharding.rules import rule_of
from spcompile.sharding.rules.base import tensor_operands, tensor_results
from spcompile.sharding.rules.calls import overloads
from spcompile.sharding.rules.views import EXPANDS, RESHAPES

aten = torch.ops.aten

OWN = "own"  # meta of a placeholder: its example value on one rank
_RESHAPES = frozenset(overloads(RESHAPES))
_EXPANDS = frozenset(overloads(EXPANDS))
_FAKE_LOG = logging.getLogger("torch._subclasses.fake_tensor")
_TWO_ROWS = "two rows or more on every rank of dp, or DDP over dp"


def with_rows(graph: fx.Graph) -> tuple[fx.Graph, int]:
    """A copy of a graph over one row with several rows in it, and how many: a prime that divides no other size.

    Rows are in all of the user's inputs whose first dim is 1, but those of which an op takes no more than one.

    Raises:
        BatchNotSplit: no such copy: the op in the way is named.
    """
    inputs = [n.name for n in graph.find_nodes(op="placeholder") if _may_have_rows(n)]
    if not inputs:
        found = "attention is over no rows of an input, and no input has a first dim of 1, this rank's row"
        raise BatchNotSplit(found, legal="attention on the rows as they are passed in, or DDP over dp")
    rows = _free_prime(graph)
    attempt = first = _Widen(graph, inputs, rows)
    while attempt.refused is not None:
        if not attempt.impossible:
            raise attempt.refused
        fewer = [_Widen(graph, [n for n in attempt.inputs if n != name], rows) for name in attempt.inputs]
        furthest = max(fewer, key=lambda found: found.followed)
        if furthest.followed <= attempt.followed or not furthest.inputs:
            assert first.refused is not None
            raise first.refused
        attempt = furthest
    return attempt.graph, rows


def is_users(placeholder: fx.Node) -> bool:
    """Whether a placeholder is what the user passes in: no buffer, and nothing that needs a gradient."""
    return not placeholder.meta.get("state") and not placeholder.meta.get("trainable")


def _may_have_rows(placeholder: fx.Node) -> bool:
    values = tensor_results(placeholder)
    return bool(is_users(placeholder) and values and values[0].ndim and same(values[0].shape[0], 1))


def _free_prime(graph: fx.Graph) -> int:
    sizes = {size for n in graph.nodes for value in tensor_results(n) for size in value.shape if isinstance(size, int)}
    candidate = 2
    while any(candidate % n == 0 for n in range(2, candidate)) or any(s and s % candidate == 0 for s in sizes):
        candidate += 1
    return candidate


class _Widen:
    """Example values and sizes of a copy of `graph`, node by node, with `rows` in the placeholders `inputs`."""

    def __init__(self, graph: fx.Graph, inputs: Sequence[str], rows: int) -> None:
        self.graph, self.inputs, self.rows = copy_graph(graph), inputs, rows
        self.before: dict[fx.Node, list[Sequence[Size]]] = {}  # shapes with one row, of values that have several now
        self.guesses: set[fx.Node] = set()  # reshapes of which sizes do not tell where they leave the rows
        self.inside: dict[fx.Node, Rows] = {}  # of values that have their rows in a dim that holds more
        self.of_inputs: set[fx.Node] = set()  # values that depend on what the user passed
        self.followed = 0  # nodes before the one that is refused
        self.refused: BatchNotSplit | None = None
        self.impossible = False  # the op itself refused: one device could not run it on several rows either
        try:
            for node in list(self.graph.nodes):
                if node.op == "placeholder":
                    self.placeholder(node)
                elif node.op == "call_function":
                    self.follow(node)
                self.followed += 1
        except BatchNotSplit as error:
            self.refused = error

    def placeholder(self, node: fx.Node) -> None:
        if is_users(node):
            self.of_inputs.add(node)
        if node.name in self.inputs:
            value = node.meta["val"]
            self.before[node] = [tuple(value.shape)]
            node.meta[OWN] = value
            with value.fake_mode:
                node.meta["val"] = value.new_empty((self.rows, *value.shape[1:]))

    def follow(self, node: fx.Node) -> None:
        if not self.of_inputs.isdisjoint(node.all_input_nodes) and not _reads_shapes_only(node):
            self.of_inputs.add(node)
        if self.before.keys().isdisjoint(node.all_input_nodes):
            return
        shapes = [tuple(value.shape) for value in tensor_results(node)]
        if not shapes:
            if not same(evaluate(node), node.meta["val"]):
                raise self.refusal(node, "another number with several rows")
            return
        if node.target in _RESHAPES | _EXPANDS:
            self.resize(node, shapes[0])
        if node.target is aten.index.Tensor:
            self.number_rows(node)
        if node.target in (torch.ops.spx.attention.default, aten.slice_scatter.default, aten.select_scatter.default):
            self.repeat_constants(node)  # these do not refuse operands of which one has a row and others have several
        try:
            value = evaluate(node)
        except Exception as first:
            self.repeat_constants(node)
            try:
                value = evaluate(node)
            except Exception:
                self.impossible = True
                raise self.refusal(node, str(first).splitlines()[0]) from first
        node.meta["val"] = value
        if len(tensor_results(node)) != len(shapes):
            raise self.refusal(
                node, f"{len(shapes)} results would become {len(tensor_results(node))} with {self.rows} rows"
            )
        dims = [self.dim_of(node, a, tuple(b.shape)) for a, b in zip(shapes, tensor_results(node), strict=True)]
        if any(dim is not None for dim in dims):
            self.before[node] = list(shapes)
        elif any(self.inside[n].guessed for n in node.all_input_nodes if n in self.inside):
            raise self.refusal(node, "the rows go, but sizes do not tell which of two dims held them")
        for shape, dim in zip(shapes, dims, strict=True):
            if dim is not None and not same(shape[dim], 1):
                self.inside[node] = self.place_in(node, shape, dim)
        if isinstance(value, torch.Tensor):
            node.meta["val"] = _with_symbols(value, shapes[0], dims[0], self.rows)

    def dim_of(self, node: fx.Node, old: Sequence[Size], new: Sequence[Size]) -> int | None:
        """The dim that is `rows` times as long as it was; None if there is none. Only reshapes give it more to hold."""
        changed = [i for i, (a, b) in enumerate(zip(old, new, strict=False)) if not _alike(a, b)]
        if len(old) != len(new) or len(changed) > 1 or any(not _alike(new[i], old[i] * self.rows) for i in changed):
            raise self.refusal(node, f"{_text(old)} would become {_text(new)} with {self.rows} rows")
        if not changed:
            return None
        (dim,) = changed
        is_new = node.target not in _RESHAPES and not same(old[dim], 1)
        if is_new and not any(self.has_dim(read, old[dim]) for read in node.all_input_nodes):
            raise self.refusal(node, f"dim {dim} of {_text(old)} would hold the batch and something else")
        return dim

    def place_in(self, node: fx.Node, shape: Sequence[Size], dim: int) -> Rows:
        """Where in a dim that holds more a result has its rows: where a reshape leaves them, or as in the operands.

        Raises:
            BatchNotSplit: not in that dim, or at different places in two operands.
        """
        if node.target in _RESHAPES:
            source = operand(node, 0)
            rows = self.rows_of(source)
            if rows is None:
                raise self.refusal(node, "the batch comes from nowhere")
            try:
                before = before_in(rows.place(self.before[source][0]), shape, dim)
            except NoPlace as error:
                raise self.refusal(node, str(error)) from error
            return Rows(dim, before, rows.guessed or node in self.guesses)
        found = [self.inside.get(n, Rows(dim)) for n in node.all_input_nodes if self.has_dim(n, shape[dim])]
        if any(not same(rows.before, found[0].before) for rows in found):
            raise self.refusal(node, "its operands have the batch at different places of a dim that holds more")
        return Rows(dim, found[0].before, any(rows.guessed for rows in found))

    def rows_of(self, value: fx.Node) -> Rows | None:
        """Where a value with one result has its rows."""
        if value not in self.before:
            return None
        dim = self.dim_of(value, self.before[value][0], tuple(value.meta["val"].shape))
        return None if dim is None else self.inside.get(value, Rows(dim))

    def has_dim(self, value: fx.Node, size: Size) -> bool:
        """Whether a value, or a result of it, has its rows in a dim that was `size` long."""
        pairs = zip(self.before.get(value, []), tensor_results(value), strict=False)
        return any(same(a, size) and not same(a, b) for old, new in pairs for a, b in zip(old, new.shape, strict=True))

    def resize(self, node: fx.Node, shape: Sequence[Size]) -> None:
        """Give a reshape or expand the sizes that it has with several rows. `shape`: its result with one."""
        source, rows = operand(node, 0), self.rows_of(operand(node, 0))
        position = next((i for i, arg in enumerate(node.args) if i and isinstance(arg, (list, tuple))), None)
        if rows is None or position is None or node.target in (aten.squeeze.dims,):
            return
        sizes = list(node.args[position])  # type: ignore[arg-type]
        if node.target in _EXPANDS:
            index, size = rows.dim + len(sizes) - source.meta["val"].ndim, -1
        else:
            first = len(shape) - len(sizes) if node.target is not aten.unflatten.int else int(node.args[1]) % len(shape)  # type: ignore[arg-type]
            index = self.reshaped(node, rows, shape, [None] * first + sizes) - first
            size = self.rows if same(shape[first + index], 1) else -1
        if not 0 <= index < len(sizes):
            return
        if size == -1 and node.target not in _EXPANDS:  # one size is inferred, the others are what they were
            sizes = [shape[first + i] if isinstance(s, int) and s == -1 else s for i, s in enumerate(sizes)]
            if any(isinstance(s, torch.SymInt) for i, s in enumerate(sizes) if i != index):
                raise self.refusal(node, "two of its sizes are inferred")
        sizes[index] = size
        node.args = (*node.args[:position], sizes, *node.args[position + 1 :])

    def reshaped(self, node: fx.Node, rows: Rows, shape: Sequence[Size], written: Sequence[Any]) -> int:
        """The dim of a reshape's result that gets the rows of its operand."""
        try:
            found = reshaped(rows, self.before[operand(node, 0)][0], shape, written)
        except NoPlace as error:
            raise self.refusal(node, str(error)) from error
        if found.guessed and not same(shape[found.dim], 1):
            self.guesses.add(node)
        return found.dim

    def number_rows(self, node: fx.Node) -> None:
        """Let the arange(1) of `x[arange(B), last]` number all rows, where it reads in the dim that has them."""
        x, indices = operand(node, 0), list(node.args[1])  # type: ignore[arg-type]
        rows = self.rows_of(x)
        index: Any = indices[rows.dim] if rows is not None and rows.dim < len(indices) else None
        if rows is None or index is None or index.target is not aten.arange.default or not same(rows.before, 1):
            return
        new = call(self.graph, aten.arange.default, (self.rows,), dict(index.kwargs), like=index)
        self.before[new] = [tuple(index.meta["val"].shape)]
        indices[rows.dim] = new
        node.args = (x, indices, *node.args[2:])

    def repeat_constants(self, node: fx.Node) -> None:
        """Repeat the operands that no input reaches, in the dim in which another operand has the rows."""
        found = {n: self.rows_of(n) for n in tensor_operands(node) if n in self.before}
        dims = {(rows.dim if rows else None, n.meta["val"].ndim) for n, rows in found.items()}

        def repeated(value: fx.Node) -> fx.Node:
            example = value.meta.get("val")
            if value in self.of_inputs or not isinstance(example, torch.Tensor) or len(dims) != 1:
                return value
            ((dim, ndim),) = dims
            if dim is None or example.ndim != ndim or not same(example.shape[dim], 1):
                return value
            sizes = [self.rows if i == dim else -1 for i in range(ndim)]
            new = call(self.graph, aten.expand.default, (value, sizes), like=node)
            self.before[new] = [tuple(example.shape)]
            return new

        node.args = fx.node.map_arg(node.args, repeated)
        node.kwargs = fx.node.map_arg(node.kwargs, repeated)

    def refusal(self, node: fx.Node, text: str) -> BatchNotSplit:
        return BatchNotSplit(f"one row on this rank, and {node.target}: {text}", where=source_of(node), legal=_TWO_ROWS)


def _reads_shapes_only(node: fx.Node) -> bool:
    rule = rule_of(node)
    return rule is not None and len(rule.unread) == len(rule.operands)


def evaluate(node: fx.Node, instead: Mapping[fx.Node, torch.Tensor] | None = None) -> Any:
    """The result of a call on the example values of its operands, which are fakes, or on others `instead`.

    What is learnt about symbols on the way holds for no real size: it becomes no guard. A call that fails on such sizes
    is an answer, not an error for torch to log.
    """
    others = instead or {}
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: others.get(n, n.meta["val"]))
    example: Any = next(value for read in node.all_input_nodes for value in tensor_results(read))
    target: Any = node.target
    symbols = example.fake_mode.shape_env
    was_disabled, _FAKE_LOG.disabled = _FAKE_LOG.disabled, True
    try:
        with example.fake_mode, torch.no_grad(), symbols.suppress_guards() if symbols is not None else nullcontext():
            return target(*args, **kwargs)
    finally:
        _FAKE_LOG.disabled = was_disabled


def _alike(a: Size, b: Size) -> bool:
    """Equal, or equal for the sizes at hand: run on their own, some ops give a number where a graph has a symbol."""
    return same(a, b) or ((isinstance(a, torch.SymInt) or isinstance(b, torch.SymInt)) and hint(a) == hint(b))


def _with_symbols(value: torch.Tensor, old: Sequence[Size], dim: int | None, rows: int) -> torch.Tensor:
    """An example value with the sizes of the shape with one row, but for the rows."""
    shape = [size * rows if i == dim else size for i, size in enumerate(old)]
    if all(same(a, b) for a, b in zip(shape, value.shape, strict=True)):
        return value
    example: Any = value
    with example.fake_mode:
        return value.new_empty(shape)


def _text(shape: Sequence[Size]) -> str:
    return str(list(shape))
