"""Where a final graph multiplies what an all-gather gives, or reduce-scatters what it multiplied.

    gather    all_gather -> views -> mm, mm, ...    all readers that multiply the gathered rows from the left
    scatter   mm, mm, ... -> views, sums -> reduce_scatter

`rewrite` puts the op of `spcompile.collectives.pipelined_matmuls` there.
Operators on symmetric memory know neither padding nor sums of products.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
import torch.fx as fx

import spcompile.collectives.pipelined_matmuls  # noqa: F401  (defines the ops)
from spcompile.collectives.typed_calls import (
    AllGatherCall,
    AllGatherMatmulCall,
    MatmulReduceScatterCall,
    ReduceScatterCall,
)
from spcompile.graph.edit import call, replace
from spcompile.graph.edit import operand as operand_of
from spcompile.graph.sizes import divides, expression, same, same_shape
from spcompile.graph.typed_call import value_of
from spcompile.machine.links import Link
from spcompile.schedule.op_cost import Chunks, gathering_chunks, scattering_chunks

aten, spx = torch.ops.aten, torch.ops.spx
_ROW_VIEWS = {aten.view.default, aten._unsafe_view.default, aten.clone.default}


@dataclass(frozen=True)
class Site:
    """A collective and the products beside it.

    gathered: others read the gathered tensor too. shape: of what a scatter sums, nodes for sizes that are symbols.
    """

    collective: fx.Node
    products: tuple[fx.Node, ...]
    chunks: Chunks
    gathered: bool = False
    shape: tuple[Any, ...] = ()

    @property
    def is_gather(self) -> bool:
        return AllGatherCall.is_call(self.collective)

    @property
    def axis(self) -> str:
        """The axis along which it communicates."""
        return _collective(self.collective).axis

    def not_on_symmetric_memory(self, link: Link) -> str | None:
        """Why torch's operators on symmetric memory do not do what this site does; None where they do."""
        collective = _collective(self.collective)
        whole = value_of(self.collective if self.is_gather else collective.x)
        if whole.device.type != "cuda":
            return f"its tensors are on {whole.device.type}"
        if not link.reaches_memory:
            return f"ranks of {self.axis} talk over {link.name}, and do not reach each other's memory"
        if not divides(collective.degree, whole.shape[collective.dim]):
            return f"{whole.shape[collective.dim]} rows do not divide by {collective.degree}, and it knows no padding"
        if not self.is_gather and len(self.products) > 1:
            return "it knows no sum of several products"
        return None


def sites_of(graph: fx.Graph) -> list[Site]:
    """All of a graph, in its order; two of them may want the same product."""
    place = {node: at for at, node in enumerate(graph.nodes)}
    sizes = {n: n.meta["val"] for n in graph.nodes if isinstance(n.meta.get("val"), torch.SymInt)}
    first = {expression(size): n for n, size in reversed(sizes.items())}
    found = (_site(node, place, first) for node in graph.nodes if node.op == "call_function")
    return [site for site in found if site is not None]


def rewrite(site: Site, symmetric: bool = False) -> None:
    """Put one op in place of a collective and its products. symmetric: on symmetric memory."""
    (_rewrite_gather if site.is_gather else _rewrite_scatter)(site, symmetric)


def _site(node: fx.Node, place: dict[fx.Node, int], first: dict[sympy.Expr, fx.Node]) -> Site | None:
    """first: the first node of each size that is a symbol."""
    if not AllGatherCall.is_call(node) and not ReduceScatterCall.is_call(node):
        return None
    collective = _collective(node)
    value = value_of(collective.x)
    is_cut_by_rows = collective.dim < value.dim() - 1 and collective.order == "contiguous" and collective.degree > 1
    if not is_cut_by_rows or not value.is_floating_point():
        return None
    layout = collective.dim, collective.axis, collective.degree
    if isinstance(collective, AllGatherCall):
        rows = list(_row_views(node))
        products = tuple(n for view in rows for n in view.users if _multiplies(n, view) and _movable(n, node, place))
        others = any(n not in products and n not in rows for view in rows for n in view.users)
        weights = [operand_of(n, 1).meta["val"] for n in products]
        return Site(node, products, gathering_chunks(value, weights, *layout, others), others) if products else None
    found = _summed_products(collective.x)
    shape = tuple(size if isinstance(size, int) else first.get(expression(size)) for size in value.shape)
    if not found or any(size is None or (size in place and place[size] > place[node]) for size in shape):
        return None
    weights = [operand_of(n, 1).meta["val"] for n in found]
    return Site(node, tuple(found), scattering_chunks(node.meta["val"], weights, *layout), shape=shape)


def _collective(node: fx.Node) -> AllGatherCall | ReduceScatterCall:
    return AllGatherCall.of(node) if AllGatherCall.is_call(node) else ReduceScatterCall.of(node)


def _row_views(node: fx.Node) -> Iterator[fx.Node]:
    """A value and its reshapes that leave the last dim as it is: the same rows in the same order."""
    yield node
    for user in node.users:
        if _is_row_view(user):
            yield from _row_views(user)


def _is_row_view(node: fx.Node) -> bool:
    if node.target not in _ROW_VIEWS:
        return False
    before, after = operand_of(node, 0).meta["val"], node.meta["val"]
    return bool(after.dim() and same(before.shape[-1], after.shape[-1]))


def _multiplies(node: fx.Node, rows: fx.Node) -> bool:
    return node.target is aten.mm.default and node.args[0] is rows and node.args[1] is not rows


def _movable(product: fx.Node, before: fx.Node, place: dict[fx.Node, int]) -> bool:
    """Whether the weight of a product can be made in front of a collective."""
    return _behind(operand_of(product, 1), before, place) is not None


def _behind(node: fx.Node, before: fx.Node, place: dict[fx.Node, int]) -> list[fx.Node] | None:
    """What makes a node and stands behind `before`, in order; None if it cannot move in front of it."""
    found: set[fx.Node] = set()
    pending = [node]
    while pending:
        behind = pending.pop()
        if behind in found or place[behind] < place[before]:
            continue
        target: Any = behind.target
        is_random = torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())
        if behind is before or behind.is_impure() or is_random or _communicates(behind):
            return None
        found.add(behind)
        pending += behind.all_input_nodes
    return sorted(found, key=lambda n: place[n])


def _communicates(node: fx.Node) -> bool:
    """Whether ranks meet in a node: those keep their order."""
    target: Any = node.target
    in_spx = isinstance(target, torch._ops.OpOverload) and target.namespace == "spx"
    return in_spx and target is not spx.shard.default


def _summed_products(node: fx.Node) -> list[fx.Node]:
    """The products whose sum a value is, none of which anyone else reads; empty if it is anything else."""
    found: list[fx.Node] = []
    pending = [node]
    while pending:
        term = pending.pop()
        if len(term.users) != 1:
            return []
        if term.target is aten.mm.default:
            found.append(term)
        elif _is_row_view(term):
            pending.append(operand_of(term, 0))
        elif term.target is aten.add.Tensor and not term.kwargs and _adds_equals(term):
            pending += [operand_of(term, 1), operand_of(term, 0)]
        else:
            return []
    dtypes = {n.meta["val"].dtype for n in found}
    return found if len(dtypes) == 1 else []


def _adds_equals(node: fx.Node) -> bool:
    terms = [x.meta["val"] if isinstance(x, fx.Node) else None for x in node.args]
    value = node.meta["val"]
    return all(x is not None and x.dtype == value.dtype and same_shape(x, value) for x in terms)


def _rewrite_gather(site: Site, symmetric: bool) -> None:
    gather = site.collective
    place = {node: at for at, node in enumerate(gather.graph.nodes)}
    for product in site.products:
        for node in _behind(operand_of(product, 1), gather, place) or ():
            gather.prepend(node)
    weights = [operand_of(product, 1) for product in site.products]
    of_both = AllGatherCall.of(gather).into(
        AllGatherMatmulCall, weights=weights, gathered=site.gathered, symmetric=symmetric
    )
    fused = _named_after(gather, of_both.insert(like=gather))
    results = [
        _named_after(gather, call(gather.graph, operator.getitem, (fused, number), like=gather))
        for number in range(len(site.products) + int(site.gathered))
    ]
    for product, result in zip(site.products, results[int(site.gathered) :], strict=True):
        replace(product, result)
    if site.gathered:
        gather.replace_all_uses_with(results[0])
    _erase_chain(gather)


def _rewrite_scatter(site: Site, symmetric: bool) -> None:
    scatter = site.collective
    of_sum = ReduceScatterCall.of(scatter)
    xs, weights = ([operand_of(product, i) for product in site.products] for i in (0, 1))
    of_both = of_sum.into(MatmulReduceScatterCall, xs=xs, weights=weights, shape=list(site.shape), symmetric=symmetric)
    replace(scatter, _named_after(scatter, of_both.insert(like=scatter)))
    _erase_chain(of_sum.x)


def _named_after(at: fx.Node, node: fx.Node) -> fx.Node:
    """A new node with the origin of `at`."""
    node.meta.update({key: at.meta[key] for key in ("seq_nr", "spx_origin", "fwd_nn_module_stack") if key in at.meta})
    return node


def _erase_chain(node: fx.Node) -> None:
    """Erase a node and what only it reads, or what reads only it, as far as nobody wants it."""
    views = [user for user in node.users if _is_row_view(user)]
    for view in views:
        _erase_chain(view)
    if node.users or node.op != "call_function":
        return
    operands = [n for n in node.all_input_nodes if n.target in (*_ROW_VIEWS, aten.add.Tensor, aten.mm.default)]
    node.graph.erase_node(node)
    for operand in operands:
        if not operand.users:
            _erase_chain(operand)
