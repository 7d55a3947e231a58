"""`generate` of a compiled model runs uncompiled, on every rank with the whole inputs, as in one process.

A sequence that grows by a token is another program at each step, and of one query there is nothing to split. The ranks
of a batch must pass the same inputs, and draw the same random numbers where tokens are sampled.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

_PLAIN = "_spx_plain"  # set on a `generate` that runs uncompiled


def generating_plainly(model: nn.Module) -> None:
    """Give a model that has a `generate` one that runs uncompiled; its modules gather sharded parameters."""
    base: Any = type(model)
    if hasattr(base, "generate") and not getattr(base.generate, _PLAIN, False):
        model.__class__ = _generating_plainly(base)


@functools.cache
def _generating_plainly(base: Any) -> type[nn.Module]:
    @functools.wraps(base.generate)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        compiled, self._compiled_call_impl = self._compiled_call_impl, None
        try:
            return base.generate(self, *args, **kwargs)
        finally:
            self._compiled_call_impl = compiled

    setattr(generate, _PLAIN, True)
    kept = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (base,), {**kept, "generate": generate})
