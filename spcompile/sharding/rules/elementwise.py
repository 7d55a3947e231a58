"""Ops that compute every result element from the elements at the same place: `a b, b -> a b`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

import spcompile.capture.gradient_ops  # noqa: F401  (defines the ops)
from spcompile.graph.aten_ops import overloads
from spcompile.sharding.rules.calls import arguments
from spcompile.sharding.rules.factors import broadcast_factors, factors, make_rule
from spcompile.sharding.rules.rule import LocalCall, OpRule, register, tensor_results

UNARY = """
    abs absolute acos acosh alias angle arccos arcsin arctan asin asinh atan atanh bitwise_not ceil celu clone conj
    conj_physical contiguous cos cosh deg2rad detach digamma elu erf erfc erfinv exp exp2 expm1 fix floor frac gelu
    hardshrink hardsigmoid hardswish hardtanh i0 imag isfinite isinf isnan isneginf isposinf isreal leaky_relu lgamma
    lift_fresh lift_fresh_copy log log10 log1p log2 log_sigmoid logical_not logit mish nan_to_num neg negative positive
    rad2deg real reciprocal relu relu6 resolve_conj resolve_neg round round.decimals rsqrt selu sgn sigmoid sign signbit
    silu sin sinc sinh softplus softshrink special_expit sqrt square tan tanh threshold trunc _conj _to_copy to.device
    to.dtype to.dtype_layout
"""
CLAMPS = """
    clamp clamp.Tensor clamp_max clamp_max.Tensor clamp_min clamp_min.Tensor clip clip.Tensor
"""
ARITHMETIC = """
    add.Scalar add.Tensor addcdiv addcmul atan2 copysign.Scalar copysign.Tensor div.Scalar div.Scalar_mode div.Tensor
    div.Tensor_mode divide.Tensor divide.Scalar float_power.Scalar float_power.Tensor_Scalar float_power.Tensor_Tensor
    floor_divide floor_divide.Scalar fmax fmin fmod.Scalar fmod.Tensor heaviside hypot lerp.Scalar lerp.Tensor logaddexp
    logaddexp2 max.other maximum min.other minimum mul.Scalar mul.Tensor multiply.Scalar multiply.Tensor nextafter polar
    complex pow.Scalar pow.Tensor_Scalar pow.Tensor_Tensor remainder.Scalar remainder.Scalar_Tensor remainder.Tensor
    rsub.Scalar rsub.Tensor sub.Scalar sub.Tensor subtract.Scalar subtract.Tensor true_divide.Scalar true_divide.Tensor
    xlogy.Scalar_Other xlogy.Scalar_Self xlogy.Tensor
"""
COMPARISONS = """
    eq.Scalar eq.Tensor ge.Scalar ge.Tensor greater.Scalar greater.Tensor greater_equal.Scalar greater_equal.Tensor
    gt.Scalar gt.Tensor isclose le.Scalar le.Tensor less.Scalar less.Tensor less_equal.Scalar less_equal.Tensor
    lt.Scalar lt.Tensor ne.Scalar ne.Tensor not_equal.Scalar not_equal.Tensor
"""
BITS = """
    __and__.Scalar __and__.Tensor __lshift__.Scalar __lshift__.Tensor __or__.Scalar __or__.Tensor __rshift__.Scalar
    __rshift__.Tensor __xor__.Scalar __xor__.Tensor bitwise_and.Scalar bitwise_and.Scalar_Tensor bitwise_and.Tensor
    bitwise_left_shift.Tensor bitwise_left_shift.Tensor_Scalar bitwise_or.Scalar bitwise_or.Scalar_Tensor
    bitwise_or.Tensor bitwise_right_shift.Tensor bitwise_right_shift.Tensor_Scalar bitwise_xor.Scalar
    bitwise_xor.Scalar_Tensor bitwise_xor.Tensor logical_and logical_or logical_xor
"""
CHOICES = """
    masked_fill.Scalar masked_fill.Tensor where.Scalar where.ScalarOther where.ScalarSelf where.self
"""


def pointwise(node: fx.Node, *, unread: Collection[str] = (), local: Any = None) -> OpRule | None:
    """All tensor arguments broadcast to the shape of every result."""
    out = factors(tensor_results(node)[0].shape)
    operands = {name: broadcast_factors(v.shape, out) for name, v in arguments(node).items() if isinstance(v, Tensor)}
    if any(layout is None for layout in operands.values()):
        return None
    return make_rule(node, operands, [out for _ in tensor_results(node)], unread=unread, local=local)


@register(*overloads(UNARY + CLAMPS + ARITHMETIC + COMPARISONS + BITS + CHOICES))
def elementwise(node: fx.Node) -> OpRule | None:
    """`a b, b -> a b`."""
    return pointwise(node)


@register(*overloads("copy fill.Scalar fill.Tensor zero"))
def overwritten(node: fx.Node) -> OpRule | None:
    """`a b, b -> a b`: of the first operand only the shape is read."""

    def local(call: LocalCall) -> Any:
        blank = call.args[0].new_empty(call.shapes[0])
        return node.target(blank, *call.args[1:], **call.kwargs)  # type: ignore[operator]

    return pointwise(node, unread=("self",), local=local)


@register(*overloads("to.other type_as"))
def converted(node: fx.Node) -> OpRule | None:
    """Only the dtype and the device of the second operand matter: `a b, c -> a b`."""
    args = arguments(node)
    out = factors(args["self"].shape)
    return make_rule(node, {"self": out, "other": factors(args["other"].shape)}, [out], unread=("other",))


@register(torch.ops.spx.add_gradient.default)
def with_more_gradient(node: fx.Node) -> OpRule | None:
    """`a b, a b -> a b`; padding gets no gradient, which nothing else would keep from parameters."""
    rule = pointwise(node)
    return rule and replace(rule, filled=frozenset(rule.sizes), fills={0: 0.0})


@register(torch.ops.spx.keep_gradient.default)
def with_kept_gradient(node: fx.Node) -> OpRule | None:
    """`a b, a b -> a b`"""
    return pointwise(node)


@register(torch.ops.aten.view.dtype)
def bits(node: fx.Node) -> OpRule | None:
    """Reinterprets elements; only for dtypes of one width, so that dims stay as they are."""
    args = arguments(node)
    return pointwise(node) if args["self"].dtype.itemsize == args["dtype"].itemsize else None
