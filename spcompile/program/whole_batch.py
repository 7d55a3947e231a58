"""Over dp a rank passes its own entries, and the program is that of the entries of all ranks.

Dynamo traces the model on one rank's entries. So its frame is traced once more, with `degree` times as many entries in
the inputs that have them: that graph is about the whole batch, as the graphs of other axes are about the whole
sequence. Numbers that the model computes from `x.shape[0]` count all entries, its branches are those of the plain
model, and one entry a rank is a dim like any other. On the placeholders stands what one rank passes; lowering starts
from that.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor
from torch._subclasses import FakeTensor

from spcompile.capture.frames import Frame, local_of, name_of, this_frame, traced_again
from spcompile.capture.retrace import OWN, fake_inputs
from spcompile.capture.specialised import numbers_where_specialised
from spcompile.diagnostics import BatchNotSplit, RanksDisagree, RanksMissing
from spcompile.graph.sizes import expression, hint
from spcompile.sharding.batch_entries import NotTheBatch, SharedByRanks
from spcompile.torch_private import RestartAnalysis, TracingContext

log = logging.getLogger(__name__)
Backend = Callable[[fx.GraphModule, Sequence[Any]], Any]
_MOST_TRACES = 32  # that look for the inputs with entries


def over_whole_batch(backend: Backend, degree: int) -> Backend:
    """A Dynamo backend on graphs of the entries of all `degree` ranks of dp.

    Sizes for which Dynamo has a symbol keep it, where all of the compiler can do with one; others are numbers from the
    start of another trace.
    """

    def compile_whole(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        refused: list[NotTheBatch] = []
        with numbers_where_specialised(inputs):
            if degree == 1:
                return backend(gm, inputs)
            for batch in _batches(degree):
                try:
                    return _on_batch(backend, gm, inputs, batch)
                except NotTheBatch as error:
                    refused.append(error)
            raise refused[0]

    return compile_whole


@dataclass(frozen=True)
class _Batch:
    """The dim that the entries are in, how many a rank has, a number or a symbol, and how many ranks there are.

    shared: names of the sources of inputs that have none, however long they are.
    """

    dim: int
    entries: Any
    degree: int
    shared: frozenset[str] = frozenset()

    def is_in(self, x: Tensor) -> bool:
        """Whether a tensor may have these entries."""
        return x.ndim > self.dim and x.shape[self.dim] == hint(self.entries)

    def whole(self, x: Tensor) -> Tensor:
        """An empty tensor as `x` but with all ranks' entries, its dims in the same order in memory."""
        shape, strides, step = list(x.shape), [0] * x.ndim, 1
        shape[self.dim] = shape[self.dim] * self.degree
        for dim in sorted(range(x.ndim), key=lambda dim: (hint(x.stride(dim)), -dim)):
            strides[dim] = step
            step = step * shape[dim]
        return x.detach().new_empty_strided(shape, strides).requires_grad_(x.requires_grad)

    @contextlib.contextmanager
    def a_number_where_no_symbol_will_do(self) -> Iterator[None]:
        """What fails with a symbol for the number of entries makes it a number: each number is another program."""
        try:
            yield
        except (NotTheBatch, RestartAnalysis, RanksDisagree, RanksMissing):
            raise
        except Exception as error:
            symbols = [s for x in filter(self.is_in, _users_tensors()) if _is_symbol(s := _own(x).shape[self.dim])]
            if symbols:
                log.info("SPR104 compiled for %d entries, since not for a symbol: %s", hint(self.entries), error)
            for symbol in symbols:
                int(symbol)  # Dynamo traces again with what it has become
            raise


def _batches(degree: int) -> list[_Batch]:
    """What may be the batch: lengths of the user's tensors in their first dim, then in their second.

    A length of 1 comes last, since it is also broadcast: to tensors with entries it may be added in any number.
    """
    found: dict[tuple[int, int], _Batch] = {}
    for dim in (0, 1):
        for x in (x for x in _users_tensors() if x.ndim > dim and x.shape[dim]):
            found.setdefault((dim, x.shape[dim]), _Batch(dim, _own(x).shape[dim], degree))
    if not found:
        raise BatchNotSplit("no input of the model is a tensor with entries", legal="DDP over dp")
    return [found[key] for key in sorted(found, key=lambda key: (key[0], key[1] == 1))]


def _on_batch(backend: Backend, gm: fx.GraphModule, inputs: Sequence[Any], batch: _Batch) -> Any:
    """The program of these entries; once more, where inputs turn out to have none, without any in those."""
    try:
        with batch.a_number_where_no_symbol_will_do():
            return _on_whole(backend, gm, inputs, batch)
    except SharedByRanks as error:
        if error.names <= batch.shared:
            raise
        return _on_batch(backend, gm, inputs, replace(batch, shared=batch.shared | error.names))


def _on_whole(backend: Backend, gm: fx.GraphModule, inputs: Sequence[Any], batch: _Batch) -> Any:
    whole, given, places = _whole(gm, inputs, batch)
    run = backend(whole, given)
    return run and (lambda *args: run(*[args[i] for i in places]))


def _is_symbol(size: Any) -> bool:
    return isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None


def _users_tensors() -> dict[Tensor, Any]:
    """The tensors with dims among the arguments that Dynamo has met, with their sources; no state of modules."""
    found: dict[Tensor, Any] = {}
    for x, symbolic in TracingContext.get().tensor_to_context.items():
        source = symbolic.tensor_source
        kind = source.guard_source
        of_module = kind.is_unspecialized_nn_module() or kind.is_specialized_nn_module()
        is_base = name_of(source).endswith("._base")  # of a view, which is what the model reads
        is_tensor = type(x) in (Tensor, FakeTensor) and x.ndim  # a weight that is passed is a Parameter
        if is_tensor and not is_base and not of_module and local_of(source) is not None:
            found[x] = source
    return found


def _own(x: Tensor) -> Tensor:
    """As a fake with Dynamo's symbols."""
    return fake_inputs([x])[1][0]


def _whole(gm: fx.GraphModule, inputs: Sequence[Any], batch: _Batch) -> tuple[fx.GraphModule, list[Any], list[int]]:
    """The graph with all ranks' entries in all inputs that have as many as the batch, but those that cannot have more.

    Returns it with its inputs, and their places among the inputs of Dynamo's graph.

    Raises:
        NotTheBatch: there is none.
    """
    tensors, own = _users_tensors(), this_frame(gm)
    numbers = _numbers(own, inputs)
    candidates = [x for x in tensors if batch.is_in(x) and name_of(tensors[x]) not in batch.shared]
    failures: list[Exception] = []
    for chosen in itertools.islice(_most_first(candidates), _MOST_TRACES):
        try:
            frame = traced_again(*_instead(tensors, chosen, batch), numbers)
        except Exception as failure:
            failures.append(failure)
        else:
            given, places = _bound(own, frame, inputs, {name_of(tensors[x]) for x in chosen}, batch)
            _keep_guards(frame, _sizes(tensors, chosen, batch) | numbers)
            return frame.gm, given, places
    names = ", ".join(name_of(tensors[x]) for x in candidates)
    more = hint(batch.entries) * batch.degree
    why = str(failures[0]).strip().splitlines()[0]
    text = f"the model does not run with {more} for {hint(batch.entries)} in dim {batch.dim} of {names}: {why}"
    raise NotTheBatch(text, legal="inputs with entries of the batch in their first dim, or DDP over dp") from failures[
        0
    ]


def _numbers(own: Frame, inputs: Sequence[Any]) -> dict[str, Any]:
    """The arguments that are whole numbers and that Dynamo has symbols for, since they change from call to call."""
    placeholders = own.gm.graph.find_nodes(op="placeholder")
    found = zip(placeholders, own.sources(), inputs, strict=True)
    is_size = {source: hasattr(node.meta["grapharg"].source, "prop") for node, source, _ in found}
    return {s: x for s, x in zip(is_size, inputs, strict=True) if isinstance(x, torch.SymInt) and not is_size[s]}


def _sizes(tensors: dict[Tensor, Any], chosen: Sequence[Tensor], batch: _Batch) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for x, source in tensors.items():
        own = _own(x)
        shape = batch.whole(own).shape if any(x is y for y in chosen) else own.shape
        found |= {f"{name_of(source)}.size()[{dim}]": size for dim, size in enumerate(shape)}
    return found


def _most_first(candidates: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """All of them, then all but one, and so on: an input as long as the batch by chance cannot have more entries."""
    for number in range(len(candidates), 0, -1):
        yield from itertools.combinations(candidates, number)


def _instead(
    tensors: dict[Tensor, Any], chosen: Sequence[Tensor], batch: _Batch
) -> tuple[dict[Tensor, Tensor], set[str]]:
    """What stands for tensors with entries, and for those with symbols, which Dynamo would not find by itself again."""
    found, arguments = {}, set()
    for x, source in tensors.items():
        symbols = [dim for dim, size in enumerate(_own(x).shape) if _is_symbol(size)]
        has_entries = any(x is y for y in chosen)
        if has_entries or symbols:
            found[x] = batch.whole(x) if has_entries else torch.empty_like(x.detach()).requires_grad_(x.requires_grad)
            for dim in symbols:
                torch._dynamo.maybe_mark_dynamic(found[x], dim)
            arguments.add(str(local_of(source)))
    return found, arguments


def _bound(
    own: Frame, whole: Frame, inputs: Sequence[Any], with_entries: set[str], batch: _Batch
) -> tuple[list[Any], list[int]]:
    """The inputs of the graph over all entries, and their places among those of the graph over one rank's.

    Raises:
        BatchNotSplit: the model reads something else with all entries than with one rank's, or returns it otherwise.
    """
    places = {source: place for place, source in enumerate(own.sources())}
    placeholders = dict(zip(places, own.gm.graph.find_nodes(op="placeholder"), strict=True))
    found: list[Any] = []
    outputs = [_shapes_of_outputs(frame.gm) for frame in (own, whole)]
    changing = {s for s, n in placeholders.items() if n.meta["grapharg"].pass_arg_as_tensor}  # floats
    lost = (changing | _numbers(own, inputs).keys()) - set(whole.sources())
    if lost or not whole.guards <= own.guards or len(outputs[0]) != len(outputs[1]):
        raise _another_program(sorted(lost | (whole.guards - own.guards)))
    for node, source in zip(whole.gm.graph.find_nodes(op="placeholder"), whole.sources(), strict=True):
        if source not in places:
            raise _another_program([source])
        given, example = inputs[places[source]], placeholders[source].meta["example_value"]
        node.meta["grapharg"] = placeholders[source].meta["grapharg"]  # what the caller passed, where that is read
        if source in with_entries:
            node.meta[OWN], given = example, batch.whole(example)
        elif source in {f"{name}.size()[{batch.dim}]" for name in with_entries}:
            node.meta[OWN], given = given, given * batch.degree
        found.append(given)
    (output,) = whole.gm.graph.find_nodes(op="output")
    output.meta[OWN] = outputs[0]
    return found, [places[source] for source in whole.sources()]


def _another_program(reads: list[str]) -> BatchNotSplit:
    found = f"with the entries of all ranks the model is another program, which reads {', '.join(reads)} otherwise"
    return BatchNotSplit(found, legal="a model that reads the same for every number of entries, or DDP over dp")


def _shapes_of_outputs(gm: fx.GraphModule) -> list[Any]:
    (output,) = gm.graph.find_nodes(op="output")
    values = [n.meta.get("example_value") if isinstance(n, fx.Node) else n for n in output.args[0]]
    return [tuple(x.shape) if isinstance(x, Tensor) else None for x in values]


def _keep_guards(whole: Frame, sizes: Mapping[str, Any]) -> None:
    """Let Dynamo check, of the sizes that it has symbols for, what the graph over all entries was traced for.

    sizes: of the user's tensors with all entries, by source.
    """
    fakes = [n.meta["example_value"] for n in whole.gm.graph.find_nodes(op="placeholder")]
    symbolic = next((x for x in fakes if isinstance(x, torch.SymInt)), None)
    mode = TracingContext.get().fake_mode
    if symbolic is None or mode is None or mode.shape_env is None:
        return
    environment = symbolic.node.shape_env
    names = {symbol: map(name_of, sources) for symbol, sources in environment.var_to_sources.items()}
    values = {s: next((expression(sizes[n]) for n in given if n in sizes), None) for s, given in names.items()}
    for expr in {guard.expr for guard in environment.guards}:
        if any(values.get(symbol) is None for symbol in expr.free_symbols):
            raise _another_program([str(expr)])
        mode.shape_env.evaluate_expr(expr.xreplace(values))
