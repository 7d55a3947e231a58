"""Sequence-parallel training of plain single-GPU transformers: `torch.compile(model, backend="spcompile")`."""

from __future__ import annotations

from spcompile.broadcast import broadcast
from spcompile.compare_ways import compare
from spcompile.diagnostics import (
    BatchNotSplit,
    CaptureFailed,
    ChangedBuffer,
    ForkedChild,
    GraphBreak,
    HostMemoryExceeded,
    IllegalMesh,
    IllegalModel,
    IllegalOption,
    IllegalPlugin,
    InvalidGraph,
    NoProcessGroup,
    NotComputed,
    OutOfMemory,
    RanksDisagree,
    RanksMissing,
    RunsUncompiled,
    SpcompileError,
    StrictRemark,
    TwoThreads,
    UnknownFlexAttention,
    UnknownOption,
)
from spcompile.explain import explain
from spcompile.full_state_dict import full_state_dict
from spcompile.options import Options
from spcompile.parallelize import parallelize
from spcompile.plan_world import plan
from spcompile.verify import verify

__all__ = [
    "BatchNotSplit",
    "CaptureFailed",
    "ChangedBuffer",
    "ForkedChild",
    "GraphBreak",
    "HostMemoryExceeded",
    "IllegalMesh",
    "IllegalModel",
    "IllegalOption",
    "IllegalPlugin",
    "InvalidGraph",
    "NoProcessGroup",
    "NotComputed",
    "Options",
    "OutOfMemory",
    "RanksDisagree",
    "RanksMissing",
    "RunsUncompiled",
    "SpcompileError",
    "StrictRemark",
    "TwoThreads",
    "UnknownFlexAttention",
    "UnknownOption",
    "__version__",
    "broadcast",
    "compare",
    "explain",
    "full_state_dict",
    "parallelize",
    "plan",
    "verify",
]
__version__ = "0.1.0"
