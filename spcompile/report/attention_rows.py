"""What `explain` says of each attention: how it is spread, its heads and mask, what is done to scores, its kernel."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch
import torch.fx as fx

from spcompile.attention.kernels.choice import Wanted, kernels_for
from spcompile.attention.scores.attention_call import AttentionCall
from spcompile.graph.typed_call import value_of
from spcompile.machine.accelerators import ACCELERATORS
from spcompile.program.build import LocalProgram
from spcompile.recognition.attention_nodes import AVERAGED, OF_ROWS_WITHOUT_KEYS
from spcompile.report.plan import AttentionRow


def attention_rows(graph: fx.Graph, program: LocalProgram) -> list[AttentionRow]:
    """A row for each kind of attention in a GLOBAL graph of a program; what only rows without keys see is no other."""
    mesh = program.ctx.mesh
    without_cp = "heads of each rank" if mesh.size("tp") > 1 else "one device"
    kinds: Counter[tuple[str, int, int, str, str, str]] = Counter()
    for node in AttentionCall.all_in(graph):
        call, custom = AttentionCall.of(node), node.meta.get("custom", {})
        if OF_ROWS_WITHOUT_KEYS in custom:
            continue  # a part of the one in front of it
        sizes = call.sizes.hints()
        strategy = custom.get("spx_attention", "ring") if mesh.size("cp") > 1 else without_cp
        scores = _scores_text(call, AVERAGED in custom)
        kernel = _kernel_text(call, strategy, program)
        kinds[(strategy, sizes.heads, sizes.kv_heads, _mask_text(call), scores, kernel)] += 1
    return [AttentionRow(strategy, n, heads, kv, *rest) for (strategy, heads, kv, *rest), n in kinds.items()]


def _kernel_text(call: AttentionCall, strategy: str, program: LocalProgram) -> str:
    """The kernel that computes an attention on the accelerator of the options."""
    capability = ACCELERATORS[program.ctx.options.accelerator].capability
    if capability is None:
        return ""
    sizes = call.sizes.hints()
    more = (call.bias, call.alibi_slopes, call.sinks)
    wanted = Wanted(
        capability=capability,
        dtype=value_of(call.q).dtype,
        head_size=sizes.qk_size,
        v_size=sizes.v_size,
        mask=call.attention_mask,
        is_plain=not call.has_softcap and not call.has_dropout and all(x is None for x in more),
        in_hops=program.ctx.mesh.size("cp") > 1 and strategy != "ulysses",
        square=sizes.q_rows == sizes.k_rows,
        scale=call.scale,
    )
    return kernels_for(wanted)[0].name


def _mask_text(call: AttentionCall) -> str:
    """The mask as the model has it: ids that only tell rows without keys are no documents of its."""
    mask = call.attention_mask
    if mask.fill is None:
        return call.mask
    has_padding = call.k_documents.target is not torch.ops.aten.zeros.default
    return str(replace(mask, documents=False, fill=None, key_padding=has_padding))


def _scores_text(call: AttentionCall, is_averaged: bool) -> str:
    """What an attention does to scores beside its mask."""
    found = {
        f"softcap {call.softcap:g}": call.has_softcap,
        "ALiBi": call.alibi_slopes is not None,
        "sinks": call.sinks is not None,
        f"dropout {call.dropout_p:g}": call.has_dropout,
        "dense bias": call.bias is not None,
        "rows without keys apart": is_averaged,
    }
    return ", ".join(name for name, is_there in found.items() if is_there)
