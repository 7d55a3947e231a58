"""split-transforms: a Fourier transform over several dims becomes one over each of them.

    fftn(x, dim=[1, 2])                 fft(fft(x, dim=2), dim=1)
    irfftn(x, s=[4, 6], dim=[1, 2])     irfft(ifft(x, n=4, dim=1), n=6, dim=2)

Ranks that hold parts of one dim transform the others; for its own transform another dim is split meanwhile. A
transform over all dims at once would have to be gathered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx
from torch import Tensor

from spcompile.graph.aten_ops import overloads
from spcompile.graph.edit import call, erase_dead
from spcompile.graph.typed_call import named_arguments
from spcompile.passes_api import Context, Example, Pass, Stage
from spcompile.sharding.rules.calls import arguments

aten = torch.ops.aten
_OVER_DIMS = {  # (the transform of the last dim, that of the others)
    "fft_fft2 fft_fftn": (aten.fft_fft, aten.fft_fft),
    "fft_ifft2 fft_ifftn": (aten.fft_ifft, aten.fft_ifft),
    "fft_rfft2 fft_rfftn": (aten.fft_rfft, aten.fft_fft),
    "fft_irfft2 fft_irfftn": (aten.fft_irfft, aten.fft_ifft),
}
_PARTS: dict[Any, tuple[Any, Any]] = {op: parts for names, parts in _OVER_DIMS.items() for op in overloads(names)}


@dataclass(frozen=True)
class SplitTransforms(Pass):
    """One transform for each dim."""

    name: ClassVar[str] = "split-transforms"
    stage: ClassVar[Stage] = Stage.GLOBAL
    axis: ClassVar[str | None] = "cp"
    summary: ClassVar[str] = "makes a Fourier transform over several dims one over each, so that ranks may hold parts"

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        """Rewrite the transforms over more than one dim."""
        matches = [(n, lengths) for n in gm.graph.nodes if n.target in _PARTS and len(lengths := _lengths(n)) > 1]
        for node, lengths in matches:
            node.replace_all_uses_with(_one_by_one(node, lengths))
        if matches:
            erase_dead(gm)
        return len(matches)


def _lengths(node: fx.Node) -> dict[int, Any]:
    """The dims in order, and the length that each is cut or padded to: None for its own."""
    args = named_arguments(node.target, node.args, node.kwargs)
    rank, sizes, dims = args["self"].meta["val"].ndim, args["s"], args["dim"]
    if dims is None:
        dims = range(-rank if sizes is None else -len(sizes), 0)
    sizes = [None] * len(dims) if sizes is None else sizes
    return {dim % rank: size for dim, size in zip(dims, sizes, strict=True)}


def _one_by_one(node: fx.Node, lengths: dict[int, Any]) -> fx.Node:
    """A real dim is transformed first on the way there, and last on the way back."""
    of_last, of_others = _PARTS[node.target]
    last, *others = reversed(lengths)
    steps = [(last, of_last), *((dim, of_others) for dim in others)]
    value, norm = node.args[0], arguments(node)["norm"]
    for dim, transform in reversed(steps) if of_last is aten.fft_irfft else steps:
        value = call(node.graph, transform.default, (value, lengths[dim], dim, norm), like=node)
    assert isinstance(value, fx.Node)
    return value


def _filter(x_BHWC: Tensor, gain_BHWC: Tensor) -> Tensor:
    spectrum = torch.fft.rfft2(x_BHWC, dim=(1, 2), norm="ortho") * gain_BHWC
    return torch.fft.irfftn(spectrum, s=(7, 6), dim=(1, 2), norm="ortho")


def _inputs() -> tuple[Tensor, ...]:
    return tuple(torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 7, 6, 3), (1, 7, 4, 3)))


EXAMPLE = Example(_filter, _inputs)
