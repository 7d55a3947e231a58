"""FlexAttention calls, written out when a graph is captured: the passes then recognise them as any other attention.

score_mod and mask_mod are graphs over one score and its indices (b, h, q, k). Every op in them is elementwise, so on
index tensors that broadcast to [B, N, S, T] they compute all scores at once. Nothing of that size is left where the
passes can read them; where they cannot, the call is refused (`UnknownFlexAttention`), not computed densely.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from spcompile.capture.autocast import EXIT
from spcompile.diagnostics import CaptureFailed, UnknownFlexAttention, source_of
from spcompile.torch_private_func import VMAP_SWITCHES

MARK = "spx_flex_attention"  # in meta["custom"] of the nodes of a call that was written out


def written_out(
    q_BNSH: Tensor,
    k_BGTH: Tensor,
    v_BGTV: Tensor,
    score_mod: Callable[..., Tensor],
    block_mask: Sequence[Any],
    scale: float,
    kernel_options: Any,
    score_buffers: Sequence[Any] = (),
    mask_buffers: Sequence[Any] = (),
) -> tuple[Tensor, None, None]:
    """The output of a flex_attention call; not its log-sum-exp, nor its largest scores."""
    B, N, S, _ = q_BNSH.shape
    repeats, T = N // k_BGTH.shape[1], k_BGTH.shape[2]
    k, v = (x if repeats == 1 else x.repeat_interleave(repeats, 1) for x in (k_BGTH, v_BGTV))
    sizes = ((B, 3), (N, 2), (S, 1), (T, 0))
    with fx.traceback.annotate({MARK: True}):
        indices = [
            torch.arange(size, dtype=torch.int32, device=q_BNSH.device).reshape(-1, *(1,) * behind)
            for size, behind in sizes
        ]
        scores = score_mod((q_BNSH @ k.mT) * scale, *indices, *score_buffers)
        keep = block_mask[-1](*indices, *mask_buffers)
        scores = scores.masked_fill(~keep, -torch.inf)
        return scores.softmax(-1).to(v.dtype) @ v, None, None


def without_block_sizes(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph without the sparse block lists of its FlexAttention calls: mask_mod says the same, and can be read.

    Raises:
        CaptureFailed: a call whose log-sum-exp is read.
    """
    flex = torch.ops.higher_order.flex_attention
    if not any(node.target is flex for node in gm.graph.nodes):
        return gm
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(gm.graph, mapping))
    copy = fx.GraphModule(gm, graph)
    for old, new in mapping.items():
        new.meta = dict(old.meta)
    for node in graph.nodes:
        if node.target is flex:
            if any(user.target is operator.getitem and user.args[1] != 0 and user.users for user in node.users):
                raise CaptureFailed(
                    "the log-sum-exp of FlexAttention is read", legal="flex_attention without return_lse"
                )
            block_mask: Any = node.args[4]
            node.update_arg(4, (*(None,) * (len(block_mask) - 1), block_mask[-1]))
    needed = _ancestors(graph)
    for node in reversed(list(graph.nodes)):
        if node.op not in ("placeholder", "output") and node not in needed:
            graph.erase_node(node)
    copy.recompile()
    return copy


def _ancestors(graph: fx.Graph) -> set[fx.Node]:
    """What the outputs are made of, and what writes to it or switches a mode."""
    needed: set[fx.Node] = set()
    pending = [node for node in graph.nodes if node.op == "output"]
    while pending:
        while pending:
            node = pending.pop()
            if node not in needed:
                needed.add(node)
                pending += node.all_input_nodes
        for node in graph.nodes:
            if node in needed or node.users or node.target in VMAP_SWITCHES:
                continue
            written = node.args[:1]
            is_needed = not node.all_input_nodes or any(x in needed for x in written) or node.target is EXIT
            if node.op != "get_attr" and is_needed:
                pending.append(node)
    return needed


def refuse(node: fx.Node, reason: str) -> None:
    """Nothing for the nodes of other attentions.

    Raises:
        UnknownFlexAttention: the node belongs to a FlexAttention call.
    """
    if node.meta.get("custom", {}).get(MARK):
        raise UnknownFlexAttention(
            reason,
            where=source_of(node),
            legal="mods that mean a softcap, ALiBi or a bias; causal, window, prefix, chunk, document or padding masks",
        )
