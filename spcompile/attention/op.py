"""The attention ops of the spx namespace: schema, implementation, fake and autograd, and the ring's list-of-ranks form.

B batch, N query heads, G key heads, S query rows, T keys, H head size of q and k, V of v. `mask` is the text of an
`AttentionMask`; document ids, key validity and the bias's columns are in the natural order of the sequence. What else
happens to the scores, and in which order, says `Scores`; a softcap or dropout of 0 is none. `inner` is that of `Ring`,
`hops` that of `ring_forward`, which spx::ring_hops finds.
The memory order of results does not depend on the strides of the inputs: `out` lies in memory as [B, S, N, V], so that
the next projection reads it as [B, S, N * V] and both save one tensor; all else is contiguous. Importing this module
defines the ops.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from spcompile.attention.kernels import blocks, carry
from spcompile.attention.kernels.naive import accumulation_dtype
from spcompile.attention.ring.ring import Ring, ring_backward, ring_forward
from spcompile.attention.scores.dropout import Dropout
from spcompile.attention.scores.mask import AttentionMask
from spcompile.attention.scores.provider import Rows, Scores
from spcompile.attention.scores.runs import Run, natural_runs, runs_of
from spcompile.collectives.point_to_point import Requests, drive, simulate
from spcompile.diagnostics import RanksDisagree
from spcompile.torch_private import resolve_process_group

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch.distributed as dist
    from torch import Tensor

_LIBRARY = torch.library.Library("spx", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)

_DATA = "Tensor? q_documents, Tensor? k_documents, Tensor? key_valid, Tensor? bias, str mask, float scale"
_LOCAL = f"Tensor q, Tensor k, Tensor v, Tensor? q_positions, Tensor? k_positions, {_DATA}"
_SHARDED = f"Tensor q, Tensor k, Tensor v, {_DATA}, SymInt q_length, SymInt k_length, str axis, int degree, str order"
_GRADS = "Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse"
_MORE = ("Tensor? alibi_slopes", "Tensor? sinks", "Tensor? dropout_seed", "float softcap", "float dropout_p")
_OPTIONAL = ", ".join(f"{x}={'None' if x.startswith('Tensor') else '0.0'}" for x in _MORE)
_WANTED = f"bool bias_gradient, {_OPTIONAL}, bool sinks_gradient=False"
_LAST = "int inner=1, Tensor? hops=None"
_RESULT = "(Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks)"
DEFAULTS = (None, None, None, 0.0, 0.0)  # of _MORE; PyTorch leaves out trailing arguments that equal them
_AXIS = 11  # place of axis and degree among the arguments of ring_attention

BackwardResult = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

for _schema in (
    f"attention({_LOCAL}, {_OPTIONAL}) -> (Tensor out, Tensor lse)",
    f"attention_backward({_GRADS}, {_LOCAL}, {_WANTED}) -> {_RESULT}",
    f"ring_attention({_SHARDED}, {_OPTIONAL}, {_LAST}) -> (Tensor out, Tensor lse)",
    f"ring_attention_backward({_GRADS}, {_SHARDED}, {_WANTED}, {_LAST}) -> {_RESULT}",
):
    _LIBRARY.define(_schema, tags=_TAGS)


def _scores(
    data: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    mask: str,
    scale: float,
    more: tuple[Tensor | None, Tensor | None, Tensor | None, float, float],
) -> Scores:
    """The scores of an op's arguments. data: document ids, key validity, bias; more: those of `_MORE`."""
    slopes, sinks, seed, softcap, p = more
    dropout = None if seed is None or p == 0 else Dropout(p, seed)
    return Scores(AttentionMask.parse(mask), scale, *data, softcap, slopes, sinks, dropout)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_positions: Tensor | None,
    k_positions: Tensor | None,
    q_documents: Tensor | None,
    k_documents: Tensor | None,
    key_valid: Tensor | None,
    bias: Tensor | None,
    mask: str,
    scale: float,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    more = (alibi_slopes, sinks, dropout_seed, softcap, dropout_p)
    scores = _scores((q_documents, k_documents, key_valid, bias), mask, scale, more)
    q_order, q_runs = _runs(q_positions, q)
    k_order, k_runs = _runs(k_positions, k)
    out, lse = carry.forward(
        _sorted(q, q_order),
        _sorted(k, k_order),
        _sorted(v, k_order),
        q_runs,
        k_runs,
        blocks.reordered(scores, q_order),
    )
    return _rows_first(_unsorted(out, q_order)), _owned(_unsorted(lse, q_order))


def _attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_positions: Tensor | None,
    k_positions: Tensor | None,
    q_documents: Tensor | None,
    k_documents: Tensor | None,
    key_valid: Tensor | None,
    bias: Tensor | None,
    mask: str,
    scale: float,
    bias_gradient: bool,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    sinks_gradient: bool = False,
) -> BackwardResult:
    more = (alibi_slopes, sinks, dropout_seed, softcap, dropout_p)
    scores = _scores((q_documents, k_documents, key_valid, bias), mask, scale, more)
    q_order, q_runs = _runs(q_positions, q)
    k_order, k_runs = _runs(k_positions, k)
    rows = Rows(
        _sorted(q, q_order),
        _sorted(out, q_order),
        _sorted(grad_out, q_order),
        _sorted(lse, q_order),
        None if grad_lse is None else _sorted(grad_lse, q_order),
    )
    (dq, dk, dv), dbias = carry.backward(
        rows,
        _sorted(k, k_order),
        _sorted(v, k_order),
        q_runs,
        k_runs,
        blocks.reordered(scores, q_order),
        bias_gradient,
    )
    dq, dk, dv = _unsorted(dq, q_order), _unsorted(dk, k_order), _unsorted(dv, k_order)
    if dbias is not None and dbias.shape[2] != 1:
        dbias = _unsorted(dbias, q_order)
    dsinks = blocks.sink_gradient(rows, q_runs, sinks) if sinks is not None and sinks_gradient else None
    return _owned(dq), _owned(dk), _owned(dv), _optional(dbias, bias, q), _optional(dsinks, sinks, q)


def _ring(
    rank: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_documents: Tensor | None,
    k_documents: Tensor | None,
    key_valid: Tensor | None,
    bias: Tensor | None,
    mask: str,
    scale: float,
    q_length: int,
    k_length: int,
    axis: str,
    degree: int,
    order: str,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    inner: int = 1,
    hops: Tensor | None = None,
) -> Requests[tuple[Tensor, Tensor]]:
    """One rank of the ring; the arguments are those of spx::ring_attention."""
    more = (alibi_slopes, sinks, dropout_seed, softcap, dropout_p)
    scores = _scores((q_documents, k_documents, key_valid, bias), mask, scale, more)
    ring = Ring(q_length, k_length, degree, order, inner)
    out, lse = yield from ring_forward(q, k, v, scores, ring, rank, hops)
    return _rows_first(out), _owned(lse)


def _ring_backward(
    rank: int,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_documents: Tensor | None,
    k_documents: Tensor | None,
    key_valid: Tensor | None,
    bias: Tensor | None,
    mask: str,
    scale: float,
    q_length: int,
    k_length: int,
    axis: str,
    degree: int,
    order: str,
    bias_gradient: bool,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    sinks_gradient: bool = False,
    inner: int = 1,
    hops: Tensor | None = None,
) -> Requests[BackwardResult]:
    more = (alibi_slopes, sinks, dropout_seed, softcap, dropout_p)
    scores = _scores((q_documents, k_documents, key_valid, bias), mask, scale, more)
    rows = Rows(q, out, grad_out, lse, grad_lse)
    ring = Ring(q_length, k_length, degree, order, inner)
    dq, dk, dv, dbias = yield from ring_backward(rows, k, v, scores, ring, rank, bias_gradient, hops)
    dsinks = blocks.sink_gradient(rows, ring.q_runs(rank), sinks) if sinks is not None and sinks_gradient else None
    return _owned(dq), _owned(dk), _owned(dv), _optional(dbias, bias, q), _optional(dsinks, sinks, q)


def _group(axis: str, degree: int) -> dist.ProcessGroup:
    group = resolve_process_group(axis)
    if group.size() != degree:
        raise RanksDisagree(f"group {axis!r} has {group.size()} ranks, the graph was compiled for {degree}")
    return group


def _ring_attention(*args: Any) -> tuple[Tensor, Tensor]:
    group = _group(*args[_AXIS : _AXIS + 2])
    return drive(_ring(group.rank(), *args), group)


def _ring_attention_backward(*args: Any) -> BackwardResult:
    group = _group(*args[4 + _AXIS : 4 + _AXIS + 2])
    return drive(_ring_backward(group.rank(), *args), group)


def spec_ring_attention(ranks: Sequence[tuple[Any, ...]]) -> list[tuple[Tensor, Tensor]]:
    """What spx::ring_attention returns on every rank, given every rank's arguments; needs no process group."""
    return simulate([_ring(rank, *args) for rank, args in enumerate(ranks)])


def spec_ring_attention_backward(ranks: Sequence[tuple[Any, ...]]) -> list[BackwardResult]:
    """What spx::ring_attention_backward returns on every rank, given every rank's arguments."""
    return simulate([_ring_backward(rank, *args) for rank, args in enumerate(ranks)])


def _runs(positions: Tensor | None, x: Tensor) -> tuple[Tensor | None, tuple[Run, ...]]:
    return (None, natural_runs(x.shape[2])) if positions is None else runs_of(positions)


def _sorted(x: Tensor, order: Tensor | None) -> Tensor:
    return x if order is None else x.index_select(2, order)


def _unsorted(x: Tensor, order: Tensor | None) -> Tensor:
    return x if order is None else torch.empty_like(x).index_copy_(2, order, x)


def _owned(x: Tensor) -> Tensor:
    """`x` contiguous and alone in its storage, as results of ops must be."""
    alone = x.untyped_storage().nbytes() == x.numel() * x.element_size()
    return x if alone and x.is_contiguous() else x.clone(memory_format=torch.contiguous_format)


def _rows_first(out: Tensor) -> Tensor:
    """`out` [B, N, S, V], alone in its storage and in memory as [B, S, N, V]."""
    out_BSNV = _owned(out.transpose(1, 2))
    return out_BSNV.view(-1).view(out_BSNV.shape).transpose(1, 2)  # twice: a size of 1 may have kept any stride


def _optional(grad: Tensor | None, x: Tensor | None, q: Tensor) -> Tensor:
    """The gradient of an operand that may be missing; empty where there is none."""
    return q.new_empty(0) if grad is None or x is None else _owned(grad.to(x.dtype))


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    B, N, S, _ = q.shape
    out_BSNV = q.new_empty((B, S, N, v.shape[3]))
    return out_BSNV.transpose(1, 2), q.new_empty((B, N, S), dtype=accumulation_dtype(q.dtype))


def _fake_backward(bias_index: int, width: int) -> Callable[..., BackwardResult]:
    """The fake of a backward op.

    bias_index: where the bias is among the forward's arguments; width: how many of those are required.
    """

    def fake(grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *rest: Any) -> Any:
        q, k, v, bias, bias_gradient = *rest[:3], rest[bias_index], rest[width]
        given = rest[width + 1 :]
        sinks, sinks_gradient = (given[i] if i < len(given) else None for i in (1, len(_MORE)))
        wants_bias = bias is not None and bias_gradient and bias.dtype.is_floating_point
        dbias = bias.new_empty(bias.shape) if wants_bias else q.new_empty(0)
        dsinks = sinks.new_empty(sinks.shape) if sinks is not None and sinks_gradient else q.new_empty(0)
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dbias, dsinks

    return fake


def _define(name: str, forward: Any, backward: Any, bias_index: int) -> None:
    """Implementation, fake and autograd of one forward op and its backward op.

    bias_index: place of the bias; the arguments of `_MORE` follow behind the required ones.
    """
    schema = getattr(torch.ops.spx, name).default._schema
    slopes_index = [argument.name for argument in schema.arguments].index("alibi_slopes")
    sinks_index = slopes_index + 1
    _LIBRARY.impl(name, forward, "CompositeExplicitAutograd")
    _LIBRARY.impl(f"{name}_backward", backward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"spx::{name}", _fake_forward, lib=_LIBRARY)
    fake = _fake_backward(bias_index, slopes_index)
    torch.library.register_fake(f"spx::{name}_backward", fake, lib=_LIBRARY)

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)
        ctx.is_tensor = [isinstance(x, torch.Tensor) for x in inputs]
        ctx.others = [x for x in inputs if not isinstance(x, torch.Tensor)]
        ctx.save_for_backward(*output, *(x for x in inputs if isinstance(x, torch.Tensor)))

    def differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        out, lse, *tensors = ctx.saved_tensors
        remaining, others = iter(tensors), iter(ctx.others)
        inputs = [next(remaining) if is_tensor else next(others) for is_tensor in ctx.is_tensor]
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        op = getattr(torch.ops.spx, f"{name}_backward")
        needed = (*ctx.needs_input_grad, *(False,) * len(_MORE))  # it lacks trailing arguments left at their default
        if needed[slopes_index]:
            raise NotImplementedError(f"spx::{name} has no gradient of alibi_slopes")
        wants_bias, wants_sinks = needed[bias_index], needed[sinks_index]
        inputs += [argument.default_value for argument in schema.arguments[len(inputs) :]]
        data, more = inputs[:slopes_index], inputs[slopes_index : slopes_index + len(_MORE)]
        layout = inputs[slopes_index + len(_MORE) :]
        dq, dk, dv, dbias, dsinks = op(grad_out, grad_lse, out, lse, *data, wants_bias, *more, wants_sinks, *layout)
        grads: list[Tensor | None] = [None] * len(inputs)
        grads[:3] = dq, dk, dv
        grads[bias_index] = dbias if wants_bias else None
        grads[sinks_index] = dsinks if wants_sinks else None
        return tuple(grads)

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(f"spx::{name} can be differentiated once only")

    torch.library.register_autograd(f"spx::{name}", differentiate, setup_context=save, lib=_LIBRARY)
    torch.library.register_autograd(f"spx::{name}_backward", refuse, lib=_LIBRARY)


_define("attention", _attention, _attention_backward, bias_index=8)
_define("ring_attention", _ring_attention, _ring_attention_backward, bias_index=6)

attention = torch.ops.spx.attention.default
ring_attention = torch.ops.spx.ring_attention.default
