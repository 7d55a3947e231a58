"""Runs a GLOBAL graph on one rank's shapes while it is traced: the only place where shapes change.

Each node is executed on local fakes: a reshard becomes a collective, a call that runs sharded runs its rule's local
form, everything else runs as it is. The traced graph is the LOCAL graph; its shapes are inferred, not computed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from spcompile.capture.retrace import OWN
from spcompile.check.states import OWN_PART
from spcompile.graph.aten_ops import tensor_operands
from spcompile.graph.edit import operand
from spcompile.graph.reshard import Place, Reshard, is_reshard, parse_place
from spcompile.graph.sizes import Size, same
from spcompile.machine import sequence
from spcompile.machine.sequence import pad
from spcompile.sharding.global_view import is_view, part_of_view
from spcompile.sharding.layout import NodeLayout, has_picked_rows, layout_of
from spcompile.sharding.propagate import Choice, is_prefix, place_of, space_at
from spcompile.sharding.rules.rule import LocalCall, tensor_results
from spcompile.sharding.spaces import Space, leaves
from spcompile.sharding.split_attention import attention, merged_attention
from spcompile.sharding.split_dims import SplitDims
from spcompile.sharding.split_neighbours import run_mirrored, run_moved, run_windowed
from spcompile.sharding.split_sums import run_summed_up

aten, spx = torch.ops.aten, torch.ops.spx

READ_SIZES = (aten.sym_size.int, aten.sym_numel.default, aten.sym_stride.int)


@dataclass(frozen=True)
class _Ranks:
    """`rules.base.Ranks` as ops of the graph being traced."""

    split: SplitDims

    def first(self, length: Size, device: torch.device) -> Tensor:
        assert self.split.order == "contiguous"
        return spx.positions(length, self.split.axis, self.split.degree, self.split.order, device=device)[0]

    def gather(self, x: Tensor) -> Tensor:
        degree = self.split.degree
        return spx.all_gather(x.unsqueeze(0), 0, degree, self.split.axis, degree, "contiguous", "I")


class Lower(fx.Interpreter):
    """Executes a GLOBAL graph with reshards on local tensors."""

    def __init__(self, gm: fx.GraphModule, split: SplitDims) -> None:
        super().__init__(gm)
        self.split = split

    def run_node(self, n: fx.Node) -> Any:
        """One node on local values, with its origin kept for the nodes it traces."""
        if OWN in n.meta and n.op == "placeholder":
            value = super().run_node(n)
            return value if isinstance(value, Tensor) else value * self.split.degree  # a number of entries: of all
        if n.target in READ_SIZES:
            return super().run_node(n) * self.times_as_large(n)
        if n.op != "call_function" or not isinstance(layout := layout_of(n), NodeLayout):
            return super().run_node(n)
        with self._set_current_node(n):
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            if is_view(n, self.split.axis):
                return args[0]
            if is_reshard(n):
                return self.run_reshard(Reshard.of(n), args[0])
            if layout.call is None:
                return self.call_function(n.target, args, kwargs)
            if (choice := layout.choice.get(self.split.axis)) is not None:
                return self.sharded(n, layout, choice, args, kwargs)
            if layout.call.rule.unread and layout.call.rule.local is not None:
                # An operand of which only the shape is read may be split: the result must not follow it.
                shapes = tuple(tuple(v.shape) for v in tensor_results(n))
                return layout.call.rule.local(LocalCall(args, kwargs, shapes, "", 1, self.split.degree))
            return self.call_function(n.target, args, kwargs)

    def times_as_large(self, n: fx.Node) -> int:
        """How much larger a size of a value is than that of the part which this rank has."""
        layout = layout_of(operand(n, 0))
        place = layout.place(self.split.axis) if layout is not None else None
        if place is None or has_picked_rows(operand(n, 0), self.split.axis):
            return 1
        dim: Any = n.args[1] if len(n.args) > 1 else place.dim  # all numbers are more as well
        is_more = dim < place.dim if n.target is aten.sym_stride.int else dim == place.dim
        return self.split.degree if is_more else 1

    def run_reshard(self, change: Reshard, value: Tensor) -> Tensor:
        """A change of state of a value."""
        if is_view(change.x, self.split.axis):
            return self.gather_view(value, change.x, change.dst)
        source = layout_of(change.x)
        assert source is not None
        if change.x.op == "get_attr":  # a tensor with data, where all else is traced
            value = torch.ops.aten.lift_fresh_copy.default(value)
        return self.reshard(value, change.src, change.dst, [leaves(dim) for dim in source.dims[0]])

    def sharded(
        self, n: fx.Node, layout: NodeLayout, choice: Choice, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """A call over a factor that is split."""
        call, split = layout.call, self.split
        assert call is not None
        if choice.factor in call.rule.paired:
            return attention(split, n, args)
        if choice.factor in call.rule.paired.values():
            return merged_attention(split, n, choice, args)
        if choice.factor in call.rule.moved:
            return run_moved(split, n, choice, [self.env[read] for read in tensor_operands(n)])
        if choice.factor in call.rule.windows:
            return run_windowed(split, n, choice, args, kwargs)
        if choice.factor in call.rule.mirrored:
            return run_mirrored(split, n, choice, args[0])
        if is_prefix(call, choice):
            return args[0]
        args, kwargs = self.mask_reduced(n, layout, choice, args, kwargs)
        if choice.factor in call.rule.summed_up:
            return run_summed_up(split, n, choice, args, kwargs)
        if call.rule.local is None:
            return self.call_function(n.target, args, dict(kwargs))
        shapes = tuple(
            tuple(self.local_size(leaves(dim), place_of(names, call, choice), index) for index, dim in enumerate(dims))
            for dims, names in zip(layout.dims, call.rule.results, strict=True)
        )
        global_size: Size = 1
        for part, space in enumerate(call.leaves_of(choice.factor)):
            global_size = global_size * (split.whole(space) if part == choice.part else space.find().size)
        local = LocalCall(args, kwargs, shapes, choice.factor, global_size, split.degree, _Ranks(split))
        if not call.rule.operands or any(place_of(dims, call, choice) for dims in call.rule.operands):
            return call.rule.local(local)
        # No operand shows that the result is a part: a repeat of what all ranks hold, for as many heads as a rank has.
        with fx.traceback.annotate({OWN_PART: (*n.meta.get("custom", {}).get(OWN_PART, ()), split.axis)}):
            return call.rule.local(local)

    def local_size(self, dim: list[Space], place: Place | None, index: int) -> Size:
        """Local size of tensor dim number `index`, a product of spaces."""
        size: Size = 1
        for part, space in enumerate(dim):
            split_here = place is not None and place == Place(index, part)
            size = size * (self.split.local(space) if split_here else space.size)
        return size

    def mask_reduced(
        self, n: fx.Node, layout: NodeLayout, choice: Choice, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Give the padding of a factor that the call sums over the value that adds nothing."""
        call = layout.call
        assert call is not None
        space = call.leaves_of(choice.factor)[choice.part]
        is_filled = choice.factor in call.rule.reductions or choice.factor in call.rule.filled
        if not is_filled or not self.split.padded(space):
            return args, kwargs
        numbers = iter(range(len(tensor_operands(n))))

        def mask(node: fx.Node) -> Any:
            value = self.env[node]
            if not isinstance(node.meta.get("val"), Tensor):
                return value
            number = next(numbers)
            place = place_of(call.rule.operands[number], call, choice)
            if place is None or number not in call.rule.fills:
                return value
            source = layout_of(node)
            assert source is not None
            dims = [leaves(dim) for dim in source.dims[0]]
            fill = float(call.rule.fills[number])
            split = self.split

            def masked(x: Tensor, dim: int, space: Space) -> Tensor:
                length, order = space.find().size, split.order_of(space)
                return spx.mask_padding(x, dim, length, split.axis, split.degree, order, fill)

            return self.split.on_split_dim(value, dims, place, True, masked)

        return fx.node.map_arg(n.args, mask), fx.node.map_arg(n.kwargs, mask)

    def reshard(self, x: Tensor, src: str, dst: str, dims: list[list[Space]]) -> Tensor:
        """The collective of one state change."""
        if x.is_complex():  # which collectives do not know
            return torch.view_as_complex(self.reshard(torch.view_as_real(x.resolve_conj()), src, dst, dims))
        split, source, target = self.split, parse_place(src), parse_place(dst)
        axis, degree = split.axis, split.degree
        if source is not None and target is not None:
            return self.exchange(x, dims, source, target)
        if source is not None:
            return self.split.on_split_dim(
                x, dims, source, True, lambda x, dim, space: self.split.gather(x, dim, space, dst)
            )
        if target is not None:
            assert src in "IP", (src, dst)
            return self.split.on_split_dim(x, dims, target, False, self.take if src == "I" else self.scatter)
        if (src, dst) == ("I", "R"):
            return spx.vary(x, axis, degree)
        assert src == "P", (src, dst)
        return spx.all_reduce(x, axis, degree, dst)

    def exchange(self, x: Tensor, dims: list[list[Space]], source: Place, target: Place) -> Tensor:
        """S -> S: block i of the dim that is whole goes to rank i, which puts the blocks that arrive behind each other.

        Both dims stand alone meanwhile, also where they are factors of compound dims.
        """
        split, held, wanted = self.split, space_at(dims, source), space_at(dims, target)
        numbers = {place: sum(map(len, dims[: place.dim])) + place.part for place in (source, target)}
        sizes: list[Size] = [space.size for dim in dims for space in dim]
        sizes[numbers[source]] = split.local(held)
        apart = x.reshape([*sizes, *x.shape[len(dims) :]])
        padded = pad(apart, numbers[target], split.capacity(wanted), fill=None)
        blocks = sequence.split(padded, numbers[target], split.degree, split.order_of(wanted), fill=None)
        arrived = spx.all_to_all(blocks, split.axis, split.degree)
        joined = sequence.join(arrived, numbers[source], split.order_of(held))
        whole = sequence.beginning(joined, numbers[source], held.find().size)
        shape = [self.local_size(dim, target if target.dim == index else None, index) for index, dim in enumerate(dims)]
        return whole.reshape([*shape, *x.shape[len(dims) :]])

    def gather_view(self, x: Tensor, view: fx.Node, to: str) -> Tensor:
        """S -> R or S -> I of a parameter: its parts are even and contiguous, whatever the order of the sequence."""
        part = part_of_view(view)
        length = view.meta["val"].shape[part.dim]
        return spx.all_gather(x, part.dim, length, part.axis, part.degree, "contiguous", to)

    def take(self, x: Tensor, dim: int, space: Space) -> Tensor:
        """I -> S. The space may be shorter than the layout's length."""
        split = self.split
        capacity, length = split.capacity(space), space.find().size
        if not same(capacity, length):
            x = pad(x, dim, capacity, fill=None)
        return spx.shard(x, dim, split.axis, split.degree, split.order_of(space), None)

    def scatter(self, x: Tensor, dim: int, space: Space) -> Tensor:
        """P -> S. Padding behind the sum is benign."""
        split = self.split
        if not same(split.capacity(space), space.find().size):
            x = pad(x, dim, split.capacity(space))
        part = spx.reduce_scatter(x, dim, split.axis, split.degree, split.order_of(space))
        return self.split.mask_benignly(part, dim, space) if split.padded(space) else part
