"""One call whose operands lie anywhere: made local by the passes that place and lower, run on all ranks and on one.

Every operand is handed on by a `clone` that is placed by force, whole or split over one factor of one of its dims. The
call runs whole, or over any factor that its rule allows. What stands between is for insert-reshards and lower.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.fx as fx
from rule_calls import Call, Spec
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import spcompile.check.attention_specs  # noqa: F401  (the simulator learns where a rank's elements are)
from spcompile.check.simulate import Simulator
from spcompile.diagnostics import Remarks
from spcompile.graph.reshard import Place
from spcompile.machine.mesh import MeshShape
from spcompile.options import Options
from spcompile.passes.placement.insert_reshards import InsertReshards
from spcompile.passes.placement.lower import LowerToLocal
from spcompile.passes_api import Context
from spcompile.sharding.index_spaces import IndexSpaces, find_index_spaces
from spcompile.sharding.layout import annotate
from spcompile.sharding.propagate import Choice, choice_at, propagate
from spcompile.sharding.spaces import leaves

aten = torch.ops.aten


class Way(NamedTuple):
    """Where the operands lie (None: whole), and over which factor the call runs (None: whole)."""

    operands: tuple[Place | None, ...]
    choice: Choice | None

    def __str__(self) -> str:
        operands = ", ".join("whole" if place is None else str(place) for place in self.operands)
        return f"operands {operands}; runs " + ("whole" if self.choice is None else f"over {self.choice}")


def is_differentiable(spec: Spec) -> bool:
    return spec.gradient and (spec.dtype.is_floating_point or spec.dtype.is_complex)


class PlacedCall:
    """A call of an op, its operands made from a seed."""

    def __init__(self, call: Call, seed: int) -> None:
        self.call, self.specs = call, list[Spec]()
        generator = torch.Generator().manual_seed(seed)
        self._visit((call.args, call.kwargs), self.specs.append)
        self.inputs = [spec.make(generator).requires_grad_(is_differentiable(spec)) for spec in self.specs]

    def _visit(self, arg: Any, change: Any) -> Any:
        if isinstance(arg, tuple | list):
            return type(arg)(self._visit(a, change) for a in arg)
        if isinstance(arg, dict):
            return {k: self._visit(v, change) for k, v in arg.items()}
        return change(arg) if isinstance(arg, Spec) else arg

    def graph(self) -> fx.GraphModule:
        """The GLOBAL graph: placeholders, a clone of each, the call, and its results."""
        graph, mode = fx.Graph(), FakeTensorMode(shape_env=ShapeEnv())

        def computed(op: Any, *args: Any, **kwargs: Any) -> fx.Node:
            node = graph.call_function(op, args, kwargs)
            values = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
            with mode:
                node.meta["val"] = op(*values[0], **values[1])
            return node

        given = []
        for number, x in enumerate(self.inputs):
            given.append(graph.placeholder(f"x{number}"))
            given[-1].meta |= {"val": mode.from_tensor(x, static_shapes=True), "trainable": x.requires_grad}
        handed_on = iter([computed(aten.clone.default, node) for node in given])
        args, kwargs = self._visit((self.call.args, self.call.kwargs), lambda _: next(handed_on))
        node = computed(self.call.op, *args, **kwargs)
        values = node.meta["val"]
        if isinstance(values, Tensor):
            graph.output((node,))
        else:
            graph.output(tuple(computed(operator.getitem, node, i) for i in range(len(values))))
        return fx.GraphModule({}, graph)

    def ways(self, order: str) -> list[Way]:
        """All of them that may be, where ranks have elements in this order."""
        gm = self.graph()
        spaces = find_index_spaces(gm.graph, moving=True, zigzag=order == "zigzag")
        clones, node = self._calls(gm.graph)
        places = [[None, *_places(spaces.values[clone][0])] for clone in clones]
        choices = {choice_at(dims, spaces.calls[node], place) for dims, place in _slots(spaces, node)}
        runs = [None, *sorted(choices - {None}, key=str)]
        return [Way(operands, choice) for choice in runs for operands in itertools.product(*places)]

    def _calls(self, graph: fx.Graph) -> tuple[list[fx.Node], fx.Node]:
        calls = [n for n in graph.nodes if n.op == "call_function"]
        return calls[: len(self.specs)], calls[len(self.specs)]

    def local(self, way: Way, degree: int, order: str) -> fx.GraphModule:
        """One rank's graph."""
        gm = self.graph()
        spaces = find_index_spaces(gm.graph, moving=True, zigzag=order == "zigzag")
        clones, node = self._calls(gm.graph)
        placed = {c: place for c, place in zip(clones, way.operands, strict=True) if place is not None}
        seeds = {} if way.choice is None else {node: way.choice}
        for clone, place in placed.items():
            choice = choice_at(spaces.calls[clone].rule.results[0], spaces.calls[clone], place)
            assert choice is not None
            seeds[clone] = choice
        found = propagate(spaces, seeds)
        for other in [n for n in (*clones, node) if n not in seeds]:
            found.choices.pop(other, None)
            for key in [key for key in found.places if key[0] is other or (other is node and key[0] in node.users)]:
                del found.places[key]
        found.forced = set(seeds)
        annotate(gm.graph, "cp", spaces, found)
        ctx = Context(MeshShape.of({"cp": degree}), Options(), Remarks(), order)
        InsertReshards("cp").run(gm, ctx)
        LowerToLocal("cp").run(gm, ctx)
        gm.recompile()
        return gm

    def check(self, way: Way, degree: int, order: str) -> None:
        """Results and gradients on every rank are those of one device, in float64 to 1e-10.

        A gradient that is zero and one that does not exist are the same.
        """
        expected = self.run(self.graph(), 1)[0]
        for rank, found in enumerate(self.run(self.local(way, degree, order), degree)):
            for what, a, b in zip(self.names(len(expected)), found, expected, strict=True):
                assert a.dtype == b.dtype, f"{what} on rank {rank}: {a.dtype}, should be {b.dtype}"
                close = 1e-5 if b.dtype == torch.float32 else 1e-10
                text = f"{what} on rank {rank}; {way}"
                torch.testing.assert_close(a, b, rtol=close, atol=close, msg=lambda m, t=text: f"{t}: {m}")

    def names(self, count: int) -> list[str]:
        results = count - len(self.inputs)
        return [f"result {i}" for i in range(results)] + [f"gradient of operand {i}" for i in range(len(self.inputs))]

    def run(self, gm: fx.GraphModule, degree: int) -> list[list[Tensor]]:
        """Of every rank: the results, and the gradient of every operand."""
        given = [[x.detach().clone().requires_grad_(x.requires_grad) for x in self.inputs] for _ in range(degree)]
        results = Simulator(MeshShape.of({"cp": degree})).run(gm, given)
        trained = [y for of_rank in results for y in of_rank if y.requires_grad]
        if trained:
            generator = torch.Generator().manual_seed(5)
            upstream = [torch.rand(y.shape, dtype=torch.float64, generator=generator) for y in results[0]]
            torch.autograd.backward(
                trained,
                [
                    u.to(y.dtype)
                    for of_rank in results
                    for u, y in zip(upstream, of_rank, strict=True)
                    if y.requires_grad
                ],
            )
        return [
            [
                *(y.detach() for y in of_rank),
                *(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves_of_rank),
            ]
            for of_rank, leaves_of_rank in zip(results, given, strict=True)
        ]


def _places(dims: Sequence[Sequence[Any]]) -> list[Place]:
    return [Place(d, p) for d, dim in enumerate(dims) for p, _ in enumerate(leaves(list(dim)))]


def _slots(spaces: IndexSpaces, node: fx.Node) -> list[tuple[tuple[tuple[str, ...], ...], Place]]:
    """Every operand and result dim of a call, with the rule's dims that it is in."""
    call = spaces.calls[node]
    return [
        (dims, Place(d, part))
        for dims in (*call.rule.operands, *call.rule.results)
        for d, factors in enumerate(dims)
        for part in range(sum(len(call.leaves_of(f)) for f in factors))
    ]
