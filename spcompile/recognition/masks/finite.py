"""Whether a bias is made of numbers of the size of scores, so that it excludes no key."""

from __future__ import annotations

import torch
import torch.fx as fx

from spcompile.attention.scores.mask import EXCLUDES
from spcompile.capture.module_buffer import KEY
from spcompile.graph.edit import is_tensor

aten = torch.ops.aten

_CASTS = {aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default, aten.type_as.default}
_CASTS |= {aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default}
_VIEWS = {aten.unsqueeze.default, aten.permute.default, aten.transpose.int, aten.view.default, aten.reshape.default}
_VIEWS |= {aten.unflatten.int, aten.flatten.using_ints, aten.repeat.default, aten.select.int, aten.slice.Tensor}
_VIEWS |= {aten.expand.default, aten.squeeze.dim, aten.index.Tensor, aten.gather.default, aten.cat.default}
_VIEWS |= {aten.stack.default, aten.triu.default, aten.tril.default}
_NEW = {aten.zeros.default, aten.ones.default, aten.zeros_like.default, aten.ones_like.default}
_NEW |= {aten.arange.default, aten.arange.start, aten.arange.start_step}
_ARITHMETIC = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.rsub.Scalar}
_ARITHMETIC |= {aten.neg.default, aten.abs.default, aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default}
_ARITHMETIC |= {aten.full.default, aten.scalar_tensor.default, aten.where.self, aten.where.ScalarSelf}
_ARITHMETIC |= {aten.where.ScalarOther, aten.masked_fill.Scalar}
_ARITHMETIC |= {aten.pad.default, aten.constant_pad_nd.default}
_ARITHMETIC |= {aten.exp.default, aten.sqrt.default, aten.square.default, aten.pow.Tensor_Scalar, aten.relu.default}
_ARITHMETIC |= {aten.gelu.default, aten.silu.default, aten.softplus.default, aten.log_sigmoid.default}
_ARITHMETIC |= {aten.cumsum.default, aten.sum.dim_IntList, aten.mean.dim}
_PRODUCTS = {aten.matmul.default, aten.mm.default, aten.bmm.default, aten.linear.default, aten.addmm.default}
_PRODUCTS |= {aten.einsum.default, aten.embedding.default}
_BOUNDED = {aten.tanh.default, aten.sigmoid.default, aten.softmax.int, aten.layer_norm.default}
_BOUNDED |= {aten.sin.default, aten.cos.default}


def is_finite(node: fx.Node) -> bool:
    """Whether a bias excludes no key: it is made of integers, parameters and products by ops that keep numbers small.

    Parameters (inputs that require a gradient), and sums of products, are taken to be of the size of scores. Buffers
    are read; other inputs may hold masks.
    """
    value = node.meta["val"]
    if not value.dtype.is_floating_point or node.target in _PRODUCTS | _BOUNDED | _NEW:
        return True
    if node.op == "placeholder":
        given = getattr(node.meta.get("grapharg"), "example", value)
        return bool(getattr(given, "requires_grad", False)) or (KEY in node.meta and node.meta[KEY].is_small())
    if node.target in _ARITHMETIC:
        numbers = [arg for arg in (*node.args, *node.kwargs.values()) if isinstance(arg, int | float)]
        if any(not abs(number) < -EXCLUDES for number in numbers):
            return False
    elif node.target not in _VIEWS | _CASTS:
        return False
    return all(is_finite(operand) for operand in node.all_input_nodes if is_tensor(operand))
