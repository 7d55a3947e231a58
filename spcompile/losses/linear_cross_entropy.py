"""spx.linear_cross_entropy: what cross entropies are made of, from the rows before the head, in chunks of rows.

For logits z = steps(x @ weight.T + bias), of which only a chunk of rows stands at any time, and for each row:

    lse      log(sum(exp(z))) over the classes of this rank
    picked   the target's logit; 0 where another rank has the target, or none has
    total    the sum of the logits, each times its class's weight; 0 unless it is wanted (label smoothing)

A cross entropy is lse - picked. Ranks that have some of the classes each send these two or three numbers a row.
Forward keeps no logits: the backward makes each chunk again (as Liger and torch's own linear_cross_entropy do in other
ways: arXiv 2410.10989). The gradients of weight and bias are added up over chunks in float32 and rounded once.

N rows, D width, C classes on this rank. R rows of a chunk. Importing this module defines the ops.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from spcompile.losses.linear_loss_call import LinearCrossEntropyBackwardCall, LinearCrossEntropyCall, LinearLoss
from spcompile.losses.row_chunks import chunks_of_rows

_LIBRARY = torch.library.Library("spx", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
_OPERANDS = "Tensor x, Tensor weight, Tensor? bias, Tensor labels, Tensor? class_weight, Tensor? first, SymInt classes"
_MORE = "str steps='', int ignore_index=-100, bool with_total=False"
_GRADS = "Tensor grad_lse, Tensor grad_picked, Tensor? grad_total, Tensor lse"
_WANTED = "bool x_gradient=True, bool weight_gradient=True"
_LIBRARY.define(f"linear_cross_entropy({_OPERANDS}, {_MORE}) -> (Tensor lse, Tensor picked, Tensor total)", tags=_TAGS)
_LIBRARY.define(
    f"linear_cross_entropy_backward({_GRADS}, {_OPERANDS}, {_MORE}, {_WANTED}) -> (Tensor dx, Tensor dw, Tensor db)",
    tags=_TAGS,
)

Three = tuple[Tensor, Tensor, Tensor]


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which logits are exponentiated and gradients of weights added up: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def _forward(*args: Any) -> Three:
    call = LinearCrossEntropyCall.bind(*args)
    _check_targets(call)
    x_ND, labels_N = _flat(call)
    lse_N, picked_N, total_N = (x_ND.new_empty(len(x_ND), dtype=_dtype_of_sums(call)) for _ in range(3))
    if not call.with_total:
        total_N.zero_()
    for rows in chunks_of_rows(len(x_ND), x_ND.shape[1], len(call.weight)):
        z_RC = _logits_of_chunk(call, x_ND[rows])
        place_R1, is_here_R1 = _places(call, labels_N[rows], z_RC.shape[1])
        picked_N[rows] = z_RC.gather(1, place_R1).where(is_here_R1, 0).squeeze(1)
        if call.with_total:
            total_N[rows] = z_RC @ _class_weights(call, z_RC)
        largest_R1 = _finite(z_RC.amax(1, keepdim=True))
        sums_R1 = z_RC.sub_(largest_R1).exp_().sum(1, keepdim=True)
        lse_N[rows] = (sums_R1.log() + largest_R1).squeeze(1)
    return _in_rows(call, lse_N), _in_rows(call, picked_N), _in_rows(call, total_N)


def _backward(*args: Any) -> Three:
    call = LinearCrossEntropyBackwardCall.bind(*args)
    x_ND, labels_N = _flat(call)
    lse_N = _finite(call.lse).reshape(-1)
    grad_lse_N, grad_picked_N = call.grad_lse.reshape(-1), call.grad_picked.reshape(-1)
    grad_total_N = None if call.grad_total is None or not call.with_total else call.grad_total.reshape(-1)
    dx_ND = x_ND.new_empty(x_ND.shape if call.x_gradient else 0)
    sums = wide(call.weight.dtype)
    dw_CD = call.weight.new_zeros(call.weight.shape if call.weight_gradient else 0, dtype=sums)
    db_C = x_ND.new_zeros(0 if call.bias is None else len(call.bias), dtype=sums)
    for rows in chunks_of_rows(len(x_ND), x_ND.shape[1], len(call.weight)):
        kept: list[Tensor] = []
        z_RC = _logits_of_chunk(call, x_ND[rows], kept)
        dz_RC = z_RC.sub_(lse_N[rows, None]).exp_().mul_(grad_lse_N[rows, None])
        if grad_total_N is not None:
            dz_RC.addr_(grad_total_N[rows], _class_weights(call, dz_RC))
        place_R1, is_here_R1 = _places(call, labels_N[rows], dz_RC.shape[1])
        dz_RC.scatter_add_(1, place_R1, grad_picked_N[rows, None].where(is_here_R1, 0))
        del z_RC
        dz_RC = call.logit_steps.gradient(dz_RC, x_ND.dtype, kept)
        if call.x_gradient:
            torch.mm(dz_RC, call.weight, out=dx_ND[rows])
        if call.weight_gradient:
            _add_product(dw_CD, dz_RC, x_ND[rows])
        if call.bias is not None:
            db_C += dz_RC.sum(0, dtype=sums)
    dx = dx_ND.reshape(call.x.shape) if call.x_gradient else dx_ND
    return dx, dw_CD.to(call.weight.dtype), db_C.to(x_ND.dtype)


def _flat(call: LinearLoss) -> tuple[Tensor, Tensor]:
    return call.x.reshape(-1, call.x.shape[-1]), call.labels.reshape(-1)


def _in_rows(call: LinearLoss, values_N: Tensor) -> Tensor:
    return values_N.view(call.labels.shape)


def _dtype_of_sums(call: LinearLoss) -> torch.dtype:
    return wide(call.logit_steps.dtype_of(call.x.dtype))


def _logits_of_chunk(call: LinearLoss, x_RD: Tensor, kept: list[Tensor] | None = None) -> Tensor:
    """The logits of some rows in the dtype of the results, which the caller may overwrite; padding is very small."""
    z_RC = call.logit_steps.apply(torch.nn.functional.linear(x_RD, call.weight, call.bias), kept)
    is_kept = bool(kept) and z_RC is kept[-1]  # type: ignore[index]
    z_RC = z_RC.clone() if is_kept and z_RC.dtype == _dtype_of_sums(call) else z_RC.to(_dtype_of_sums(call))
    present_C = _present_classes(call, z_RC)
    return z_RC if present_C is None else z_RC.masked_fill_(~present_C, torch.finfo(z_RC.dtype).min)


def _present_classes(call: LinearLoss, z_RC: Tensor) -> Tensor | None:
    """Which columns are classes, where some may be padding."""
    if call.first is None:
        return None
    return torch.arange(z_RC.shape[1], device=z_RC.device) + call.first < call.classes


def _class_weights(call: LinearLoss, z_RC: Tensor) -> Tensor:
    """What each column counts in `total` [C]; padding counts nothing."""
    present_C = _present_classes(call, z_RC)
    if call.class_weight is None:
        weights_C = z_RC.new_ones(z_RC.shape[1])
    elif call.first is None:
        weights_C = call.class_weight.to(z_RC.dtype)
    else:
        columns_C = torch.arange(z_RC.shape[1], device=z_RC.device) + call.first
        weights_C = call.class_weight.to(z_RC.dtype)[columns_C.clamp(max=call.classes - 1)]
    return weights_C if present_C is None else weights_C.where(present_C, 0)


def _places(call: LinearLoss, labels_R: Tensor, C: int) -> tuple[Tensor, Tensor]:
    """(column of each row's target, 0 where this rank does not have it; whether it has it), [R, 1]."""
    place_R1 = (labels_R if call.first is None else labels_R - call.first).unsqueeze(1)
    is_here_R1 = (place_R1 >= 0) & (place_R1 < C) & (labels_R != call.ignore_index).unsqueeze(1)
    return place_R1.where(is_here_R1, 0), is_here_R1


def _finite(values: Tensor) -> Tensor:
    """No -inf, as of a row in which this rank excludes all its classes: -inf less -inf is no number."""
    return values.clamp(min=torch.finfo(values.dtype).min)


def _add_product(sum_CD: Tensor, dz_RC: Tensor, x_RD: Tensor) -> None:
    """Sum += dz.T @ x, with products and sums in the dtype of `sum`."""
    if dz_RC.dtype == sum_CD.dtype:
        sum_CD.addmm_(dz_RC.t(), x_RD)
    elif dz_RC.is_cuda:  # kernels that read half precision and write float32; in blocks no larger than the chunk
        block = max(1, dz_RC.numel() // max(1, x_RD.shape[1]))
        for dz_RB, part_BD in zip(dz_RC.split(block, 1), sum_CD.split(block), strict=True):
            part_BD += torch.mm(dz_RB.t(), x_RD, out_dtype=sum_CD.dtype)
    else:
        sum_CD.addmm_(dz_RC.t().to(sum_CD.dtype), x_RD.to(sum_CD.dtype))


def _check_targets(call: LinearCrossEntropyCall) -> None:
    """A target that is no class is an error, as in torch."""
    is_class = (call.labels >= 0) & (call.labels < call.classes) | (call.labels == call.ignore_index)
    if call.labels.is_cuda:
        torch._assert_async(is_class.all(), "a target is out of bounds")
    elif not bool(is_class.all()):
        raise IndexError(f"Target {int(call.labels[~is_class][0])} is out of bounds.")


def _forward_shapes(*args: Any) -> Three:
    call = LinearCrossEntropyCall.bind(*args)
    rows = call.x.shape[:-1]
    torch._check(len(rows) == call.labels.dim(), lambda: f"labels of {call.labels.shape} for rows of {rows}")
    for one, other in zip(rows, call.labels.shape, strict=True):
        torch._check(one == other, lambda: f"labels of {call.labels.shape} for rows of {rows}")
    lse, picked, total = (call.x.new_empty(call.labels.shape, dtype=_dtype_of_sums(call)) for _ in range(3))
    return lse, picked, total


def _backward_shapes(*args: Any) -> Three:
    call = LinearCrossEntropyBackwardCall.bind(*args)
    dx = call.x.new_empty(call.x.shape if call.x_gradient else (0,))
    dw = call.weight.new_empty(call.weight.shape if call.weight_gradient else (0,))
    return dx, dw, call.x.new_empty((0,) if call.bias is None else call.bias.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Three) -> None:
    call = LinearCrossEntropyCall.bind(*inputs)
    ctx.set_materialize_grads(False)
    tensors = {name: value for name, value in call.named().items() if isinstance(value, Tensor)}
    ctx.names, ctx.call = tuple(tensors), call.but(**dict.fromkeys(tensors))
    ctx.save_for_backward(output[0], *tensors.values())


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    lse, *tensors = ctx.saved_tensors
    call = ctx.call.but(**dict(zip(ctx.names, tensors, strict=True)))
    needed = dict(zip(call.named(), ctx.needs_input_grad, strict=False))  # trailing defaults are not among them
    if needed.get("class_weight"):
        raise NotImplementedError("spx::linear_cross_entropy has no gradient of class_weight")
    of_lse, of_picked = (torch.zeros_like(lse) if grad is None else grad for grad in grads[:2])
    backward = call.into(
        LinearCrossEntropyBackwardCall,
        grad_lse=of_lse,
        grad_picked=of_picked,
        grad_total=grads[2],
        lse=lse,
        x_gradient=needed["x"],
        weight_gradient=needed["weight"],
    )
    gradients = backward.gradients(*backward.run())
    return tuple(gradients)


def _refuse_twice(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("spx::linear_cross_entropy can be differentiated once only")


for _name, _kernel, _fake in (
    (LinearCrossEntropyCall.NAME, _forward, _forward_shapes),
    (LinearCrossEntropyBackwardCall.NAME, _backward, _backward_shapes),
):
    _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"spx::{_name}", _fake, lib=_LIBRARY)
torch.library.register_autograd("spx::linear_cross_entropy", _differentiate, setup_context=_save, lib=_LIBRARY)
torch.library.register_autograd(
    "spx::linear_cross_entropy_backward",
    _refuse_twice,
    setup_context=lambda ctx, inputs, output: None,
    lib=_LIBRARY,
)


@register_flop_formula(torch.ops.spx.linear_cross_entropy)
def _forward_flops(x_shape: Any, weight_shape: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * torch.Size(x_shape).numel() * weight_shape[0]


@register_flop_formula(torch.ops.spx.linear_cross_entropy_backward)
def _backward_flops(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    call = LinearCrossEntropyBackwardCall.bind(*args, **kwargs)
    products = 1 + call.x_gradient + call.weight_gradient
    return products * 2 * torch.Size(call.x).numel() * call.weight[0]


linear_cross_entropy = LinearCrossEntropyCall.target()
