"""Makes ambient autocast explicit: the casts it would do become nodes, and the graph means the same without it.

Autocast acts below the level at which graphs are captured, so it leaves no node behind, only example values of other
dtypes than the ops alone would give. Where that is so, the floating operands are cast to the dtype autocast gave.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from spcompile.graph.edit import call
from spcompile.torch_private import detect_fake_mode

aten = torch.ops.aten
_LOW = (torch.float16, torch.bfloat16, torch.float32)


_DEVICES = ("cpu", "cuda")
_SWITCHES = ("_enter_autocast", "_exit_autocast")


def autocast_in(gm: fx.GraphModule) -> bool:
    """Whether autocast is on around the graph, or switched on inside it."""
    inside = any(getattr(n.target, "__name__", "") in _SWITCHES for n in gm.graph.nodes)
    return inside or any(torch.is_autocast_enabled(d) for d in _DEVICES)


@contextmanager
def autocast_off() -> Iterator[None]:
    """Compile without ambient autocast: its casts are in the graph."""
    devices = [d for d in _DEVICES if torch.is_autocast_enabled(d)]
    with ExitStack() as stack:
        for device in devices:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


def make_explicit(gm: fx.GraphModule) -> int:
    """Insert the casts; returns how many calls got some."""
    changed = 0
    with autocast_off():
        for node in list(gm.graph.nodes):
            if node.op == "call_function" and isinstance(node.meta.get("val"), Tensor):
                changed += _cast_operands(node)
    for node in list(gm.graph.nodes):
        if getattr(node.target, "__name__", "") in _SWITCHES:
            node.replace_all_uses_with(None)
            gm.graph.erase_node(node)
    gm.recompile()
    return changed


def _cast_operands(node: fx.Node) -> bool:
    """Cast the operands of one call to its result's dtype, if the call alone would give another."""
    wanted = node.meta["val"].dtype
    if wanted not in _LOW or (_dtype_alone(node) == wanted and not _mixes(node)):
        return False

    def cast(operand: fx.Node) -> fx.Node:
        value = operand.meta.get("val")
        if not isinstance(value, Tensor) or value.dtype not in _LOW or value.dtype == wanted:
            return operand
        return call(node.graph, aten._to_copy.default, (operand,), {"dtype": wanted}, like=node)

    node.args = fx.node.map_arg(node.args, cast)
    node.kwargs = fx.node.map_arg(node.kwargs, cast)
    return True


def _mixes(node: fx.Node) -> bool:
    """Whether a call that does not promote types reads several of them: fakes do not object, kernels do."""
    tags = getattr(node.target, "tags", ())
    if torch.Tag.pointwise in tags or node.target in (aten.cat.default, aten.stack.default):
        return False
    values = [n.meta.get("val") for n in node.all_input_nodes]
    return len({v.dtype for v in values if isinstance(v, Tensor) and v.dtype in _LOW}) > 1


def _dtype_alone(node: fx.Node) -> Any:
    """The dtype this call gives on its operands without autocast; None where it refuses them."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    mode = detect_fake_mode(torch.utils._pytree.tree_leaves((args, kwargs)))
    if mode is None:
        return node.meta["val"].dtype
    try:
        with mode, torch.no_grad():
            result = node.target(*args, **kwargs)  # type: ignore[operator]
    except RuntimeError:
        return None
    return result.dtype if isinstance(result, Tensor) else None
