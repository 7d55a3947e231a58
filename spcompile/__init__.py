"""Sequence-parallel training of plain single-GPU transformers: `torch.compile(model, backend="spcompile")`."""

from __future__ import annotations

from spcompile.broadcast import broadcast
from spcompile.explain import explain
from spcompile.options import Options
from spcompile.parallelize import parallelize
from spcompile.verify import verify

__all__ = ["Options", "__version__", "broadcast", "explain", "parallelize", "verify"]
__version__ = "0.1.0"
