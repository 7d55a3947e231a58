"""Runs a GLOBAL graph on one rank's shapes while it is traced: the only place where shapes change.

Each node is executed on local fakes: a reshard becomes a collective, a call that runs sharded runs its rule's local
form, everything else runs as it is. The traced graph is the LOCAL graph; its shapes are inferred, not computed here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from spcompile.attention.scores.attention_call import AttentionCall
from spcompile.attention.scores.runs import PADDING
from spcompile.capture.retrace import OWN
from spcompile.check.states import OWN_PART
from spcompile.graph.edit import operand
from spcompile.graph.reshard import Place, Reshard, is_reshard, parse_place
from spcompile.graph.sizes import Size, divides, same
from spcompile.machine.sequence import chunks_per_rank, local_length, pad
from spcompile.sharding.global_view import is_view, part_of_view
from spcompile.sharding.layout import NodeLayout, has_picked_rows, layout_of
from spcompile.sharding.propagate import Choice, is_prefix, place_of, space_at
from spcompile.sharding.rules.rule import LocalCall, Move, tensor_operands, tensor_results
from spcompile.sharding.spaces import Space, leaves

aten, spx = torch.ops.aten, torch.ops.spx

READ_SIZES = (aten.sym_size.int, aten.sym_numel.default, aten.sym_stride.int)

# What padding holds behind attention and a reduce-scatter. Nobody reads what becomes of it, but with 0 an op like
# x / x.norm() would make
# NaN, and NaN times the zero gradient of such rows would reach the gradients of parameters. Where rows enter, padding
# repeats the last row: as finite as a real one, and an index that is in range.
BENIGN = 1.0


class SplitDims:
    """The layout of every index space over one mesh axis."""

    def __init__(self, axis: str, degree: int, order: str) -> None:
        self.axis, self.degree, self.order = axis, degree, order

    def capacity(self, space: Space) -> Size:
        """Global length that the layout is computed from: the space's own, or that of the longer space it begins."""
        return space.family().size

    def local(self, space: Space) -> Size:
        """Indices of a split space that one rank holds, padding included."""
        return local_length(self.capacity(space), self.degree, self.order)

    def whole(self, space: Space) -> Size:
        """Indices of a split space over all ranks."""
        return space.find().size

    def padded(self, space: Space) -> bool:
        """Whether some rank may hold padding."""
        chunks = self.degree * chunks_per_rank(self.order)
        return not (same(self.capacity(space), space.find().size) and divides(chunks, space.find().size))


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
            return self.attention(n, args)
        if choice.factor in call.rule.paired.values():
            return self.merged_attention(n, choice, args)
        if choice.factor in call.rule.moved:
            return self.moved(n, layout, choice)
        if choice.factor in call.rule.windows:
            return self.windowed(n, layout, choice, args, kwargs)
        if is_prefix(call, choice):
            return args[0]
        args, kwargs = self.mask_reduced(n, layout, choice, args, kwargs)
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
        if choice.factor not in call.rule.reductions or not self.split.padded(space):
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
                return spx.mask_padding(x, dim, space.find().size, split.axis, split.degree, split.order, fill)

            return self.on_split_dim(value, dims, place, True, masked)

        return fx.node.map_arg(n.args, mask), fx.node.map_arg(n.kwargs, mask)

    def on_split_dim(self, x: Tensor, dims: list[list[Space]], place: Place, is_local: bool, function: Any) -> Tensor:
        """Apply function(x, dim, space) to the tensor dim that holds just the split space.

        Where that space is one factor of a compound dim, the dim is unflattened first and flattened again after.
        """
        dim = dims[place.dim]
        space = space_at(dims, place)
        if len(dim) == 1:
            return function(x, place.dim, space)
        sizes: list[Size] = [factor.size for factor in dim]
        if is_local:
            sizes[place.part] = self.split.local(space)
        before, after = list(x.shape[: place.dim]), list(x.shape[place.dim + 1 :])
        result = function(x.reshape([*before, *sizes, *after]), place.dim + place.part, space)
        sizes[place.part] = result.shape[place.dim + place.part]
        flat: Size = 1
        for size in sizes:
            flat = flat * size
        return result.reshape([*before, flat, *after])

    def reshard(self, x: Tensor, src: str, dst: str, dims: list[list[Space]]) -> Tensor:
        """The collective of one state change."""
        split, source, target = self.split, parse_place(src), parse_place(dst)
        axis, degree = split.axis, split.degree
        assert source is None or target is None, f"no collective from {src} to {dst}"
        if source is not None:
            return self.on_split_dim(x, dims, source, True, lambda x, dim, space: self.gather(x, dim, space, dst))
        if target is not None:
            assert src in "IP", (src, dst)
            return self.on_split_dim(x, dims, target, False, self.take if src == "I" else self.scatter)
        if (src, dst) == ("I", "R"):
            return spx.vary(x, axis, degree)
        assert src == "P", (src, dst)
        return spx.all_reduce(x, axis, degree, dst)

    def gather(self, x: Tensor, dim: int, space: Space, to: str) -> Tensor:
        """S -> R or S -> I, cut to the space's own length."""
        split = self.split
        capacity, length = split.capacity(space), space.find().size
        whole = spx.all_gather(x, dim, capacity, split.axis, split.degree, split.order, to)
        return whole if same(capacity, length) else whole.narrow(dim, 0, length)

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
        return spx.shard(x, dim, split.axis, split.degree, split.order, None)

    def scatter(self, x: Tensor, dim: int, space: Space) -> Tensor:
        """P -> S. Padding behind the sum is benign."""
        split = self.split
        if not same(split.capacity(space), space.find().size):
            x = pad(x, dim, split.capacity(space))
        part = spx.reduce_scatter(x, dim, split.axis, split.degree, split.order)
        return self.mask_benignly(part, dim, space) if split.padded(space) else part

    def moved(self, n: fx.Node, layout: NodeLayout, choice: Choice) -> Any:
        """A call that puts elements of its operands elsewhere: each of its moves by itself, and their sum."""
        call, read = layout.call, tensor_operands(n)
        assert call is not None
        results = []
        for number, (example, dims, names) in enumerate(
            zip(tensor_results(n), layout.dims, call.rule.results, strict=True)
        ):
            target = place_of(names, call, choice)
            parts = []
            for move in (move for move in call.rule.moves if move.result == number):
                source = place_of(call.rule.operands[move.operand], call, choice)
                operand_layout = layout_of(read[move.operand])
                assert operand_layout is not None
                held = None if source is None else leaves(operand_layout.dims[0][source.dim])
                wanted = None if target is None else leaves(dims[target.dim])
                part = self.move(self.env[read[move.operand]], move, held, wanted)
                parts.append(part.to(example.dtype) if example.ndim == part.ndim else part.squeeze(move.dim))
            result = functools.reduce(torch.add, parts)
            if target is not None and example.is_floating_point() and self.split.padded(leaves(dims[target.dim])[0]):
                spaces = [leaves(dim) for dim in dims]
                result = self.on_split_dim(result, spaces, target, True, self.mask_benignly)
            results.append(result)
        return results if isinstance(n.meta["val"], list | tuple) else results[0]

    def move(self, x: Tensor, move: Move, held: list[Space] | None, wanted: list[Space] | None) -> Tensor:
        """One move, from a dim that is split into `held` factors to one of `wanted`; None: ranks have it whole."""
        axis, degree, order = self.split.axis, self.split.degree, self.split.order
        if held is None:
            assert wanted is not None, "a move from a whole dim to a whole dim"
            x = x if same(x.shape[move.dim], move.count) else x.narrow(move.dim, move.start, move.count)
            return spx.place(x, move.dim, move.to, *self.length_and_unit(wanted), axis, degree, order)
        if wanted is not None:
            old, new = self.length_and_unit(held), self.length_and_unit(wanted)
            return spx.move(x, move.dim, move.start, move.count, *old, move.to, *new, axis, degree, order)
        own = spx.pick(x, move.dim, move.start, move.count, *self.length_and_unit(held), axis, degree, order)
        return spx.all_reduce(own, axis, degree, "I")

    def windowed(
        self, n: fx.Node, layout: NodeLayout, choice: Choice, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """A call of which each element is made of neighbours: of each chunk of the result, from just what it reads."""
        call, split, (x, *others) = layout.call, self.split, args
        assert call is not None
        window, (example,) = call.rule.windows[choice.factor], tensor_results(n)
        operand_layout = layout_of(operand(n, 0))
        assert operand_layout is not None
        source = place_of(call.rule.operands[0], call, choice)
        target = place_of(call.rule.results[0], call, choice)
        assert source is not None
        assert target is not None
        held, wanted = leaves(operand_layout.dims[0][source.dim]), leaves(layout.dims[0][target.dim])
        count = math.prod(space.find().size for space in held)
        made = (window.step, window.before, window.extent, *self.length_and_unit(wanted))
        layout_held = self.length_and_unit(held)
        read = spx.halo(x, source.dim, count, *layout_held, *made, split.axis, split.degree, split.order)
        chunks = read.chunk(chunks_per_rank(split.order), source.dim)
        calls = [LocalCall((chunk, *others), kwargs, (), choice.factor, count, split.degree) for chunk in chunks]
        parts = [window.local(of_chunk) for of_chunk in calls]
        result = torch.cat(parts, target.dim) if len(parts) > 1 else parts[0]
        if not example.is_floating_point() or not split.padded(wanted[0]):
            return result
        return self.on_split_dim(result, [leaves(dim) for dim in layout.dims[0]], target, True, self.mask_benignly)

    def length_and_unit(self, dim: list[Space]) -> tuple[Size, Size]:
        """Of the layout of a dim whose first factor is split."""
        outer, *inner = dim
        return self.split.capacity(outer), math.prod(space.find().size for space in inner)

    def attention(self, n: fx.Node, args: tuple[Any, ...]) -> Any:
        """Query rows local, keys and values gathered: right as it stands; `parallelize-attention` improves it."""
        whole, call = AttentionCall.of(n), AttentionCall.bind(*args)
        assert call.q_positions is call.k_positions is None, "positions before lowering"
        q_dims, k_dims = _dims_of(whole.q), _dims_of(whole.k)
        if k_dims[2]:  # a single key is whole on every rank
            k, v = (self.on_split_dim(x, k_dims, Place(2), True, self.gather_rows) for x in (call.k, call.v))
            call = call.but(k=k, v=v)
        out, lse = call.but(q_positions=self.positions(q_dims[2], call.q.device)).run()
        if self.split.padded(q_dims[2][0]):
            out = self.on_split_dim(out, _dims_of(n), Place(2), True, self.mask_benignly)
        return out, lse

    def merged_attention(self, n: fx.Node, choice: Choice, args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        """All queries over this rank's keys, merged over ranks: out is the mean of theirs, weighted by exp(lse)."""
        call, split = AttentionCall.bind(*args), self.split
        keys = _dims_of(AttentionCall.of(n).k)[2]
        assert choice.part == 0, "positions of a dim of which an inner factor is split"
        positions = self.positions(keys, call.k.device)
        if split.padded(keys[0]):
            length = math.prod(space.find().size for space in keys)
            positions = positions.masked_fill(positions >= length, PADDING)
        out, lse = call.but(k_positions=positions).run()
        # A rank of which a query sees no key has weight 0; where it sees none at all, any weights do: all out are 0.
        least = torch.finfo(lse.dtype).min

        def total(state: str) -> Tensor:
            lses = spx.all_gather(lse.unsqueeze(0), 0, split.degree, split.axis, split.degree, "contiguous", state)
            return lses.clamp(min=least).logsumexp(0)

        weight = (lse.clamp(min=least) - total("R")).exp()
        merged = spx.all_reduce(out.to(lse.dtype) * weight.unsqueeze(-1), split.axis, split.degree, "I")
        whole = total("I")  # read by few: else it is dead
        return merged.to(out.dtype), whole.masked_fill(whole == least, -torch.inf)

    def mask_benignly(self, x: Tensor, dim: int, space: Space) -> Tensor:
        """Padding that attention left at 0 gets a value that may be divided by."""
        split = self.split
        return spx.mask_padding(x, dim, space.find().size, split.axis, split.degree, split.order, BENIGN)

    def gather_rows(self, x: Tensor, dim: int, space: Space) -> Tensor:
        """S -> R of one space."""
        return self.gather(x, dim, space, "R")

    def positions(self, rows: list[Space], device: torch.device) -> Tensor:
        """Position in the whole dim of every local index, where the first of its factors is split: int32 [local]."""
        split, (outer, *inner) = self.split, rows
        positions = spx.positions(split.capacity(outer), split.axis, split.degree, split.order, device=device)
        for space in inner:
            size = space.find().size
            within = torch.arange(size, dtype=torch.int32, device=device)
            positions = (positions[:, None] * size + within).flatten()
        return positions


def _dims_of(value: fx.Node) -> list[list[Space]]:
    """The finest factors of every dim of a value."""
    layout = layout_of(value)
    assert layout is not None
    return [leaves(dim) for dim in layout.dims[0]]
