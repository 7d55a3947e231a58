"""Expected text of the rule of every op, one line each, in alphabetical order.

`tests/test_rules_numerics.py` runs every line of the same table on shards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv, statically_known_true

from spcompile.rules import OpRule, register, registered_ops, rule_of, tensor_operands, tensor_results


@dataclass(frozen=True)
class Spec:
    """A tensor operand: its shape and the range its random elements come from."""

    shape: tuple[int, ...]
    low: float
    high: float
    dtype: torch.dtype = torch.float64
    gradient: bool = True  # False where the op has no derivative for this operand

    def make(self, generator: torch.Generator) -> torch.Tensor:
        if self.dtype in (torch.int64, torch.uint8):
            return torch.randint(int(self.low), int(self.high), self.shape, generator=generator, dtype=self.dtype)
        x = self.low + (self.high - self.low) * torch.rand(self.shape, generator=generator, dtype=torch.float64)
        if self.dtype.is_complex:
            return torch.polar(x, 3 * x)
        return x > (self.low + self.high) / 2 if self.dtype == torch.bool else x.to(self.dtype)


def x(*shape: int) -> Spec:
    """Floats of both signs."""
    return Spec(shape, -0.9, 0.9)


def pos(*shape: int) -> Spec:
    """Floats in (0.1, 0.9)."""
    return Spec(shape, 0.1, 0.9)


def fixed(*shape: int) -> Spec:
    """Floats in (0.1, 0.9), for operands that an op has no derivative for."""
    return Spec(shape, 0.1, 0.9, gradient=False)


def big(*shape: int) -> Spec:
    """Floats in (1.1, 3)."""
    return Spec(shape, 1.1, 3.0)


def ints(high: int, *shape: int) -> Spec:
    """Integers in [0, high)."""
    return Spec(shape, 0, high, torch.int64)


def flags(*shape: int) -> Spec:
    """Booleans."""
    return Spec(shape, 0, 1, torch.bool)


def cplx(*shape: int) -> Spec:
    """Complex numbers."""
    return Spec(shape, 0.1, 0.9, torch.complex128)


@dataclass(frozen=True)
class Call:
    """One call of one op."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def op(self) -> Any:
        packet, _, overload = self.name.partition(".")
        return getattr(getattr(torch.ops.aten, packet), overload or "default")

    def node(self) -> fx.Node:
        """The call in a graph, on fake tensors."""
        mode = FakeTensorMode(shape_env=ShapeEnv())
        graph = fx.Graph()
        generator = torch.Generator()

        def placeholder(spec: Any) -> Any:
            if isinstance(spec, list):
                return [placeholder(s) for s in spec]
            if not isinstance(spec, Spec):
                return spec
            node = graph.placeholder(f"arg{len(graph.nodes)}")
            node.meta["val"] = mode.from_tensor(spec.make(generator), static_shapes=True)
            return node

        args = tuple(placeholder(a) for a in self.args)
        kwargs = {k: placeholder(v) for k, v in self.kwargs.items()}
        node = graph.call_function(self.op, args, kwargs)
        values = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        with mode:
            node.meta["val"] = self.op(*values[0], **values[1])
        return node


def call(name: str, *args: Any, **kwargs: Any) -> Call:
    return Call(name, args, kwargs)


NONE, MEAN, SUM = 0, 1, 2
Q, K, V, V6 = x(2, 4, 6, 8), x(2, 4, 10, 8), x(2, 4, 10, 2), x(2, 4, 6, 2)
CAUSAL = "a b [c] [e], a b [f] [e], a b [f] d -> a b [c] d"

CASES: list[tuple[Call, str]] = [
    (call("__and__.Scalar", ints(9, 4, 6), 3), "a b -> a b"),
    (call("__and__.Tensor", flags(4, 6), flags(4, 1)), "a b, a 1 -> a b"),
    (call("__lshift__.Scalar", ints(9, 4), 1), "a -> a"),
    (call("__lshift__.Tensor", ints(9, 4), ints(3, 4)), "a, a -> a"),
    (call("__or__.Scalar", ints(9, 4), 4), "a -> a"),
    (call("__or__.Tensor", flags(4, 6), flags(6)), "a b, b -> a b"),
    (call("__rshift__.Scalar", ints(9, 4), 1), "a -> a"),
    (call("__rshift__.Tensor", ints(9, 4), ints(3, 4)), "a, a -> a"),
    (call("__xor__.Scalar", ints(9, 4), 5), "a -> a"),
    (call("__xor__.Tensor", flags(4, 6), flags(6)), "a b, b -> a b"),
    (call("_conj", cplx(4)), "a -> a"),
    (call("_fused_rms_norm", x(4, 6), [6], x(6), 1e-6), "a [b], [b] -> a [b], a 1"),
    (call("_log_softmax", x(4, 6), -1, False), "a [b] -> a [b]"),
    (call("_reshape_alias", x(4, 6), [24], [1]), "a b -> (a b)"),
    (call("_safe_softmax", x(4, 6), 1), "a [b] -> a [b]"),
    (call("_softmax", x(4, 6), 0, False), "[a] b -> [a] b"),
    (call("_to_copy", x(4), dtype=torch.float32), "a -> a"),
    (call("_unsafe_index_put", x(4, 6), [ints(4, 3)], x(3, 6)), "[a] b, [c], [c] b -> [a] b"),
    (call("_unsafe_view", x(4, 6), [2, 2, 6]), "(a b) c -> a b c"),
    (call("abs", x(4, 6)), "a b -> a b"),
    (call("absolute", x(4)), "a -> a"),
    (call("acos", x(4)), "a -> a"),
    (call("acosh", big(4)), "a -> a"),
    (call("add.Scalar", x(4), 2), "a -> a"),
    (call("add.Tensor", x(4, 6), x(4, 6)), "a b, a b -> a b"),
    (call("add.Tensor", x(4, 1), x(6), alpha=2), "a 1, b -> a b"),
    (call("add.Tensor", x(4, 6), x()), "a b, () -> a b"),
    (call("addcdiv", x(4, 6), x(6), pos(4, 1)), "a b, b, a 1 -> a b"),
    (call("addcmul", x(4, 6), x(6), x(4, 1)), "a b, b, a 1 -> a b"),
    (call("addmm", x(6), x(4, 8), x(8, 6)), "b, a [c], [c] b -> a b"),
    (call("addmm", x(4, 1), x(4, 8), x(8, 6)), "a 1, a [c], [c] b -> a b"),
    (call("addmv", x(4), x(4, 8), x(8)), "a, a [b], [b] -> a"),
    (call("adjoint", x(2, 4, 6)), "a c b -> a b c"),
    (call("alias", x(4)), "a -> a"),
    (call("all", flags(4, 6)), "[a] [b] -> ()"),
    (call("all.dim", flags(4, 6), 1), "a [b] -> a"),
    (call("all.dims", flags(4, 2, 6), [0, 2], True), "[b] a [c] -> 1 a 1"),
    (call("alpha_dropout", x(4, 6), 0.5, True), "[a] [b] -> [a] [b]"),
    (call("amax", x(4, 6), [-1], True), "a [b] -> a 1"),
    (call("amin", x(4, 6), [0]), "[b] a -> a"),
    (call("aminmax", x(4, 6), dim=1), "a [b] -> a, a"),
    (call("angle", x(4)), "a -> a"),
    (call("any", flags(4, 6)), "[a] [b] -> ()"),
    (call("any.dim", flags(4, 6), 0), "[b] a -> a"),
    (call("any.dims", flags(4, 6), [0]), "[b] a -> a"),
    (call("arange", 4), "-> [a]"),
    (call("arange.start", 2, 6), "-> [a]"),
    (call("arange.start_step", 0, 8, 2), "-> [a]"),
    (call("arccos", x(4)), "a -> a"),
    (call("arcsin", x(4)), "a -> a"),
    (call("arctan", x(4)), "a -> a"),
    (call("argmax", x(4, 6)), "[a] [b] -> ()"),
    (call("argmax", x(4, 6), -1), "a [b] -> a"),
    (call("argmin", x(4, 6), 0, True), "[b] a -> 1 a"),
    (call("argsort", x(4, 6)), "a [b] -> a [b]"),
    (call("argsort.stable", x(4, 6), stable=True, dim=0), "[a] b -> [a] b"),
    (call("asin", x(4)), "a -> a"),
    (call("asinh", x(4)), "a -> a"),
    (call("atan", x(4)), "a -> a"),
    (call("atan2", x(4), pos(4)), "a, a -> a"),
    (call("atanh", x(4)), "a -> a"),
    (call("baddbmm", x(4, 1, 6), x(4, 2, 8), x(4, 8, 6)), "a 1 c, a b [d], a [d] c -> a b c"),
    (call("bernoulli", pos(4, 6)), "[a] [b] -> [a] [b]"),
    (call("bernoulli.p", pos(4), 0.5), "[a] -> [a]"),
    (call("binary_cross_entropy", pos(4, 6), pos(4, 6)), "a b, a b -> () | a: sum, b: sum"),
    (call("binary_cross_entropy", pos(4, 6), pos(4, 6), fixed(6), SUM), "a b, a b, b -> () | a: sum, b: sum"),
    (call("binary_cross_entropy_with_logits", x(4), pos(4)), "a, a -> () | a: sum"),
    (
        call("binary_cross_entropy_with_logits", x(4, 6), pos(4, 6), None, fixed(6), SUM),
        "a b, a b, b -> () | a: sum, b: sum",
    ),
    (call("bincount", ints(5, 8), minlength=5), "[b] -> [a]"),
    (call("bitwise_and.Scalar", ints(9, 4), 3), "a -> a"),
    (call("bitwise_and.Scalar_Tensor", 3, ints(9, 4)), "a -> a"),
    (call("bitwise_and.Tensor", flags(4, 6), flags(1, 6)), "a b, 1 b -> a b"),
    (call("bitwise_left_shift.Tensor", ints(9, 4), ints(3, 4)), "a, a -> a"),
    (call("bitwise_left_shift.Tensor_Scalar", ints(9, 4), 2), "a -> a"),
    (call("bitwise_not", flags(4)), "a -> a"),
    (call("bitwise_or.Scalar", ints(9, 4), 3), "a -> a"),
    (call("bitwise_or.Scalar_Tensor", 3, ints(9, 4)), "a -> a"),
    (call("bitwise_or.Tensor", flags(4), flags(4)), "a, a -> a"),
    (call("bitwise_right_shift.Tensor", ints(9, 4), ints(3, 4)), "a, a -> a"),
    (call("bitwise_right_shift.Tensor_Scalar", ints(9, 4), 2), "a -> a"),
    (call("bitwise_xor.Scalar", ints(9, 4), 3), "a -> a"),
    (call("bitwise_xor.Scalar_Tensor", 3, ints(9, 4)), "a -> a"),
    (call("bitwise_xor.Tensor", flags(4), flags(4)), "a, a -> a"),
    (call("bmm", x(2, 4, 8), x(2, 8, 6)), "a b d, a d c -> a b c | d: sum"),
    (call("broadcast_to", x(4, 1), [2, 4, 6]), "b 1 -> a b c"),
    (call("bucketize.Tensor", x(4, 6), Spec((3,), 0, 1)), "a b, [c] -> a b"),
    (call("cat", [x(4, 2), x(4, 6)], 1), "a [c], a [d] -> a [b]"),
    (call("cat", [x(0), x(4, 6)], -2), "[c], a b -> a b"),
    (call("cat", [x(4, 0, 6), x(4, 2, 6)], 1), "a [d] c, a b c -> a b c"),
    (call("ceil", x(4)), "a -> a"),
    (call("celu", x(4)), "a -> a"),
    (call("chunk", x(4, 6), 2, -1), "a [d] -> a [b], a [c]"),
    (call("chunk", x(4, 6), 1, -1), "a b -> a b"),
    (call("clamp", x(4, 6), -0.5, 0.5), "a b -> a b"),
    (call("clamp.Tensor", x(4, 6), x(6), None), "a b, b -> a b"),
    (call("clamp_max", x(4), 0.5), "a -> a"),
    (call("clamp_max.Tensor", x(4), x(4)), "a, a -> a"),
    (call("clamp_min", x(4), 0.5), "a -> a"),
    (call("clamp_min.Tensor", x(4), x(4)), "a, a -> a"),
    (call("clip", x(4), -0.5), "a -> a"),
    (call("clip.Tensor", x(4), x(4)), "a, a -> a"),
    (call("clone", x(4)), "a -> a"),
    (call("complex", x(4), x(4)), "a, a -> a"),
    (call("concat", [x(4, 2), x(4, 6)], -1), "a [c], a [d] -> a [b]"),
    (call("concatenate", [x(2, 4), x(6, 4)]), "[c] b, [d] b -> [a] b"),
    (call("conj", cplx(4)), "a -> a"),
    (call("conj_physical", cplx(4)), "a -> a"),
    (call("constant_pad_nd", x(4, 6), [0, 1], 0.5), "a [c] -> a [b]"),
    (call("contiguous", x(4, 6)), "a b -> a b"),
    (call("conv1d", x(2, 4, 8), x(6, 4, 3)), "a d [e], b d [f] -> a b [c] | d: sum"),
    (call("conv1d", x(2, 4, 8), x(6, 4, 3), x(6)), "a [d] [e], b [d] [f], b -> a b [c]"),
    (call("conv1d", x(2, 4, 8), x(4, 1, 3), None, [1], [0], [1], 4), "a [d] [e], [b] 1 [f] -> a [b] [c]"),
    (call("conv1d.padding", x(2, 4, 8), x(6, 4, 3), None, [1], "same"), "a d [e], b d [f] -> a b [c] | d: sum"),
    (call("conv2d", x(2, 4, 8, 6), x(6, 4, 3, 2)), "a e [f] [g], b e [h] [i] -> a b [c] [d] | e: sum"),
    (
        call("conv2d.padding", x(4, 8, 6), x(6, 4, 3, 3), None, [1, 1], "same"),
        "d [e] [f], a d [g] [h] -> a [b] [c] | d: sum",
    ),
    (
        call("conv3d", x(2, 4, 8, 6, 5), x(6, 4, 3, 2, 2)),
        "a f [g] [h] [i], b f [j] [k] [l] -> a b [c] [d] [e] | f: sum",
    ),
    (
        call("conv3d.padding", x(4, 8, 6, 5), x(6, 4, 3, 3, 3), None, [1, 1, 1], "same"),
        "e [f] [g] [h], a e [i] [j] [k] -> a [b] [c] [d] | e: sum",
    ),
    (call("copy", fixed(4, 6), fixed(6)), "a b, b -> a b"),
    (call("copysign.Scalar", x(4), -1.0), "a -> a"),
    (call("copysign.Tensor", x(4), x(4)), "a, a -> a"),
    (call("cos", x(4, 6)), "a b -> a b"),
    (call("cosh", x(4)), "a -> a"),
    (call("cosine_similarity", x(4, 6), x(6), -1), "a [b], [b] -> a"),
    (call("count_nonzero", ints(2, 4, 6)), "a b -> () | a: sum, b: sum"),
    (call("count_nonzero.dim_IntList", ints(2, 4, 6), [1]), "a b -> a | b: sum"),
    (call("cross_entropy_loss", x(4, 6), ints(6, 4), None, NONE), "a b, a -> a | b: complete"),
    (call("cross_entropy_loss", x(4, 6), ints(6, 4), None, SUM, 2), "a b, a -> () | a: sum, b: complete"),
    (call("cross_entropy_loss", x(4, 6), ints(6, 4), fixed(6), SUM, 1, 0.1), "a [b], a, [b] -> () | a: sum"),
    (call("cross_entropy_loss", x(4, 6), ints(6, 4)), "[a] [b], [a] -> ()"),
    (call("cross_entropy_loss", x(4, 6, 2), ints(6, 4, 2), None, NONE), "a c b, a b -> a b | c: complete"),
    (
        call("cross_entropy_loss", x(4, 6, 2), ints(6, 4, 2), None, SUM),
        "a b c, a c -> () | a: sum, c: sum, b: complete",
    ),
    (call("cross_entropy_loss", x(6), ints(6)), "[a], () -> ()"),
    (call("cummax", x(4, 6), 1), "a [b] -> a [b], a [b]"),
    (call("cummin", x(4, 6), 1), "a [b] -> a [b], a [b]"),
    (call("cumprod", x(4, 6), 0), "[a] b -> [a] b"),
    (call("cumsum", x(4, 6), -1), "a [b] -> a [b]"),
    (call("deg2rad", x(4)), "a -> a"),
    (call("detach", x(4)), "a -> a"),
    (call("diff", x(4, 6)), "a [c] -> a [b]"),
    (call("diff", x(4, 6), 1, -1, x(4, 2)), "a [c], a [d] -> a [b]"),
    (call("digamma", pos(4)), "a -> a"),
    (call("div.Scalar", x(4), 3), "a -> a"),
    (call("div.Scalar_mode", x(4), 3, rounding_mode="floor"), "a -> a"),
    (call("div.Tensor", x(4, 6), pos(4, 1)), "a b, a 1 -> a b"),
    (call("div.Tensor_mode", x(4), pos(4), rounding_mode="trunc"), "a, a -> a"),
    (call("divide.Scalar", x(4), 3), "a -> a"),
    (call("divide.Tensor", x(4), pos(4)), "a, a -> a"),
    (call("dot", x(4), x(4)), "a, a -> () | a: sum"),
    (call("dropout", x(4, 6), 0.1, True), "[a] [b] -> [a] [b]"),
    (call("dropout", x(4, 6), 0.1, False), "a b -> a b"),
    (call("dropout", x(4, 6), 0.0, True), "a b -> a b"),
    (call("einsum", "bsi,oi->bso", [x(2, 4, 8), x(6, 8)]), "a b d, c d -> a b c | d: sum"),
    (call("einsum", "...i,oi", [x(2, 4, 8), x(6, 8)]), "a b d, c d -> a b c | d: sum"),
    (call("einsum", "bhqd, bhkd -> bhqk", [x(2, 2, 4, 8), x(1, 2, 6, 8)]), "a b c e, 1 b d e -> a b c d | e: sum"),
    (call("einsum", "ij,k->i", [x(4, 6), x(2)]), "a b, c -> a | b: sum, c: sum"),
    (call("elu", x(4)), "a -> a"),
    (call("embedding", x(8, 6), ints(8, 2, 4)), "d c, a b -> a b c | d: sum"),
    (call("empty.memory_format", [4, 6]), "-> a b"),
    (call("empty_like", x(4, 6)), "a b -> a b"),
    (call("eq.Scalar", ints(3, 4), 1), "a -> a"),
    (call("eq.Tensor", ints(3, 4, 1), ints(3, 6)), "a 1, b -> a b"),
    (call("erf", x(4)), "a -> a"),
    (call("erfc", x(4)), "a -> a"),
    (call("erfinv", x(4)), "a -> a"),
    (call("exp", x(4)), "a -> a"),
    (call("exp2", x(4)), "a -> a"),
    (call("expand", x(4, 1, 6), [4, 2, 6]), "a 1 c -> a b c"),
    (call("expand", x(4, 1), [2, -1, 6]), "b 1 -> a b c"),
    (call("expand_as", x(4, 1), x(4, 6)), "a 1, a b -> a b"),
    (call("expm1", x(4)), "a -> a"),
    (call("eye", 4), "-> [a] [b]"),
    (call("eye.m", 4, 6), "-> [a] [b]"),
    (call("feature_dropout", x(4, 6), 0.5, True), "[a] [b] -> [a] [b]"),
    (call("fill.Scalar", x(4), 2), "a -> a"),
    (call("fill.Tensor", x(4), x()), "a, () -> a"),
    (call("fix", x(4)), "a -> a"),
    (call("flatten.using_ints", x(2, 4, 6), 1), "a b c -> a (b c)"),
    (call("flip", x(4, 6), [0]), "[a] b -> [a] b"),
    (call("float_power.Scalar", 2.5, x(4)), "a -> a"),
    (call("float_power.Tensor_Scalar", pos(4), 1.5), "a -> a"),
    (call("float_power.Tensor_Tensor", pos(4), x(4)), "a, a -> a"),
    (call("floor", x(4)), "a -> a"),
    (call("floor_divide", ints(9, 4), Spec((4,), 1, 4, torch.int64)), "a, a -> a"),
    (call("floor_divide.Scalar", ints(9, 4), 2), "a -> a"),
    (call("fmax", x(4), x(4)), "a, a -> a"),
    (call("fmin", x(4), x(4)), "a, a -> a"),
    (call("fmod.Scalar", x(4), 0.4), "a -> a"),
    (call("fmod.Tensor", x(4), pos(4)), "a, a -> a"),
    (call("frac", x(4)), "a -> a"),
    (call("full", [4, 6], 2.5), "-> a b"),
    (call("full_like", x(4, 6), 2.5), "a b -> a b"),
    (call("gather", x(4, 6), 1, ints(6, 4, 2)), "a [c], a b -> a b"),
    (call("gather", x(4, 6), 1, ints(6, 2, 4)), "[c] [d], [a] b -> [a] b"),
    (call("ge.Scalar", x(4), 0), "a -> a"),
    (call("ge.Tensor", x(4), x(4)), "a, a -> a"),
    (call("gelu", x(4, 6)), "a b -> a b"),
    (call("ger", x(4), x(6)), "a, b -> a b"),
    (call("glu", x(4, 6)), "a [c] -> a [b]"),
    (call("greater.Scalar", x(4), 0), "a -> a"),
    (call("greater.Tensor", x(4), x(4)), "a, a -> a"),
    (call("greater_equal.Scalar", x(4), 0), "a -> a"),
    (call("greater_equal.Tensor", x(4), x(4)), "a, a -> a"),
    (call("group_norm", x(4, 8, 2), 4, x(8), x(8)), "a (b [c]) [d], (b [c]), (b [c]) -> a (b [c]) [d]"),
    (call("gt.Scalar", x(4), 0), "a -> a"),
    (call("gt.Tensor", x(4), x(4)), "a, a -> a"),
    (call("hardshrink", x(4)), "a -> a"),
    (call("hardsigmoid", x(4)), "a -> a"),
    (call("hardswish", x(4)), "a -> a"),
    (call("hardtanh", x(4)), "a -> a"),
    (call("heaviside", fixed(4), fixed(4)), "a, a -> a"),
    (call("histc", x(8), 5, -1, 1), "[b] -> [a]"),
    (call("hstack", [x(4, 2), x(4, 6)]), "a [c], a [d] -> a [b]"),
    (call("huber_loss", x(4), x(4)), "a, a -> () | a: sum"),
    (call("huber_loss", x(4), x(4), SUM, 0.5), "a, a -> () | a: sum"),
    (call("hypot", x(4), x(4)), "a, a -> a"),
    (call("i0", x(4)), "a -> a"),
    (call("imag", cplx(4)), "a -> a"),
    (call("index.Tensor", x(6, 8), [ints(6, 2, 4)]), "[d] c, a b -> a b c"),
    (call("index.Tensor", x(4, 6, 8), [None, ints(6, 2), ints(8, 2)]), "a [c] [d], b, b -> a b"),
    (call("index.Tensor", x(4, 6, 8), [ints(4, 2, 1), None, ints(8, 6)]), "[d] c [e], a 1, b -> a b c"),
    (call("index_add", x(4, 6), 0, ints(4, 2), x(2, 6)), "[a] b, [c], [c] b -> [a] b"),
    (call("index_copy", x(4, 6), 0, ints(1, 1), x(1, 6)), "[a] b, 1, 1 b -> [a] b"),
    (call("index_fill.int_Scalar", x(4, 6), 1, ints(6, 2), 2.0), "a [b], [c] -> a [b]"),
    (call("index_fill.int_Tensor", x(4, 6), 1, ints(6, 2), x()), "a [b], [c], () -> a [b]"),
    (call("index_put", x(4, 6), [ints(4, 3)], x(3, 6), True), "[a] b, [c], [c] b -> [a] b"),
    (call("index_put", x(4, 6, 2), [None, ints(6, 3)], x(3, 1), True), "a [b] c, [d], [d] 1 -> a [b] c"),
    (call("index_put", x(4, 6), [flags(4, 6)], x()), "a b, a b, () -> a b"),
    (call("index_select", x(4, 6), 1, ints(6, 2)), "a [c], b -> a b"),
    (call("inner", x(4, 8), x(8)), "a b, b -> a | b: sum"),
    (call("isclose", x(4), x(4)), "a, a -> a"),
    (call("isfinite", x(4)), "a -> a"),
    (call("isin.Tensor_Tensor", ints(9, 4, 6), ints(9, 2)), "a b, [c] -> a b"),
    (call("isinf", x(4)), "a -> a"),
    (call("isnan", x(4)), "a -> a"),
    (call("isneginf", x(4)), "a -> a"),
    (call("isposinf", x(4)), "a -> a"),
    (call("isreal", x(4)), "a -> a"),
    (call("kl_div", x(4, 6), pos(4, 6)), "a b, a b -> () | a: sum, b: sum"),
    (call("kl_div", x(4, 6), x(4, 6), SUM, log_target=True), "a b, a b -> () | a: sum, b: sum"),
    (call("kthvalue", x(4, 6), 2), "a [b] -> a, a"),
    (call("l1_loss", x(4, 6), x(4, 6)), "a b, a b -> () | a: sum, b: sum"),
    (call("l1_loss", x(4, 6), x(4, 6), NONE), "a b, a b -> a b"),
    (call("layer_norm", x(2, 4, 6), [6], x(6), x(6)), "a b [c], [c], [c] -> a b [c]"),
    (call("layer_norm", x(4, 2, 6), [2, 6]), "a [b] [c] -> a [b] [c]"),
    (call("le.Scalar", x(4), 0), "a -> a"),
    (call("le.Tensor", ints(9, 4, 1), ints(9, 1, 6)), "a 1, 1 b -> a b"),
    (call("leaky_relu", x(4)), "a -> a"),
    (call("lerp.Scalar", x(4), x(4), 0.3), "a, a -> a"),
    (call("lerp.Tensor", x(4), x(4), x(4)), "a, a, a -> a"),
    (call("less.Scalar", x(4), 0), "a -> a"),
    (call("less.Tensor", x(4), x(4)), "a, a -> a"),
    (call("less_equal.Scalar", x(4), 0), "a -> a"),
    (call("less_equal.Tensor", x(4), x(4)), "a, a -> a"),
    (call("lgamma", pos(4)), "a -> a"),
    (call("lift_fresh", x(4)), "a -> a"),
    (call("lift_fresh_copy", x(4)), "a -> a"),
    (call("linalg_norm", x(4, 6)), "[a] [b] -> ()"),
    (call("linalg_vector_norm", x(4, 6), 2, [-1], True), "a [b] -> a 1"),
    (call("linear", x(2, 4, 8), x(6, 8)), "a b d, c d -> a b c | d: sum"),
    (call("linear", x(2, 4, 8), x(6, 8), x(6)), "a b [d], c [d], c -> a b c"),
    (call("linear", x(4, 8), x(8)), "a b, b -> a | b: sum"),
    (call("linspace", 0, 1, 4), "-> [a]"),
    (call("log", pos(4)), "a -> a"),
    (call("log10", pos(4)), "a -> a"),
    (call("log1p", pos(4)), "a -> a"),
    (call("log2", pos(4)), "a -> a"),
    (call("log_sigmoid", x(4)), "a -> a"),
    (call("log_softmax.int", x(4, 6), -1), "a [b] -> a [b]"),
    (call("logaddexp", x(4), x(4)), "a, a -> a"),
    (call("logaddexp2", x(4), x(4)), "a, a -> a"),
    (call("logcumsumexp", x(4, 6), 1), "a [b] -> a [b]"),
    (call("logical_and", flags(4), flags(4)), "a, a -> a"),
    (call("logical_not", flags(4)), "a -> a"),
    (call("logical_or", flags(4), flags(4)), "a, a -> a"),
    (call("logical_xor", flags(4), flags(4)), "a, a -> a"),
    (call("logit", pos(4)), "a -> a"),
    (call("logsumexp", x(4, 6), [-1]), "a [b] -> a"),
    (call("lt.Scalar", x(4), 0), "a -> a"),
    (call("lt.Tensor", x(4), x(4)), "a, a -> a"),
    (call("mT", x(2, 4, 6)), "a c b -> a b c"),
    (call("masked_fill.Scalar", x(4, 6), flags(4, 1), 0.5), "a b, a 1 -> a b"),
    (call("masked_fill.Tensor", x(4, 6), flags(6), x()), "a b, b, () -> a b"),
    (call("masked_select", x(4, 6), flags(4, 6)), "[b] [c], [d] [e] -> [a]"),
    (call("matmul", x(8), x(8)), "a, a -> () | a: sum"),
    (call("matmul", x(4, 8), x(8)), "a b, b -> a | b: sum"),
    (call("matmul", x(8), x(8, 6)), "b, b a -> a | b: sum"),
    (call("matmul", x(8), x(2, 8, 6)), "c, a c b -> a b | c: sum"),
    (call("matmul", x(2, 4, 8), x(8)), "a b c, c -> a b | c: sum"),
    (call("matmul", x(2, 4, 8), x(8, 6)), "a b d, d c -> a b c | d: sum"),
    (call("matmul", x(2, 1, 4, 8), x(2, 8, 6)), "a 1 c e, b e d -> a b c d | e: sum"),
    (call("max", x(4, 6)), "[a] [b] -> ()"),
    (call("max.dim", x(4, 6), -1), "a [b] -> a, a"),
    (call("max.other", x(4), x(4)), "a, a -> a"),
    (call("maximum", x(4), x(4)), "a, a -> a"),
    (call("mean", x(4, 6)), "a b -> () | a: sum, b: sum"),
    (call("mean.dim", x(4, 6), [-1], True), "a b -> a 1 | b: sum"),
    (call("mean.dim", x(2, 4, 6), [0, 1]), "b c a -> a | b: sum, c: sum"),
    (call("median", x(4, 6)), "[a] [b] -> ()"),
    (call("median.dim", x(4, 6), 1), "a [b] -> a, a"),
    (call("meshgrid", [x(4), x(6)]), "a, b -> a b, a b"),
    (call("meshgrid.indexing", [x(4), x(6)], indexing="xy"), "b, a -> a b, a b"),
    (call("min", x(4, 6)), "[a] [b] -> ()"),
    (call("min.dim", x(4, 6), 0), "[b] a -> a, a"),
    (call("min.other", x(4), x(4)), "a, a -> a"),
    (call("minimum", x(4), x(4)), "a, a -> a"),
    (call("mish", x(4)), "a -> a"),
    (call("mm", x(4, 8), x(8, 6)), "a c, c b -> a b | c: sum"),
    (call("mode", x(4, 6)), "a [b] -> a, a"),
    (call("moveaxis.int", x(2, 4, 6), 0, 2), "c a b -> a b c"),
    (call("moveaxis.intlist", x(2, 4, 6), [0], [2]), "c a b -> a b c"),
    (call("movedim.int", x(2, 4, 6), -1, 0), "b c a -> a b c"),
    (call("movedim.intlist", x(2, 4, 6), [0], [1]), "b a c -> a b c"),
    (call("mse_loss", x(4, 6), x(4, 6)), "a b, a b -> () | a: sum, b: sum"),
    (call("mse_loss", x(4, 6), x(4, 6), SUM), "a b, a b -> () | a: sum, b: sum"),
    (call("mul.Scalar", x(4), 3), "a -> a"),
    (call("mul.Tensor", x(4, 6), x(6)), "a b, b -> a b"),
    (call("multinomial", pos(4, 6), 2), "[c] [d] -> [a] [b]"),
    (call("multiply.Scalar", x(4), 3), "a -> a"),
    (call("multiply.Tensor", x(4), x(4)), "a, a -> a"),
    (call("mv", x(4, 8), x(8)), "a b, b -> a | b: sum"),
    (call("nan_to_num", x(4)), "a -> a"),
    (call("nansum", x(4, 6), [0]), "b a -> a | b: sum"),
    (call("narrow", x(4, 6), 1, 0, 2), "a [c] -> a [b]"),
    (call("narrow", x(4, 6), 1, 0, 6), "a b -> a b"),
    (call("native_dropout", x(4, 6), 0.5, True), "[a] [b] -> [a] [b], [a] [b]"),
    (call("native_layer_norm", x(2, 4, 6), [6], x(6), x(6), 1e-5), "a b [c], [c], [c] -> a b [c], a b 1, a b 1"),
    (call("ne.Scalar", ints(3, 4), 1), "a -> a"),
    (call("ne.Tensor", ints(3, 4), ints(3, 4)), "a, a -> a"),
    (call("neg", x(4)), "a -> a"),
    (call("negative", x(4)), "a -> a"),
    (call("new_empty", x(2, 3), [4, 6]), "c d -> a b"),
    (call("new_full", x(2, 3), [4, 6], 2.5), "c d -> a b"),
    (call("new_ones", x(2, 3), [4, 6], dtype=torch.bool), "c d -> a b"),
    (call("new_zeros", x(2, 3), [4, 6]), "c d -> a b"),
    (call("nextafter", x(4), x(4)), "a, a -> a"),
    (call("nll_loss", x(4, 6), ints(6, 4), None, SUM, 3), "a [b], a -> () | a: sum"),
    (call("nll_loss2d", x(2, 6, 4, 2), ints(6, 2, 4, 2), None, NONE), "a [d] b c, a b c -> a b c"),
    (call("nll_loss_nd", x(4, 6, 2), ints(6, 4, 2), fixed(6), SUM), "a [b] c, a c, [b] -> () | a: sum, c: sum"),
    (call("nll_loss_nd", x(4, 6), ints(6, 4)), "[a] [b], [a] -> ()"),
    (call("nonzero", x(4, 6)), "[c] [d] -> [a] [b]"),
    (call("norm.Scalar", x(4, 6)), "[a] [b] -> ()"),
    (call("norm.ScalarOpt_dim", x(4, 6), 2, [1], True), "a [b] -> a 1"),
    (call("norm.ScalarOpt_dim_dtype", x(4, 6), 2, [1], False, dtype=torch.float64), "a [b] -> a"),
    (call("not_equal.Scalar", ints(3, 4), 1), "a -> a"),
    (call("not_equal.Tensor", ints(3, 4), ints(3, 4)), "a, a -> a"),
    (call("numpy_T", x(4, 6)), "b a -> a b"),
    (call("one_hot", ints(6, 4), 6), "a -> a [b]"),
    (call("ones", [4, 6]), "-> a b"),
    (call("ones_like", x(4, 6)), "a b -> a b"),
    (call("outer", x(4), x(6)), "a, b -> a b"),
    (call("pad", x(2, 4, 6), [0, 0, 1, 2], "constant", -100.0), "a [d] c -> a [b] c"),
    (call("pad", x(2, 4, 6), [1, -1], "constant", 0.0), "a b [d] -> a b [c]"),
    (call("permute", x(2, 4, 6), [2, 0, -2]), "b c a -> a b c"),
    (call("polar", pos(4), x(4)), "a, a -> a"),
    (call("positive", x(4)), "a -> a"),
    (call("pow.Scalar", 2, x(4)), "a -> a"),
    (call("pow.Tensor_Scalar", x(4, 6), 2), "a b -> a b"),
    (call("pow.Tensor_Tensor", pos(4, 1), x(6)), "a 1, b -> a b"),
    (call("prod", x(4, 6)), "[a] [b] -> ()"),
    (call("prod.dim_int", x(4, 6), 1), "a [b] -> a"),
    (call("rad2deg", x(4)), "a -> a"),
    (call("rand", [4, 6]), "-> [a] [b]"),
    (call("rand_like", x(4, 6)), "[a] [b] -> [a] [b]"),
    (call("randint", 9, [4]), "-> [a]"),
    (call("randint.low", 2, 9, [4]), "-> [a]"),
    (call("randint_like", x(4), 9), "[a] -> [a]"),
    (call("randn", [4, 6]), "-> [a] [b]"),
    (call("randn_like", x(4, 6)), "[a] [b] -> [a] [b]"),
    (call("randperm", 4), "-> [a]"),
    (call("ravel", x(4, 6)), "a b -> (a b)"),
    (call("real", cplx(4)), "a -> a"),
    (call("reciprocal", pos(4)), "a -> a"),
    (call("relu", x(4, 6)), "a b -> a b"),
    (call("relu6", x(4)), "a -> a"),
    (call("remainder.Scalar", x(4), 0.4), "a -> a"),
    (call("remainder.Scalar_Tensor", 2, fixed(4)), "a -> a"),
    (call("remainder.Tensor", x(4), pos(4)), "a, a -> a"),
    (call("repeat", x(4, 6), [2, 1, 4]), "b d -> a b (c d)"),
    (call("repeat_interleave.self_int", x(4, 6), 2, 1), "a b -> a (b c)"),
    (call("repeat_interleave.self_int", x(4, 6), 2), "a b -> (a b c)"),
    (call("reshape", x(2, 4, 2, 6), [2, -1, 12]), "a b c d -> a b (c d)"),
    (call("reshape_as", x(4, 6), x(2, 12)), "(a b) c, d e -> a (b c)"),
    (call("resolve_conj", x(4)), "a -> a"),
    (call("resolve_neg", x(4)), "a -> a"),
    (call("rms_norm", x(2, 4, 6), [6], x(6)), "a b [c], [c] -> a b [c]"),
    (call("roll", x(4, 6), [1], [1]), "a [b] -> a [b]"),
    (call("roll", x(4, 6), [1]), "[a] [b] -> [a] [b]"),
    (call("round", x(4)), "a -> a"),
    (call("round.decimals", x(4), decimals=1), "a -> a"),
    (call("rsqrt", pos(4)), "a -> a"),
    (call("rsub.Scalar", x(4), 1), "a -> a"),
    (call("rsub.Tensor", x(4), x(4)), "a, a -> a"),
    (call("scalar_tensor", 2.5), "-> ()"),
    (call("scaled_dot_product_attention", Q, K, V), "a b c [e], a b [f] [e], a b [f] d -> a b c d"),
    (call("scaled_dot_product_attention", Q, x(2, 4, 6, 8), V6, is_causal=True), CAUSAL),
    (call("scaled_dot_product_attention", Q, K, V, x(6, 10)), "a b c [e], a b [f] [e], a b [f] d, c [f] -> a b c d"),
    (
        call("scaled_dot_product_attention", Q, K, V, flags(2, 1, 6, 10)),
        "a b c [e], a b [f] [e], a b [f] d, a 1 c [f] -> a b c d",
    ),
    (
        call("scaled_dot_product_attention", Q, x(2, 2, 10, 8), x(2, 2, 10, 2), enable_gqa=True),
        "a (b c) d [f], a b [g] [f], a b [g] e -> a (b c) d e",
    ),
    (
        call("scaled_dot_product_attention", Q, K, V, None, 0.5),
        "[a] [b] [c] [e], [a] [b] [f] [e], [a] [b] [f] [d] -> [a] [b] [c] [d]",
    ),
    (call("scatter.reduce", fixed(4, 6), 1, ints(6, 4, 2), fixed(4, 2), reduce="add"), "a [b], a [c], a [c] -> a [b]"),
    (call("scatter.src", x(4, 6), 0, ints(1, 1, 6), x(1, 6)), "[a] b, 1 b, 1 b -> [a] b"),
    (call("scatter.value", x(4, 6), 1, ints(6, 4, 2), 2.0), "a [b], a [c] -> a [b]"),
    (call("scatter.value_reduce", fixed(4, 6), 1, ints(6, 4, 2), 2.0, reduce="add"), "a [b], a [c] -> a [b]"),
    (call("scatter_add", x(4, 6), 1, ints(6, 4, 2), x(4, 2)), "a [b], a [c], a [c] -> a [b]"),
    (call("scatter_add", x(4, 6), 1, ints(6, 2, 4), x(2, 4)), "[a] [b], [c] [d], [c] [d] -> [a] [b]"),
    (
        call("scatter_reduce.two", x(4, 6), 1, ints(6, 4, 2), x(4, 2), "sum"),
        "a [b], a [c], a [c] -> a [b]",
    ),
    (call("searchsorted.Tensor", Spec((6,), 0, 1), pos(4)), "[b], a -> a"),
    (call("select.int", x(2, 4, 6), 1, -1), "a [c] b -> a b"),
    (call("select_scatter", x(4, 6), x(4), 1, 2), "a [b], a -> a [b]"),
    (call("selu", x(4)), "a -> a"),
    (call("sgn", x(4)), "a -> a"),
    (call("sigmoid", x(4)), "a -> a"),
    (call("sign", x(4)), "a -> a"),
    (call("signbit", x(4)), "a -> a"),
    (call("silu", x(4, 6)), "a b -> a b"),
    (call("sin", x(4)), "a -> a"),
    (call("sinc", x(4)), "a -> a"),
    (call("sinh", x(4)), "a -> a"),
    (call("slice.Tensor", x(4, 6), 1, 0, 2**63 - 1), "a b -> a b"),
    (call("slice.Tensor", x(4, 6), 1, -6, 6), "a b -> a b"),
    (call("slice.Tensor", x(4, 6), 1, -4095, 2**63 - 1), "a b -> a b"),
    (call("slice.Tensor", x(4, 6), 1, 0, 4), "a [c] -> a [b]"),
    (call("slice.Tensor", x(4, 6), 1, 2, 2**63 - 1), "a [c] -> a [b]"),
    (call("slice.Tensor", x(4, 6), -1, 0, 6, 2), "a [c] -> a [b]"),
    (call("slice_scatter", x(4, 6), x(4, 2), 1, 2, 4), "a [b], a [c] -> a [b]"),
    (call("smooth_l1_loss", x(4), x(4)), "a, a -> () | a: sum"),
    (call("smooth_l1_loss", x(4), x(4), SUM, 0.5), "a, a -> () | a: sum"),
    (call("softmax.int", x(2, 4, 6), -1), "a b [c] -> a b [c]"),
    (call("softplus", x(4)), "a -> a"),
    (call("softshrink", x(4)), "a -> a"),
    (call("sort", x(4, 6)), "a [b] -> a [b], a [b]"),
    (call("sort.stable", x(4, 6), stable=True, dim=0), "[a] b -> [a] b, [a] b"),
    (call("special_expit", x(4)), "a -> a"),
    (call("special_log_softmax", x(4, 6), 1), "a [b] -> a [b]"),
    (call("special_logsumexp", x(4, 6), [0]), "[b] a -> a"),
    (call("special_softmax", x(4, 6), 1), "a [b] -> a [b]"),
    (call("split.Tensor", x(4, 6), 2, 1), "a [e] -> a [b], a [c], a [d]"),
    (call("split.Tensor", x(4, 6), 6, 1), "a b -> a b"),
    (call("split.sizes", x(4, 6), [2, 4], 1), "a [d] -> a [b], a [c]"),
    (call("split_with_sizes", x(4, 6), [2, 4], -1), "a [d] -> a [b], a [c]"),
    (call("sqrt", pos(4)), "a -> a"),
    (call("square", x(4)), "a -> a"),
    (call("squeeze", x(1, 2, 4)), "1 a b -> a b"),
    (call("squeeze.dim", x(2, 1, 4), 1), "a 1 b -> a b"),
    (call("squeeze.dim", x(2, 4), 0), "a b -> a b"),
    (call("squeeze.dims", x(2, 1, 4, 1), [1, 3]), "a 1 b 1 -> a b"),
    (call("stack", [x(4, 6), x(4, 6)], -1), "a b, a b -> a b [c]"),
    (call("std", x(4, 6)), "[a] [b] -> ()"),
    (call("std.correction", x(4, 6), [1]), "a [b] -> a"),
    (call("std.dim", x(4, 6), [1]), "a [b] -> a"),
    (call("std_mean", x(4, 6)), "[a] [b] -> (), ()"),
    (call("std_mean.correction", x(4, 6), [1]), "a [b] -> a, a"),
    (call("std_mean.dim", x(4, 6), [1]), "a [b] -> a, a"),
    (call("sub.Scalar", x(4), 1), "a -> a"),
    (call("sub.Tensor", x(4), x(4)), "a, a -> a"),
    (call("subtract.Scalar", x(4), 1), "a -> a"),
    (call("subtract.Tensor", x(4), x(4)), "a, a -> a"),
    (call("sum", x(4, 6)), "a b -> () | a: sum, b: sum"),
    (call("sum.dim_IntList", x(4, 6), [0], True), "b a -> 1 a | b: sum"),
    (call("swapaxes", x(4, 6), 0, 1), "b a -> a b"),
    (call("swapdims", x(4, 6), 0, 1), "b a -> a b"),
    (call("t", x(4, 6)), "b a -> a b"),
    (call("take_along_dim", x(4, 6), ints(6, 4, 2), 1), "a [c], a b -> a b"),
    (call("tan", x(4)), "a -> a"),
    (call("tanh", x(4)), "a -> a"),
    (call("tensor_split.indices", x(4, 6), [2], 1), "a [d] -> a [b], a [c]"),
    (call("tensor_split.sections", x(4, 6), 2, 1), "a [d] -> a [b], a [c]"),
    (call("tensordot", x(4, 2, 6), x(6, 2, 8), [1, 2], [1, 0]), "a c d, d c b -> a b | c: sum, d: sum"),
    (call("threshold", x(4), 0.1, 0.2), "a -> a"),
    (call("tile", x(4, 6), [2]), "a c -> a (b c)"),
    (call("to.device", x(4), torch.device("cpu"), torch.float32), "a -> a"),
    (call("to.dtype", x(4, 6), torch.float32), "a b -> a b"),
    (call("to.dtype_layout", x(4), dtype=torch.float32), "a -> a"),
    (call("to.other", x(4, 6), x(2)), "a b, c -> a b"),
    (call("topk", x(4, 6), 2), "a [c] -> a [b], a [b]"),
    (call("transpose.int", x(2, 4, 6), 1, -1), "a c b -> a b c"),
    (call("tril", x(2, 4, 6)), "a [b] [c] -> a [b] [c]"),
    (call("tril_indices", 2, 2), "-> [a] [b]"),
    (call("triu", x(2, 4, 6), 1), "a [b] [c] -> a [b] [c]"),
    (call("triu_indices", 2, 2), "-> [a] [b]"),
    (call("true_divide.Scalar", x(4), 3), "a -> a"),
    (call("true_divide.Tensor", x(4), pos(4)), "a, a -> a"),
    (call("trunc", x(4)), "a -> a"),
    (call("type_as", x(4, 6), x(2)), "a b, c -> a b"),
    (call("unbind.int", x(4, 2, 6), 1), "a [c] b -> a b, a b"),
    (call("unflatten.int", x(4, 8), -1, [2, -1]), "a (b c) -> a b c"),
    (call("unfold", x(4, 6), 1, 2, 1), "a [d] -> a [b] [c]"),
    (call("unsqueeze", x(4, 6), 1), "a b -> a 1 b"),
    (call("var", x(4, 6)), "[a] [b] -> ()"),
    (call("var.correction", x(4, 6), [1]), "a [b] -> a"),
    (call("var.dim", x(4, 6), [1], True, True), "a [b] -> a 1"),
    (call("var_mean", x(4, 6)), "[a] [b] -> (), ()"),
    (call("var_mean.correction", x(4, 6), [1], correction=0), "a [b] -> a, a"),
    (call("var_mean.dim", x(4, 6), [1]), "a [b] -> a, a"),
    (call("vdot", x(4), x(4)), "a, a -> () | a: sum"),
    (call("view", x(2, 4, 8), [2, 4, -1, 4]), "a b (c d) -> a b c d"),
    (call("view", x(2, 4, 6), [-1, 6]), "a b c -> (a b) c"),
    (call("view", x(4, 6), [6, 4]), "[c] [d] -> [a] [b]"),
    (call("view", x(4, 6, 2), [6, 4, 2]), "[d] [e] c -> [a] [b] c"),
    (call("view", x(4, 6), [8, 3]), "a (b c) -> (a b) c"),
    (call("view", x(1, 4, 1, 6), [4, 6, 1]), "1 a 1 b -> a b 1"),
    (call("view.dtype", x(4), torch.int64), "a -> a"),
    (call("view_as", x(4, 6), x(2, 12)), "(a b) c, d e -> a (b c)"),
    (call("view_as_complex", x(4, 6, 2)), "a b [c] -> a b"),
    (call("view_as_real", cplx(4, 6)), "a b -> a b [c]"),
    (call("vstack", [x(2, 4), x(6, 4)]), "[c] b, [d] b -> [a] b"),
    (call("where.Scalar", flags(4), 1.0, 2.0), "a -> a"),
    (call("where.ScalarOther", flags(4, 1), x(4, 6), 0.5), "a 1, a b -> a b"),
    (call("where.ScalarSelf", flags(4, 1), 0.5, x(4, 6)), "a 1, a b -> a b"),
    (call("where.self", flags(4, 6), x(6), x()), "a b, b, () -> a b"),
    (call("xlogy.Scalar_Other", x(4), 2.0), "a -> a"),
    (call("xlogy.Scalar_Self", 2.0, pos(4)), "a -> a"),
    (call("xlogy.Tensor", x(4), pos(4)), "a, a -> a"),
    (call("zero", x(4)), "a -> a"),
    (call("zeros", [4, 6]), "-> a b"),
    (call("zeros_like", x(4, 6)), "a b -> a b"),
]


NO_RULE = [
    call("cross_entropy_loss", x(4, 6), pos(4, 6)),
    call("einsum", "ii->i", [x(4, 4)]),
    call("index.Tensor", x(4, 6), [flags(4)]),
    call("inner", x(4, 8), x(6, 8)),
    call("mse_loss", x(4, 6), x(6)),
    call("take_along_dim", x(4, 6), ints(6, 4)),
    call("view.dtype", x(4, 6), torch.float32),
]


@pytest.mark.parametrize(("call", "text"), CASES, ids=[c.name for c, _ in CASES])
def test_text(call: Call, text: str) -> None:
    node = call.node()
    rule = rule_of(node)
    assert rule is not None
    assert rule.text() == text
    check_sizes(node, rule)


@pytest.mark.parametrize("call", NO_RULE, ids=[c.name for c in NO_RULE])
def test_forms_without_a_rule(call: Call) -> None:
    assert rule_of(call.node()) is None


def check_sizes(node: fx.Node, rule: OpRule) -> None:
    """Every dim has the product of its factors' sizes; a factor is of some use; replicated ones are not reduced."""
    tensors = [n.meta["val"] for n in tensor_operands(node)] + tensor_results(node)
    layouts = [*rule.operands, *rule.results]
    assert len(tensors) == len(layouts)
    for tensor, dims in zip(tensors, layouts, strict=True):
        assert tensor.ndim == len(dims)
        for size, dim in zip(tensor.shape, dims, strict=True):
            assert statically_known_true(size == math.prod(rule.sizes[f] for f in dim)), (rule.text(), size, dim)
    assert set(rule.sizes) == {f for dims in layouts for dim in dims for f in dim}
    assert rule.replicated <= set(rule.sizes)
    assert not rule.replicated & set(rule.reductions)
    assert not set(rule.reductions) & {f for dims in rule.results for dim in dims for f in dim}


def test_table_is_alphabetical_and_complete() -> None:
    names = [c.name for c, _ in CASES]
    assert names == sorted(names)
    assert len({c.op for c, _ in CASES}) >= 120
    aten_ops = {str(op) for op in registered_ops() if op.namespace == "aten"}
    missing = aten_ops - {str(c.op) for c, _ in CASES}
    assert not missing


def symbolic_nodes(function: Any, *inputs: torch.Tensor) -> Iterator[tuple[fx.Node, OpRule]]:
    """The calls of a function captured with symbolic sizes."""
    graph = make_fx(function, pre_dispatch=True, tracing_mode="symbolic")(*inputs).graph
    for node in graph.nodes:
        if node.op == "call_function" and tensor_results(node):
            rule = rule_of(node)
            assert rule is not None, node.format_node()
            check_sizes(node, rule)
            yield node, rule


def heads(h: torch.Tensor) -> torch.Tensor:
    b, s, _ = h.shape
    return h.view(b, s, -1, 4).transpose(1, 2).reshape(b, 3, s * 4)


def repeated(h: torch.Tensor) -> torch.Tensor:
    b, g, s, d = h.shape
    return h[:, :, None].expand(b, g, 3, s, d).reshape(b, g * 3, s, d)


def prefix(h: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return table[: h.shape[0]]


SYMBOLIC: list[tuple[Any, tuple[Any, ...], list[str]]] = [
    (lambda h: h.view(-1, 6), ((2, 5, 6),), ["a b c -> (a b) c"]),
    (lambda h: h.view(h.shape[0], -1), ((2, 5, 6),), ["a b c -> a (b c)"]),
    (heads, ((2, 5, 12),), ["a b (c d) -> a b c d", "a c b d -> a b c d", "a b c d -> a b (c d)"]),
    (
        repeated,
        ((2, 4, 5, 6),),
        [*["a b c d -> a b c d"] * 2, "a b c d -> a b 1 c d", "a b 1 d e -> a b c d e", "a b c d e -> a (b c) d e"],
    ),
    (lambda h: h + h.mean(-1, keepdim=True), ((3, 5),), ["a b -> a 1 | b: sum", "a b, a 1 -> a b"]),
    (lambda h, w: torch.nn.functional.linear(h, w), ((2, 5, 6), (7, 6)), ["a b d, c d -> a b c | d: sum"]),
    (lambda h: h[:, : h.shape[1]], ((3, 5),), ["a b -> a b"]),
    (prefix, ((3, 5), (9, 4)), ["[c] b -> [a] b"]),
    (lambda h: torch.arange(h.shape[1]), ((3, 5),), ["-> [a]"]),
    (lambda h: h.new_zeros(h.shape[1], 4), ((3, 5),), ["c d -> a b"]),
    (lambda h: torch.cat([h.new_empty(0), h], -1), ((3, 5),), ["b c -> a", "[c], a b -> a b"]),
]


@pytest.mark.parametrize(("function", "shapes", "texts"), SYMBOLIC)
def test_symbolic_sizes(function: Any, shapes: tuple[tuple[int, ...], ...], texts: list[str]) -> None:
    inputs = [torch.rand(shape) for shape in shapes]
    assert [rule.text() for _, rule in symbolic_nodes(function, *inputs)] == texts


def test_prefix_slices_are_marked() -> None:
    for node in (
        call("slice.Tensor", x(4, 6), 1, 0, 4).node(),
        call("slice.Tensor", x(4, 6), 1, None, -2).node(),
        call("slice.Tensor", x(4, 6), 1, -7, -2).node(),
        call("narrow", x(4, 6), 1, 0, 4).node(),
    ):
        rule = rule_of(node)
        assert rule is not None
        assert rule.prefix_of == {"b": "c"}
    for node in (
        call("slice.Tensor", x(4, 6), 1, 1, 6).node(),
        call("slice.Tensor", x(4, 6), 1, 0, 6, 2).node(),
        call("narrow", x(4, 6), 1, 1, 4).node(),
    ):
        rule = rule_of(node)
        assert rule is not None
        assert not rule.prefix_of


def test_operands_follow_the_order_of_the_call() -> None:
    graph = fx.Graph()
    mode = FakeTensorMode()
    h, w, b = (graph.placeholder(name) for name in "hwb")
    for node, shape in ((h, (2, 8)), (w, (6, 8)), (b, (6,))):
        node.meta["val"] = mode.from_tensor(torch.rand(shape))
    node = graph.call_function(torch.ops.aten.linear.default, (h,), {"bias": b, "weight": w})
    node.meta["val"] = mode.from_tensor(torch.rand(2, 6))
    rule = rule_of(node)
    assert rule is not None
    assert rule.text() == "a [c], b, b [c] -> a b"


def test_an_op_has_one_rule() -> None:
    with pytest.raises(ValueError, match="has a rule already"):
        register(torch.ops.aten.linear.default)(lambda node: None)


@pytest.mark.parametrize(
    ("bias", "expected"),
    [
        (None, "b (g r) s [h], b g t [h], b g t [v] -> b (g r) s [v], b (g r) s"),
        (
            (1, 4, 5, 6),
            "b (g r) s [h], b g t [h], b g t [v], 1 (g r) s [bias3] -> b (g r) s [v], b (g r) s",
        ),
    ],
)
def test_keys_of_attention_are_split_with_its_rows(bias: tuple[int, ...] | None, expected: str) -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *masks: torch.Tensor) -> torch.Tensor:
        mask = masks[0] if masks else None
        return torch.ops.spx.attention(q, k, v, None, None, None, None, None, mask, "full", 0.5)[0]

    shapes = [(2, 4, 5, 3), (2, 2, 6, 3), (2, 2, 6, 7), *([bias] if bias else [])]
    graph = make_fx(attend, pre_dispatch=True)(*[torch.randn(shape) for shape in shapes]).graph
    node = next(n for n in graph.nodes if n.target is torch.ops.spx.attention.default)
    rule = rule_of(node)
    assert rule is not None
    assert rule.text() == expected
    assert rule.paired == {"s": "t"}
