"""What an op of a final graph costs, in seconds of a table: nothing is timed, so that all ranks and `explain` agree.

A node takes the longer of its arithmetic and its memory traffic. Arithmetic: the formulas of torch.utils.flop_counter;
attention by what its mask leaves of the scores, in rings at the rate with which `attention="auto"` compares strategies.
Traffic: operands and results; elementwise ops behind one another count once under Inductor, which fuses them. A
collective takes its bytes and its chain of messages on the link of its axis; the messages of an all-to-all leave at
once. A product that is cut into chunks takes, for each chunk, a kernel, the whole weight, and whole rounds of tiles; of
the messages between chunks what takes longer than a chunk is exposed. Sizes that are symbols count as at trace time.
Where a machine was measured, its times stand for those of products, attention and collectives.

B batch, N query heads, S and T query and key rows, H head size of q and k, V of v.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
import torch.fx as fx
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import flop_registry

import spcompile.attention.op  # noqa: F401  (defines the ops)
from spcompile.attention.ring.ring_call import RingCall, attention_of, is_attention, ring_of
from spcompile.attention.scores.attention_call import GradientCall
from spcompile.attention.scores.mask import AttentionMask
from spcompile.attention.strategy_cost import RING_RATE
from spcompile.collectives.host_copy import HOST_COPIES
from spcompile.collectives.pipelined_matmuls import PIPELINED
from spcompile.collectives.typed_calls import AllGatherMatmulCall, MatmulReduceScatterCall
from spcompile.graph.edit import is_getitem
from spcompile.graph.sizes import hint, numel_hint
from spcompile.graph.storage import root_of
from spcompile.graph.typed_call import value_of
from spcompile.machine.accelerators import ACCELERATORS, Accelerator
from spcompile.machine.links import Link, link_of
from spcompile.machine.mesh import MeshShape
from spcompile.options import Options
from spcompile.schedule.communication import sent_by

_BEFORE_AUTOGRAD = (torch.ops.aten.linear.default, torch.ops.aten.matmul.default)
_SAMPLES = 64  # query rows at which a mask is looked at
_TILE = 128  # rows and columns of the tiles in which products are computed
_MOST_FUSED_PARTS = 8  # of a cat, for Inductor to write it as one kernel (torch 2.13: _inductor/config.py)


@dataclass(frozen=True)
class Work:
    """Seconds of one node. compute: on this rank; communication: what it sends inside; exposed: of that, waited for."""

    compute: float
    communication: float = 0.0
    exposed: float = 0.0

    @property
    def seconds(self) -> float:
        """From its start to its end."""
        return self.compute + self.exposed


@dataclass(frozen=True)
class Chunks:
    """Products that are cut into one chunk for each rank of an axis, between which messages travel.

    rows: of a chunk. products: (width, columns) of the weights. pieces: products in which a chunk is computed.
    message, messages: bytes that a hop sends, and in how many messages. copied: bytes moved once more in all.
    """

    axis: str
    degree: int
    rows: int
    products: tuple[tuple[int, int], ...]
    pieces: int
    itemsize: int
    message: int
    messages: int
    copied: int


@dataclass(frozen=True)
class CostModel:
    """Costs on one kind of accelerator and the links of one mesh.

    known: what was found before, where it is remembered.
    fuses: elementwise ops behind one another count once. links: axis -> name in LINKS, the user's choice.
    """

    mesh: MeshShape
    accelerator: Accelerator
    links: Mapping[str, str]
    fuses: bool = True
    known: dict[fx.Node, Work] | None = field(default=None, compare=False)

    def of_one_graph(self) -> CostModel:
        """The same, of a graph that does not change while it is used: what a node costs is found once."""
        return replace(self, known={})

    def work(self, node: fx.Node) -> Work:
        """Of a node that is no start of a collective and no wait."""
        if self.known is None:
            return self._work(node)
        if node not in self.known:
            self.known[node] = self._work(node)
        return self.known[node]

    def _work(self, node: fx.Node) -> Work:
        if node.op != "call_function":
            return Work(0.0)
        compute = self._compute(node)
        sent = sent_by(node, self.mesh)
        if sent is None:
            return Work(compute)
        if node.target in PIPELINED:
            return self.pipelined(_chunks_of(node))
        ring = ring_of(node)
        if ring is None:  # one op that communicates and returns when it is done
            seconds = self.communication(node)
            return Work(compute, seconds, seconds)
        hops = max(1, ring.most_hops)
        one = self.link(sent[1]).seconds(_at_traced_sizes(sent[2], node) / hops)
        return Work(compute, hops * one, hops * max(0.0, one - compute / (hops + 1)))

    def pipelined(self, chunks: Chunks) -> Work:
        """Of products that hide a collective."""
        hop = sum(self._chunk_product(chunks, width, columns) for width, columns in chunks.products)
        one = self.link(chunks.axis).seconds(chunks.message, chunks.messages)
        copies = 2 * chunks.copied / self.accelerator.bytes_per_second
        hops = chunks.degree - 1
        return Work(chunks.degree * hop + copies, hops * one, hops * max(0.0, one - hop))

    def _chunk_product(self, chunks: Chunks, width: int, columns: int) -> float:
        """[rows, width] @ [width, columns] of one chunk, in pieces."""
        reached = self.accelerator.peak(chunks.itemsize) * self.accelerator.reached
        tiles = -(-chunks.rows // chunks.pieces // _TILE) * -(-columns // _TILE)
        arithmetic = 2 * chunks.rows * width * columns / reached * self.accelerator.rounding(tiles)
        elements = chunks.rows * (width + columns) + chunks.pieces * width * columns
        moved = elements * chunks.itemsize / self.accelerator.bytes_per_second
        return max(arithmetic, moved) + chunks.pieces * self.accelerator.seconds_per_kernel

    def is_heavy(self, node: fx.Node) -> bool:
        """Whether a node is a product, an attention, or sends anything."""
        return is_matmul(node) or sent_by(node, self.mesh) is not None

    def communication(self, node: fx.Node) -> float:
        """Seconds that a collective is on its way."""
        sent = sent_by(node, self.mesh)
        assert sent is not None, node
        op, axis, amount = sent
        chain = 1 if op == "all_to_all" else (self.mesh.size(axis) - 1) * (2 if op == "all_reduce" else 1)
        return self.link(axis).seconds(_at_traced_sizes(amount, node), max(1, chain), op)

    def share_a_kernel(self, producer: fx.Node, reader: fx.Node) -> bool:
        """Whether what one call gives to another stays inside a kernel."""
        return self.fuses and _fuses(producer) and _fuses(reader)

    def host_copy(self, size: int) -> float:
        """Seconds of a copy of so many bytes to the host or back."""
        return self.accelerator.seconds_per_kernel + size / self.accelerator.host_bytes_per_second

    def bytes_sent(self, node: fx.Node) -> float:
        """By this rank, in a collective."""
        sent = sent_by(node, self.mesh)
        return 0.0 if sent is None else _at_traced_sizes(sent[2], node)

    def link(self, axis: str) -> Link:
        """What ranks of an axis, or of a part of one, talk over."""
        return link_of(self.mesh, axis, self.links, own=self.accelerator.links)

    def _compute(self, node: fx.Node) -> float:
        moved = self._traffic(node)
        if is_attention(node):
            seconds = self.accelerator.attention_seconds(attention_flops(node), _itemsize(node))
            return max(seconds / RING_RATE if ring_of(node) is not None else seconds, moved)
        flops = matmul_flops(node)
        return max(self.accelerator.product_seconds(flops, _itemsize(node)), moved) if flops else moved

    def _traffic(self, node: fx.Node) -> float:
        if not _tensors(node) or is_getitem(node) or root_of(node) is not node or node.target in HOST_COPIES:
            return 0.0  # a view, a size, or what has a stream of its own
        reads = [n for n in node.all_input_nodes if not self.share_a_kernel(root_of(n), node)]
        writes = any(not self.share_a_kernel(node, reader) for reader in readers_of(node))
        moved = sum(bytes_of(n) for n in reads) + (bytes_of(node) if writes else 0)
        launches = self.accelerator.seconds_per_kernel if writes else 0.0
        return moved / self.accelerator.bytes_per_second + launches


def readers_of(node: fx.Node) -> Iterator[fx.Node]:
    """What reads a value, itself or through views of it."""
    pending = list(node.users)
    while pending:
        user = pending.pop()
        if user.op == "call_function" and root_of(user) is not user:
            pending += user.users
        else:
            yield user


def cost_model(mesh: MeshShape, options: Options) -> CostModel:
    """Of the accelerator and the links that the options name."""
    return CostModel(mesh, ACCELERATORS[options.accelerator], options.links, options.compiler == "inductor")


def is_matmul(node: fx.Node) -> bool:
    """Whether a node is a matrix product, a convolution or an attention."""
    is_counted = getattr(node.target, "overloadpacket", None) in flop_registry
    return is_counted or is_attention(node) or node.target in PIPELINED


def gathering_chunks(
    part: torch.Tensor, weights: Sequence[torch.Tensor], dim: int, axis: str, degree: int, gathered: bool
) -> Chunks:
    """Of an all-gather of `part` whose result is multiplied. gathered: others want it whole."""
    pieces = math.prod(map(hint, part.shape[:dim]))
    message = numel_hint(part) * part.element_size()
    products = tuple((hint(weight.shape[0]), hint(weight.shape[1])) for weight in weights)
    rows = numel_hint(part) // hint(part.shape[-1])
    copied = degree * message if gathered and pieces > 1 else 0
    return Chunks(axis, degree, rows, products, pieces, part.element_size(), message, 1, copied)


def scattering_chunks(
    result: torch.Tensor, weights: Sequence[torch.Tensor], dim: int, axis: str, degree: int
) -> Chunks:
    """Of products whose sum is reduce-scattered; the sums travel in halves."""
    batch = math.prod(map(hint, result.shape[:dim]))
    message = numel_hint(result) * result.element_size()
    products = tuple((hint(weight.shape[0]), hint(weight.shape[1])) for weight in weights)
    rows = numel_hint(result) // hint(result.shape[-1])
    return Chunks(axis, degree, rows, products, 2 * batch, result.element_size(), message, 2, message)


def _chunks_of(node: fx.Node) -> Chunks:
    if AllGatherMatmulCall.is_call(node):
        gather = AllGatherMatmulCall.of(node)
        layout = gather.dim, gather.axis, gather.degree, gather.gathered
        return gathering_chunks(value_of(gather.x), [value_of(weight) for weight in gather.weights], *layout)
    scatter = MatmulReduceScatterCall.of(node)
    weights = [value_of(weight) for weight in scatter.weights]
    return scattering_chunks(value_of(node), weights, scatter.dim, scatter.axis, scatter.degree)


def matmul_flops(node: fx.Node) -> int:
    """By the formulas of torch.utils.flop_counter; 0 for an op that has none. Before autograd also of its products."""
    if node.target in _BEFORE_AUTOGRAD:
        contracted = node.args[0].meta["val"].shape[-1]  # type: ignore[union-attr]
        return 2 * numel_hint(node.meta["val"]) * hint(contracted)
    formula = flop_registry.get(getattr(node.target, "overloadpacket", None))
    if formula is None:
        return 0
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: _as_hinted(n.meta["val"]))
    return int(formula(*args, **kwargs, out_val=pytree.tree_map(_as_hinted, node.meta["val"])))


def attention_flops(node: fx.Node) -> float:
    """Two products forward, five backward (Dao 2023, arXiv 2307.08691, section 4.1), of the scores the mask leaves."""
    call = attention_of(node)
    assert call is not None
    B, N, _, S, T, H, V = call.sizes.hints()
    if isinstance(call, RingCall):
        T = call.ring.k_length
    widths = 3 * H + 2 * V if isinstance(call, GradientCall) else H + V
    return 2.0 * B * N * S * T * widths * visible(call.attention_mask, T)


@functools.lru_cache(maxsize=256)
def visible(mask: AttentionMask, length: int) -> float:
    """About which part of `length` keys a query sees, from positions alone: a half where the mask is causal."""
    seen = 0
    for sample in range(_SAMPLES):
        query = (2 * sample + 1) * length // (2 * _SAMPLES)
        first, last = mask.usual.reach(query, query)
        seen += max(0, min(length - 1, length if last is None else last) - first + 1)
    return seen / (_SAMPLES * max(1, length))


def bytes_of(node: fx.Node) -> int:
    """Of all tensors that a node returns."""
    return sum(numel_hint(x) * x.element_size() for x in _tensors(node))


def _itemsize(node: fx.Node) -> int:
    """Bytes of an element of what a product reads: what it gives may be wider."""
    read = [x for operand in node.all_input_nodes for x in _tensors(operand) if x.is_floating_point()]
    return min(x.element_size() for x in read or _tensors(node))


def _tensors(node: fx.Node) -> list[torch.Tensor]:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return [value]
    return [x for x in pytree.tree_leaves(value) if isinstance(x, torch.Tensor)]


def _fuses(node: fx.Node) -> bool:
    """Whether Inductor writes the kernel: an op of ATen that is no product, among others of its kind."""
    target = node.target
    if target is torch.ops.aten.cat.default and len(node.all_input_nodes) > _MOST_FUSED_PARTS:
        return False
    is_aten = isinstance(target, torch._ops.OpOverload) and target.namespace in ("aten", "prims")
    return is_aten and getattr(target, "overloadpacket", None) not in flop_registry


def _as_hinted(value: Any) -> Any:
    return torch.empty([hint(s) for s in value.shape], device="meta") if isinstance(value, torch.Tensor) else value


def _at_traced_sizes(size: sympy.Expr, node: fx.Node) -> float:
    """An expression with every symbol at its value at trace time."""
    if size.is_number:
        return float(size)
    values = [x for n in (node, *node.all_input_nodes) for x in _tensors(n)]
    symbolic: Any = next(s for x in values for s in x.shape if isinstance(s, torch.SymInt))
    environment = symbolic.node.shape_env
    # torch before 2.13 has size_hint, which later ones warn about
    hint_of = getattr(environment, "optimization_hint", None) or environment.size_hint
    return float(size.xreplace({symbol: sympy.Integer(hint_of(symbol)) for symbol in size.free_symbols}))
