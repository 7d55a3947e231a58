"""Makes autocast explicit: the casts that it would do become nodes, and the graph means the same without it.

Autocast acts below the level at which graphs are captured, so it leaves no node behind. Here it is told what it does to
each call, under the state that it has at that place: around the graph, switched on or off inside, nested.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.fx as fx

from spcompile.capture.autocast_calls import Explicit

DEVICES = ("cpu", "cuda")
ENTER = torch.amp.autocast_mode._enter_autocast
EXIT = torch.amp.autocast_mode._exit_autocast
_CAST = (torch.float32, torch.float16, torch.bfloat16)


def is_on() -> bool:
    """Whether autocast is on here, for any device."""
    return any(torch.is_autocast_enabled(device) for device in DEVICES)


def state() -> str:
    """What autocast does here, as text."""
    return " ".join(f"{d}={torch.get_autocast_dtype(d)}" for d in DEVICES if torch.is_autocast_enabled(d))


@contextmanager
def autocast_off() -> Iterator[None]:
    """Without ambient autocast, as in a compile whose graph has its casts, or in a backward."""
    devices = [d for d in DEVICES if torch.is_autocast_enabled(d)]
    with ExitStack() as stack:
        for device in devices:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def without_cache() -> Iterator[None]:
    """Autocast casts anew at each use: a fake that it kept would meet the real parameter later."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def cast(x: torch.Tensor) -> torch.Tensor:
    """What autocast makes of an operand of a product here."""
    device = x.device.type
    if device not in DEVICES or not torch.is_autocast_enabled(device) or x.dtype not in _CAST:
        return x
    dtype = torch.get_autocast_dtype(device)
    return x if x.dtype == dtype else x.to(dtype)


class Regions:
    """The autocast contexts that a graph's switches have entered and not left yet."""

    def __init__(self) -> None:
        self._open: list[torch.autocast] = []

    def enter(self, device: str, dtype: Any = None, enabled: bool = True, cache: Any = None) -> torch.autocast:
        """What `_enter_autocast` does; in a trace before dispatch this also leaves the switch in the new graph."""
        context = torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False)
        context.__enter__()
        self._open.append(context)
        return context

    def exit(self, context: torch.autocast) -> None:
        """What `_exit_autocast` does."""
        self._open.remove(context)
        context.__exit__(None, None, None)

    def close(self) -> None:
        """Leave what is open, as where an error ended the graph early."""
        while self._open:
            self._open.pop().__exit__(None, None, None)


@contextmanager
def running_switches() -> Iterator[Callable[[fx.Node], None]]:
    """A function that obeys the switches among the nodes it is given, in their order; autocast is put back."""
    regions = Regions()
    contexts: dict[Any, torch.autocast] = {}

    def run(node: fx.Node) -> None:
        if node.target is ENTER:
            contexts[node] = regions.enter(*node.args)  # type: ignore[arg-type]
        elif node.target is EXIT:
            regions.exit(contexts.pop(node.args[0]))

    try:
        with without_cache():
            yield run
    finally:
        regions.close()


def make_explicit(gm: fx.GraphModule) -> int:
    """Insert the casts, remove the switches; returns how many calls changed."""
    switches = [n for n in gm.graph.nodes if n.target in (ENTER, EXIT)]
    if not switches and not is_on():
        return 0
    changed = 0
    explicit = Explicit()
    with running_switches() as run_switch:
        for node in list(gm.graph.nodes):
            run_switch(node)
            if is_on():
                changed += explicit(node, state())
    for node in reversed(switches):
        gm.graph.erase_node(node)
    gm.recompile()
    return changed
