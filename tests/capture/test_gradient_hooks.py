"""Hooks of tensors, registered in a forward: they see what they see in the plain model.

B batch, S sequence, D width.
"""

from __future__ import annotations

import pytest
import torch
from around_attention import WIDTH, AroundAttention, Lines
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import spcompile
from spcompile.diagnostics import CaptureFailed


def scaled(inner: nn.Linear, x_BSD: Tensor) -> Tensor:
    y_BSD = inner(x_BSD)
    y_BSD.register_hook(lambda gradient: gradient * 2)
    return y_BSD


def behind_another_reader(inner: nn.Linear, x_BSD: Tensor) -> Tensor:
    y_BSD = inner(x_BSD)
    wave = y_BSD.sin()
    y_BSD.register_hook(lambda gradient: gradient * 2)
    return y_BSD + wave


def reads_a_value(inner: nn.Linear, x_BSD: Tensor) -> Tensor:
    y_BSD, gate = inner(x_BSD), x_BSD.sigmoid()
    y_BSD.register_hook(lambda gradient: gradient * gate)
    return y_BSD


def one_after_the_other(inner: nn.Linear, x_BSD: Tensor) -> Tensor:
    y_BSD = inner(x_BSD)
    y_BSD.register_hook(lambda gradient: gradient * 2)
    y_BSD.register_hook(lambda gradient: gradient + 1)
    y_BSD.register_hook(lambda gradient: None)
    return y_BSD


def of_a_parameter(inner: nn.Linear, x_BSD: Tensor) -> Tensor:
    inner.weight.register_hook(lambda gradient: gradient * 2)
    return inner(x_BSD)


def in_a_checkpoint(inner: nn.Linear, x_BSD: Tensor) -> Tensor:
    y: Tensor = checkpoint(scaled, inner, x_BSD, use_reentrant=False)
    return y


def of_complex_numbers(inner: nn.Linear, x_BSD: Tensor) -> Tensor:
    waves = torch.fft.rfft(inner(x_BSD), dim=-1)
    waves.register_hook(lambda gradient: gradient * 2)
    return torch.fft.irfft(waves, n=WIDTH, dim=-1)


KINDS = [
    scaled,
    behind_another_reader,
    reads_a_value,
    one_after_the_other,
    of_a_parameter,
    in_a_checkpoint,
    of_complex_numbers,
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("mesh", [{"cp": 2}, {"tp": 2}], ids=str)
@pytest.mark.thinned(4)
def test_every_gradient_is_that_of_the_plain_model(kind: Lines, mesh: dict[str, int]) -> None:
    torch.manual_seed(0)
    report = spcompile.verify(AroundAttention(kind).double(), (torch.randn(2, 7, WIDTH).double(),), mesh)
    assert report.ok, report


def test_a_hook_that_is_not_linear_is_refused() -> None:
    def clipped(inner: nn.Linear, x_BSD: Tensor) -> Tensor:
        y_BSD = inner(x_BSD)
        y_BSD.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
        return y_BSD

    with pytest.raises(CaptureFailed, match="a hook whose gradient cannot be sharded"):
        spcompile.explain(AroundAttention(clipped), (torch.randn(2, 8, WIDTH),), {"cp": 2})


def test_a_hook_that_reads_its_own_tensor_is_refused() -> None:
    def gated(inner: nn.Linear, x_BSD: Tensor) -> Tensor:
        y_BSD = inner(x_BSD)
        gate = y_BSD.detach().sigmoid()
        y_BSD.register_hook(lambda gradient: gradient * gate)
        return y_BSD

    with pytest.raises(CaptureFailed, match="that earlier readers add to"):
        spcompile.explain(AroundAttention(gated), (torch.randn(2, 8, WIDTH),), {"cp": 2})
