"""Run a per-rank graph for all ranks of a mesh in one process, in lockstep, from the specs of its collectives.

Ordinary ops run once per rank. An spx collective runs as one autograd function over the tensors of all ranks of a
group, whose backward applies the spec of the registered dual: a wrong dual is a wrong gradient here. Functional c10d
collectives (graphs after AOTAutograd) give a poisoned buffer, NaN or the like, that `wait_tensor` fills; copies to the
host and back do so, too.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.fx as fx
from torch import Tensor

from spcompile.collectives import COLLECTIVES, call_arguments
from spcompile.collectives.host_copy import HOST_COPIES, WAIT_COPY
from spcompile.diagnostics import source_of
from spcompile.machine.mesh import MeshShape, axis_part

InFlight = Literal["poison", "late"]
Arguments = tuple[Any, ...]
ForwardSpec = Callable[[list[Arguments]], list[Any]]
BackwardSpec = Callable[[list[Arguments], list[Any], list[Any]], list[Sequence["Tensor | None"]]]
_SPECS: dict[torch._ops.OpOverload, tuple[ForwardSpec, BackwardSpec | None]] = {}
_c10d = torch.ops._c10d_functional
_STARTS = {
    _c10d.all_reduce.default,
    _c10d.all_gather_into_tensor.default,
    _c10d.reduce_scatter_tensor.default,
    _c10d.all_to_all_single.default,
}


def register_spec(op: torch._ops.OpOverload, forward: ForwardSpec, backward: BackwardSpec | None = None) -> None:
    """Teach the simulator an op with an argument `axis` that is no plain collective, such as ring attention.

    forward(calls) -> results: all arguments, in the order of the schema, per rank of a group; one result per rank.
    backward(calls, results, gradients) -> per rank, the gradients of the first arguments, None for those without.
        gradients: per rank, shaped as the results are; zeros where a result was not used.
    """
    if op in _SPECS or op in COLLECTIVES:
        raise ValueError(f"{op} has a spec already")
    _SPECS[op] = (forward, backward)


def simulate(gm: fx.GraphModule, rank_inputs: Sequence[Sequence[Any]], axis_degree: Mapping[str, int]) -> list[Any]:
    """All ranks' outputs of a per-rank graph. Ranks are row-major over `axis_degree`."""
    return Simulator(MeshShape(tuple(axis_degree.items()))).run(gm, rank_inputs)


class Simulator:
    """Runs graphs for all ranks of a mesh.

    in_flight: when a started functional collective reads its operand. "poison": at its start; "late": at its wait, so
        that an operand which is overwritten in flight gives a wrong result. In both its buffer is poison until then.
    """

    def __init__(self, mesh: MeshShape, in_flight: InFlight = "poison") -> None:
        self.mesh, self.in_flight = mesh, in_flight
        self._pending: dict[int, tuple[Tensor, Callable[[], list[Tensor]], int]] = {}

    def groups(self, axis: str) -> list[list[int]]:
        """The groups of ranks that differ in `axis`, or a part of one, only, each in the order of `axis`."""
        if (part := axis_part(axis)) is not None:
            return [group for ranks in self.groups(part.axis) for group in part.groups(ranks)]
        names = [name for name, _ in self.mesh.axes]
        if axis not in names:
            raise ValueError(f"axis {axis!r} is not in the mesh {self.mesh}")
        found: dict[tuple[int, ...], list[int]] = {}
        for rank, place in enumerate(itertools.product(*[range(size) for _, size in self.mesh.axes])):
            others = tuple(c for name, c in zip(names, place, strict=True) if name != axis)
            found.setdefault(others, []).append(rank)
        return list(found.values())

    def run(
        self,
        gm: fx.GraphModule,
        rank_inputs: Sequence[Sequence[Any]],
        observe: Callable[[fx.Node, list[Any]], None] | None = None,
    ) -> list[Any]:
        """All ranks' outputs. For gradients, call backward on all of them at once: torch.autograd.backward(outputs).

        rank_inputs: one sequence of inputs per rank.
        observe: is called with every node and its values on all ranks.
        """
        assert len(rank_inputs) == self.mesh.world_size, (len(rank_inputs), self.mesh)
        self._pending.clear()
        inputs = [iter(values) for values in rank_inputs]
        values: dict[fx.Node, list[Any]] = {}
        last_use = _last_uses(gm.graph)
        for node in gm.graph.nodes:
            if node.op == "output":
                break
            values[node] = self._values(gm, node, values, inputs)
            if observe is not None:
                observe(node, values[node])
            for dead in last_use.get(node, ()):
                del values[dead]
        if self._pending:
            raise RuntimeError(f"{len(self._pending)} started collectives were never waited for")
        return [_on_rank(node.args[0], values, rank) for rank in range(self.mesh.world_size)]

    def _values(
        self, gm: fx.GraphModule, node: fx.Node, values: Mapping[fx.Node, list[Any]], inputs: list[Any]
    ) -> list[Any]:
        ranks = range(self.mesh.world_size)
        if node.op == "placeholder":
            return [next(inputs[rank]) for rank in ranks]
        if node.op == "get_attr":
            return [_attribute(gm, node.target)] * len(ranks)
        calls = [_on_rank((node.args, node.kwargs), values, rank) for rank in ranks]
        try:
            return self._call(gm, node, calls)
        except Exception as error:
            raise RuntimeError(
                f"{type(error).__name__}: {error}\n  in {node.format_node()}\n  at {source_of(node)}"
            ) from error

    def _call(self, gm: fx.GraphModule, node: fx.Node, calls: list[Any]) -> list[Any]:
        target: Any = node.target
        if target in COLLECTIVES or target in _SPECS:
            run = _run_collective if target in COLLECTIVES else _run_spec
            named = [call_arguments(target, args, kwargs) for args, kwargs in calls]
            return self._by_group(node.meta.get("axis") or named[0][1]["axis"], named, lambda group: run(target, group))
        if target in _STARTS:
            axis = node.meta.get("axis") or call_arguments(target, *calls[0])[1]["group_name"]
            return self._by_group(axis, calls, lambda group: self._start(target, group))
        if target in HOST_COPIES:
            spec = HOST_COPIES[target].spec
            return self._in_flight_until_wait(lambda: [spec(*args) for args, _ in calls])
        if target in (_c10d.wait_tensor.default, WAIT_COPY):
            return [self._wait(args[0]) for args, _ in calls]
        if getattr(target, "namespace", None) == "_c10d_functional":
            raise NotImplementedError(f"the simulator has no spec of {target}")
        if node.op == "call_module":
            target = gm.get_submodule(str(node.target))
        elif node.op == "call_method":
            target = getattr(torch.Tensor, str(node.target))
        elif target is torch.ops.aten.view.default:
            target = torch.ops.aten.reshape.default  # kernels may leave other strides than their fakes say
        elif target is torch.ops.aten.copy_.default:
            target = torch.no_grad()(target)  # an input gets its new value, also one that is a leaf
        return _with_equal_seeds(target, calls)

    def _by_group(self, axis: str, calls: list[Any], run: Callable[[list[Any]], list[Any]]) -> list[Any]:
        results: list[Any] = [None] * len(calls)
        for group in self.groups(axis):
            for rank, result in zip(group, run([calls[rank] for rank in group]), strict=True):
                results[rank] = result
        return results

    def _start(self, op: torch._ops.OpOverload, calls: list[Any]) -> list[Tensor]:
        parts = [args[0] for args, _ in calls]
        assert not (torch.is_grad_enabled() and any(x.requires_grad for x in parts)), f"{op} has no gradient"
        named = [call_arguments(op, *call)[1] for call in calls]
        return self._in_flight_until_wait(functools.partial(_functional_spec, op, parts, named))

    def _in_flight_until_wait(self, at_wait: Callable[[], list[Tensor]]) -> list[Tensor]:
        results = at_wait()
        buffers = [_poisoned(x) for x in results]
        for rank, buffer in enumerate(buffers):
            if buffer.numel() > 0:
                source = at_wait if self.in_flight == "late" else lambda: results
                self._pending[buffer.untyped_storage().data_ptr()] = (buffer, source, rank)
        return buffers

    def _wait(self, x: Tensor) -> Tensor:
        key = x.untyped_storage().data_ptr()
        if key in self._pending:
            buffer, source, rank = self._pending.pop(key)
            buffer.copy_(source()[rank])
        return x


def _on_rank(arg: Any, values: Mapping[fx.Node, list[Any]], rank: int) -> Any:
    return fx.node.map_arg(arg, lambda node: values[node][rank])


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For each node, the values that no later node reads."""
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        last[node] = node
        for operand in node.all_input_nodes:
            last[operand] = node
    uses: dict[fx.Node, list[fx.Node]] = {}
    for value, user in last.items():
        uses.setdefault(user, []).append(value)
    return uses


def _attribute(gm: fx.GraphModule, path: Any) -> Any:
    found: Any = gm
    for part in path.split("."):
        found = getattr(found, part)
    return found


def _with_equal_seeds(target: Any, calls: list[Any]) -> list[Any]:
    """Run an op for each rank. All ranks draw random numbers from the same state, as processes of one seed do."""
    if isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded not in target.tags:
        return [target(*args, **kwargs) for args, kwargs in calls]
    results = []
    cpu, cuda = torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    for args, kwargs in calls:
        torch.set_rng_state(cpu)
        torch.cuda.set_rng_state_all(cuda)
        results.append(target(*args, **kwargs))
    return results


class _Collective(torch.autograd.Function):
    """A collective on the tensors of all ranks of a group; its backward is the registered dual on all ranks."""

    @staticmethod
    def forward(ctx: Any, op: Any, arguments: dict[str, Any], *parts: Tensor) -> Any:
        ctx.dual = COLLECTIVES[op].dual(parts[0], **arguments)
        return tuple(COLLECTIVES[op].spec(parts, **arguments))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return (None, None, *_run_collective(ctx.dual.op, [(grad, ctx.dual.arguments) for grad in grads]))


def _run_collective(op: Any, group: list[tuple[Tensor, dict[str, Any]]]) -> list[Any]:
    arguments = group[0][1]
    assert all(other == arguments for _, other in group), f"ranks call {op} with different arguments"
    assert arguments["degree"] == len(group), f"{op} has degree {arguments['degree']} in a group of {len(group)}"
    return list(_Collective.apply(op, arguments, *[x for x, _ in group]))


class _Spec(torch.autograd.Function):
    """A registered spec on the calls of all ranks of a group. Tensors come flat: autograd sees no containers."""

    @staticmethod
    def forward(ctx: Any, op: Any, calls: list[Arguments], *tensors: Tensor) -> Any:
        results = [result if isinstance(result, tuple) else (result,) for result in _SPECS[op][0](calls)]
        flat = tuple(x for result in results for x in result)
        ctx.op, ctx.calls, ctx.width = op, calls, len(results[0])
        ctx.results = [tuple(x.detach() for x in result) for result in results]
        ctx.mark_non_differentiable(*[x for x in flat if not x.is_floating_point()])
        return flat

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        backward = _SPECS[ctx.op][1]
        assert backward is not None, f"{ctx.op} was registered without a backward spec"
        per_rank = [grads[i : i + ctx.width] for i in range(0, len(grads), ctx.width)]
        found = backward(ctx.calls, _unwrapped(ctx.op, ctx.results), _unwrapped(ctx.op, per_rank))
        flat = [
            grad
            for call, given in zip(ctx.calls, found, strict=True)
            for argument, grad in itertools.zip_longest(call, given)
            if isinstance(argument, Tensor)
        ]
        return (None, None, *flat)


def _unwrapped(op: Any, per_rank: list[Any]) -> list[Any]:
    """One tensor per rank for an op that returns one, a tuple per rank for others."""
    return [result[0] for result in per_rank] if len(op._schema.returns) == 1 else per_rank


def _run_spec(op: Any, group: list[tuple[Any, dict[str, Any]]]) -> list[Any]:
    calls = [(operand, *named.values()) for operand, named in group]
    forward, backward = _SPECS[op]
    if backward is None:
        tensors = [x for x in torch.utils._pytree.tree_leaves(calls) if isinstance(x, Tensor)]
        wanted = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        assert not wanted, f"{op} was registered without a backward spec"
        with torch.no_grad():
            return list(forward(calls))
    detached = [tuple(v.detach() if isinstance(v, Tensor) else v for v in call) for call in calls]
    flat = _Spec.apply(op, detached, *[v for call in calls for v in call if isinstance(v, Tensor)])
    width = len(op._schema.returns)
    return _unwrapped(op, [flat[i : i + width] for i in range(0, len(flat), width)])


def _functional_spec(op: Any, parts: list[Tensor], calls: list[dict[str, Any]]) -> list[Tensor]:
    """Results of a functional c10d collective; a gather concatenates along dim 0, a scatter splits it."""
    if op is _c10d.all_gather_into_tensor.default:
        return [torch.cat(parts) for _ in parts]
    if op is _c10d.all_to_all_single.default:
        pieces = [x.split(call["input_split_sizes"]) for x, call in zip(parts, calls, strict=True)]
        results = [torch.cat([sent[rank] for sent in pieces]) for rank in range(len(parts))]
        for result, call in zip(results, calls, strict=True):
            assert result.shape[0] == sum(call["output_split_sizes"]), "ranks disagree about split sizes"
        return results
    assert calls[0]["reduce_op"] in ("sum", "avg"), calls[0]["reduce_op"]
    total = torch.stack(parts).sum(0).to(parts[0].dtype)
    total = total / len(parts) if calls[0]["reduce_op"] == "avg" else total
    if op is _c10d.all_reduce.default:
        return [total.clone() for _ in parts]
    return [part.clone() for part in total.tensor_split(len(parts))]


def _poisoned(x: Tensor) -> Tensor:
    if x.is_floating_point() or x.is_complex():
        return torch.full_like(x, torch.nan)
    return torch.full_like(x, True if x.dtype is torch.bool else torch.iinfo(x.dtype).max)
