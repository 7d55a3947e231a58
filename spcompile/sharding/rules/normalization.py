"""Ops that relate the elements along some dims and keep the shape: `a [b], [b] -> a [b]`."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

from spcompile.graph.aten_ops import overloads
from spcompile.graph.sizes import same
from spcompile.graph.typed_call import named_arguments
from spcompile.sharding.rules.calls import arguments
from spcompile.sharding.rules.factors import Dim, Factor, Layout, broadcast_factors, factors, make_rule
from spcompile.sharding.rules.rule import LocalCall, OpRule, register, tensor_results

SOFTMAXES = """
    _log_softmax _safe_softmax _softmax log_softmax.int softmax.int special_log_softmax special_softmax
"""
LAYER_NORMS = """
    _fused_rms_norm layer_norm native_layer_norm rms_norm
"""


@register(*overloads(SOFTMAXES))
def softmax(node: fx.Node) -> OpRule:
    """`a b [c] -> a b [c]`."""
    args = arguments(node)
    dims = factors(args["self"].shape)
    if dims:
        dims[args["dim"]].replicated = True
    return make_rule(node, {"self": dims}, [dims])


@register(*overloads(LAYER_NORMS))
def layer_norm(node: fx.Node) -> OpRule:
    """`a b [c], [c], [c] -> a b [c]`; statistics are `a b 1`."""
    args = arguments(node)
    dims = factors(args["input"].shape)
    normalized = dims[len(dims) - len(args["normalized_shape"]) :]
    for factor in normalized:
        factor.replicated = True
    statistics: list[Dim] = [() if factor.replicated else factor for factor in dims]
    results: list[Layout] = [dims, *(statistics for _ in tensor_results(node)[1:])]
    return make_rule(node, {"input": dims, "weight": normalized, "bias": normalized}, results)


@register(torch.ops.aten.group_norm.default)
def group_norm(node: fx.Node) -> OpRule:
    """`a (b [d]) [c], (b [d]), (b [d]) -> a (b [d]) [c]`: whole groups may be sharded."""
    args = arguments(node)
    batch, channels, *rest = args["input"].shape
    groups, members = Factor(args["num_groups"]), Factor(channels // args["num_groups"], replicated=True)
    dims: list[Dim] = [Factor(batch), (groups, members), *factors(rest, replicated=True)]
    affine = [(groups, members)]

    def local(call: LocalCall) -> Any:
        shard = named_arguments(node.target, call.args, call.kwargs)
        count = shard["input"].shape[1] // members.size
        return torch.group_norm(shard["input"], count, shard["weight"], shard["bias"], shard["eps"])

    return make_rule(node, {"input": dims, "weight": affine, "bias": affine}, [dims], local=local)


@register(torch.ops.aten._native_batch_norm_legit_no_training.default)
def batch_norm_of_known_statistics(node: fx.Node) -> OpRule:
    """`a b c, b, b, b, b -> a b c`: in eval mode each element is scaled by numbers of its channel."""
    args = arguments(node)
    dims = factors(args["input"].shape)
    names = ("weight", "bias", "running_mean", "running_var")
    of_channels = {name: [dims[1]] for name in names if args[name] is not None}
    empty: list[Layout] = [[Factor(size, replicated=True) for size in x.shape] for x in tensor_results(node)[1:]]
    return make_rule(node, {"input": dims, **of_channels}, [dims, *empty])


@register(torch.ops.aten.cosine_similarity.default)
def cosine_similarity(node: fx.Node) -> OpRule | None:
    """`a [b], a [b] -> a`."""
    args = arguments(node)
    out = factors(tensor_results(node)[0].shape)
    shapes = [args["x1"].shape, args["x2"].shape]
    rank = max(map(len, shapes))
    dim = args["dim"] % rank
    size = next((s[dim - rank] for s in shapes if len(s) >= rank - dim and not same(s[dim - rank], 1)), 1)
    dims = [*out[:dim], Factor(size, replicated=True), *out[dim:]]
    x1, x2 = (broadcast_factors(shape, dims) for shape in shapes)
    return None if x1 is None or x2 is None else make_rule(node, {"x1": x1, "x2": x2}, [out])


@register(torch.ops.aten.scaled_dot_product_attention.default)
def attention(node: fx.Node) -> OpRule | None:
    """`a (b f) c g, a b [h] g, a b [h] d, ... -> a (b f) c d`: keys are whole.

    Query head `b f` uses the key head `b` (`enable_gqa`). Causal attention by `is_causal` needs the query positions,
    so c is replicated there. With dropout every factor is.
    """
    args = arguments(node)
    query, key, value = (args[name].shape for name in ("query", "key", "value"))
    if not len(query) == len(key) == len(value) or len(query) < 3:
        return None
    batch = factors(query[:-3])
    shared, per_key_head = Factor(query[-3]), Factor(1)
    if not same(query[-3], key[-3]):
        if not args["enable_gqa"]:
            return None
        shared, per_key_head = Factor(key[-3]), Factor(query[-3] // key[-3])
    heads = (shared, per_key_head)
    rows = Factor(query[-2], replicated=args["is_causal"])
    columns, depth = Factor(key[-2], replicated=True), Factor(query[-1], replicated=True)
    features = Factor(value[-1])
    if any(
        not same(a, b) for a, b in [*zip(query[:-3], key[:-3], strict=True), *zip(query[:-3], value[:-3], strict=True)]
    ):
        return None
    if args["dropout_p"]:
        for factor in (*batch, *heads, rows, features):
            factor.replicated = True
    operands: dict[str, Any] = {
        "query": [*batch, heads, rows, depth],
        "key": [*batch, shared, columns, depth],
        "value": [*batch, shared, columns, features],
    }
    if args["attn_mask"] is not None:
        mask = args["attn_mask"].shape
        head_dims = [heads if len(mask) >= 3 and not same(mask[-3], 1) else ()] if len(mask) >= 3 else []
        leading, trailing = broadcast_factors(mask[:-3], batch), broadcast_factors(mask[-2:], [rows, columns])
        if leading is None or trailing is None:
            return None
        operands["attn_mask"] = [*leading, *head_dims, *trailing]
    return make_rule(node, operands, [[*batch, heads, rows, features]])
