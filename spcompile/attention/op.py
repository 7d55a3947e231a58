"""The attention ops of the spx namespace: schema, implementation, fake and autograd, and the ring's list-of-ranks form.

B batch, N query heads, G key heads, S query rows, T keys, H head size of q and k, V of v. `mask` is the text of an
`AttentionMask`; document ids, key validity and the bias's columns are in the natural order of the sequence. What else
happens to the scores, and in which order, says `Scores`; a softcap or dropout of 0 is none. `inner` is that of `Ring`,
`hops` that of `ring_forward`, which spx::ring_hops finds; `tables` are what spx::tile_tables finds.
The memory order of results does not depend on the strides of the inputs: `out` lies in memory as [B, S, N, V], so that
the next projection reads it as [B, S, N * V] and both save one tensor; all else is contiguous. Importing this module
defines the ops.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from spcompile.attention.kernels import blocks, hop_state
from spcompile.attention.kernels.naive import accumulation_dtype
from spcompile.attention.ring.ring import ring_backward, ring_forward
from spcompile.attention.ring.ring_call import RingBackwardCall, RingCall
from spcompile.attention.scores.attention_call import Attention, AttentionBackwardCall, AttentionCall
from spcompile.attention.scores.provider import Rows
from spcompile.attention.scores.runs import Run, natural_runs, runs_of
from spcompile.collectives.point_to_point import Requests, drive, drive_all
from spcompile.diagnostics import RanksDisagree
from spcompile.torch_private_groups import resolve_process_group

if TYPE_CHECKING:
    from collections.abc import Sequence

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
_TABLES = "Tensor? tables=None"
_RESULT = "(Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks)"

Backward = AttentionBackwardCall | RingBackwardCall
BackwardResult = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

for _schema in (
    f"attention({_LOCAL}, {_OPTIONAL}, {_TABLES}) -> (Tensor out, Tensor lse)",
    f"attention_backward({_GRADS}, {_LOCAL}, {_WANTED}, {_TABLES}) -> {_RESULT}",
    f"ring_attention({_SHARDED}, {_OPTIONAL}, {_LAST}, {_TABLES}) -> (Tensor out, Tensor lse)",
    f"ring_attention_backward({_GRADS}, {_SHARDED}, {_WANTED}, {_LAST}, {_TABLES}) -> {_RESULT}",
):
    _LIBRARY.define(_schema, tags=_TAGS)


def _attention(*args: Any) -> tuple[Tensor, Tensor]:
    call = AttentionCall.bind(*args)
    (q_order, q_runs), (k_order, k_runs) = _order_and_runs(call)
    out, lse = hop_state.forward(
        _sorted(call.q, q_order),
        _sorted(call.k, k_order),
        _sorted(call.v, k_order),
        q_runs,
        k_runs,
        blocks.reordered(call.scores(), q_order),
    )
    return _rows_first(_unsorted(out, q_order)), _owned(_unsorted(lse, q_order))


def _attention_backward(*args: Any) -> BackwardResult:
    call = AttentionBackwardCall.bind(*args)
    (q_order, q_runs), (k_order, k_runs) = _order_and_runs(call)
    rows = Rows(
        _sorted(call.q, q_order),
        _sorted(call.out, q_order),
        _sorted(call.grad_out, q_order),
        _sorted(call.lse, q_order),
        None if call.grad_lse is None else _sorted(call.grad_lse, q_order),
    )
    (dq, dk, dv), dbias = hop_state.backward(
        rows,
        _sorted(call.k, k_order),
        _sorted(call.v, k_order),
        q_runs,
        k_runs,
        blocks.reordered(call.scores(), q_order),
        call.bias_gradient,
    )
    dq, dk, dv = _unsorted(dq, q_order), _unsorted(dk, k_order), _unsorted(dv, k_order)
    if dbias is not None and dbias.shape[2] != 1:
        dbias = _unsorted(dbias, q_order)
    return _owned(dq), _owned(dk), _owned(dv), *_gradients_of_scores(call, rows, q_runs, dbias)


def _ring(rank: int, call: RingCall) -> Requests[tuple[Tensor, Tensor]]:
    """One rank of the ring."""
    out, lse = yield from ring_forward(call.q, call.k, call.v, call.scores(), call.ring, rank, call.hops)
    return _rows_first(out), _owned(lse)


def _ring_backward(rank: int, call: RingBackwardCall) -> Requests[BackwardResult]:
    rows = Rows(call.q, call.out, call.grad_out, call.lse, call.grad_lse)
    dq, dk, dv, dbias = yield from ring_backward(
        rows, call.k, call.v, call.scores(), call.ring, rank, call.bias_gradient, call.hops
    )
    more = _gradients_of_scores(call, rows, call.ring.q_runs(rank), dbias)
    return _owned(dq), _owned(dk), _owned(dv), *more


def _gradients_of_scores(
    call: Backward, rows: Rows, q_runs: tuple[Run, ...], dbias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The last two results of a backward: of the bias and of the sinks."""
    wants_sinks = call.sinks is not None and call.sinks_gradient
    dsinks = blocks.sink_gradient(rows, q_runs, call.sinks) if wants_sinks else None
    return _optional(dbias, call.bias, call.q), _optional(dsinks, call.sinks, call.q)


def _group(axis: str, degree: int) -> dist.ProcessGroup:
    group = resolve_process_group(axis)
    if group.size() != degree:
        raise RanksDisagree(f"group {axis!r} has {group.size()} ranks, the graph was compiled for {degree}")
    return group


def _ring_attention(*args: Any) -> tuple[Tensor, Tensor]:
    call = RingCall.bind(*args)
    group = _group(call.axis, call.degree)
    return drive(_ring(group.rank(), call), group)


def _ring_attention_backward(*args: Any) -> BackwardResult:
    call = RingBackwardCall.bind(*args)
    group = _group(call.axis, call.degree)
    return drive(_ring_backward(group.rank(), call), group)


def spec_ring_attention(ranks: Sequence[tuple[Any, ...]]) -> list[tuple[Tensor, Tensor]]:
    """What spx::ring_attention returns on every rank, given every rank's arguments; needs no process group."""
    return drive_all([_ring(rank, RingCall.bind(*args)) for rank, args in enumerate(ranks)])


def spec_ring_attention_backward(ranks: Sequence[tuple[Any, ...]]) -> list[BackwardResult]:
    """What spx::ring_attention_backward returns on every rank, given every rank's arguments."""
    return drive_all([_ring_backward(rank, RingBackwardCall.bind(*args)) for rank, args in enumerate(ranks)])


Runs = tuple["Tensor | None", tuple[Run, ...]]  # the order that sorts what they are about, and the runs


def _order_and_runs(call: AttentionCall) -> tuple[Runs, Runs]:
    """Of rows and of keys. Where a kernel reads tables, positions are not looked at here, which would wait for them."""
    if call.tables is not None and hop_state.reads_tables(call.q, call.k, call.v, call.scores()):
        return (None, natural_runs(call.q.shape[2])), (None, natural_runs(call.k.shape[2]))
    return _runs(call.q_positions, call.q), _runs(call.k_positions, call.k)


def _runs(positions: Tensor | None, x: Tensor) -> Runs:
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


def _fake_forward(forward: type[Attention], *args: Any) -> tuple[Tensor, Tensor]:
    call = forward.bind(*args)
    size = call.sizes
    out_BSNV = call.q.new_empty((size.batch, size.q_rows, size.heads, size.v_size))
    lse_BNS = call.q.new_empty((size.batch, size.heads, size.q_rows), dtype=accumulation_dtype(call.q.dtype))
    return out_BSNV.transpose(1, 2), lse_BNS


def _fake_backward(backward: type[Backward], *args: Any) -> BackwardResult:
    call = backward.bind(*args)
    wants_bias = call.bias is not None and call.bias_gradient and call.bias.dtype.is_floating_point
    wants_sinks = call.sinks is not None and call.sinks_gradient
    dq, dk, dv = (x.new_empty(x.shape) for x in (call.q, call.k, call.v))
    dbias, dsinks = (
        x.new_empty(x.shape) if is_wanted else call.q.new_empty(0)
        for x, is_wanted in ((call.bias, wants_bias), (call.sinks, wants_sinks))
    )
    return dq, dk, dv, dbias, dsinks


def _define(
    forward: type[Attention],
    backward: type[Backward],
    kernel: Any,
    backward_kernel: Any,
) -> None:
    """Implementation, fake and autograd of one forward op and its backward op."""
    name = forward.NAME
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    _LIBRARY.impl(backward.NAME, backward_kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"spx::{name}", functools.partial(_fake_forward, forward), lib=_LIBRARY)
    torch.library.register_fake(f"spx::{backward.NAME}", functools.partial(_fake_backward, backward), lib=_LIBRARY)

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)
        ctx.is_tensor = [isinstance(x, torch.Tensor) for x in inputs]
        ctx.others = [x for x in inputs if not isinstance(x, torch.Tensor)]
        ctx.save_for_backward(*output, *(x for x in inputs if isinstance(x, torch.Tensor)))

    def differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        out, lse, *tensors = ctx.saved_tensors
        remaining, others = iter(tensors), iter(ctx.others)
        call = forward.bind(*(next(remaining) if is_tensor else next(others) for is_tensor in ctx.is_tensor))
        needed = dict(zip(call.named(), ctx.needs_input_grad, strict=False))  # trailing defaults are not among them
        if needed.get("alibi_slopes"):
            raise NotImplementedError(f"spx::{name} has no gradient of alibi_slopes")
        gradients = call.into(
            backward,
            grad_out=torch.zeros_like(out) if grad_out is None else grad_out,
            grad_lse=grad_lse,
            out=out,
            lse=lse,
            bias_gradient=needed["bias"],
            sinks_gradient=needed.get("sinks", False),
        )
        return tuple(gradients.gradients(forward, *gradients.run()))

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(f"spx::{name} can be differentiated once only")

    torch.library.register_autograd(f"spx::{name}", differentiate, setup_context=save, lib=_LIBRARY)
    torch.library.register_autograd(f"spx::{backward.NAME}", refuse, lib=_LIBRARY)


_define(AttentionCall, AttentionBackwardCall, _attention, _attention_backward)
_define(RingCall, RingBackwardCall, _ring_attention, _ring_attention_backward)

attention = AttentionCall.target()
ring_attention = RingCall.target()
