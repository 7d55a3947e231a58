"""Images: rows of patches are split, whatever reads them as one sequence, in windows, or along one of their dims.

B batch, H and W rows and columns of patches, D width, K width of a window.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from example_numerics import check_pipeline, nodes_of
from torch import Tensor


def made(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def attend(x_BSD: Tensor, **settings: bool) -> Tensor:
    h = x_BSD.unflatten(-1, (2, -1)).transpose(1, 2)
    return F.scaled_dot_product_attention(h, h, h, **settings).transpose(1, 2).flatten(2)


def across(x_BHWD: Tensor, w_D1KK: Tensor, **settings: int) -> Tensor:
    """Each channel by itself."""
    h_BDHW = x_BHWD.permute(0, 3, 1, 2)
    return F.conv2d(h_BDHW, w_D1KK, groups=len(w_D1KK), **settings).permute(0, 2, 3, 1)


def flattened(x_BHWD: Tensor, w_DD: Tensor, w_D1KK: Tensor) -> Tensor:
    """A convolution between two attentions over all patches, of which the second sees them in order."""
    h_BHWD = x_BHWD @ w_DD
    h_BHWD = h_BHWD + attend(h_BHWD.flatten(1, 2)).view_as(h_BHWD)
    h_BHWD = h_BHWD + across(h_BHWD, w_D1KK, padding=1).sin()
    return h_BHWD + attend(h_BHWD.flatten(1, 2), is_causal=True).view_as(h_BHWD)


def fewer_keys(x_BHWD: Tensor, w_DD: Tensor, w_D1KK: Tensor) -> Tensor:
    """Queries of all patches, keys of every second row and column."""
    q, k = (heads.flatten(1, 2) for heads in (x_BHWD @ w_DD, across(x_BHWD, w_D1KK, padding=1, stride=2)))
    q, k = (heads.unflatten(-1, (2, -1)).transpose(1, 2) for heads in (q, k))
    return F.scaled_dot_product_attention(q, k, k.sin()).transpose(1, 2).flatten(2).view_as(x_BHWD)


def axial(x_BHWD: Tensor, w_DD: Tensor, w_D1KK: Tensor) -> Tensor:
    """Along rows, then along columns: one of both is split."""
    h_BHWD = x_BHWD @ w_DD
    h_BHWD = h_BHWD + attend(h_BHWD.flatten(0, 1)).view_as(h_BHWD)
    h_BWHD = h_BHWD.transpose(1, 2)
    return (h_BWHD + attend(h_BWHD.flatten(0, 1)).view_as(h_BWHD).sin()).transpose(1, 2)


def windows(x_BHWD: Tensor, w_DD: Tensor, w_D1KK: Tensor) -> Tensor:
    """Patches see those of their window of 4 x 4; every second layer cuts windows elsewhere; then every second row."""
    B, H, W, D = x_BHWD.shape
    h_BHWD = x_BHWD @ w_DD
    for shift in (0, 2):
        cut = torch.roll(h_BHWD, (-shift, -shift), (1, 2)).view(B, H // 4, 4, W // 4, 4, D)
        seen = attend(cut.transpose(2, 3).reshape(-1, 16, D)).view(B, H // 4, W // 4, 4, 4, D)
        seen = torch.roll(seen.transpose(2, 3).reshape(x_BHWD.shape), (shift, shift), (1, 2))
        h_BHWD = h_BHWD + seen.sin()
    return torch.cat((h_BHWD[:, 0::2, 0::2], h_BHWD[:, 1::2, 0::2]), -1)


def chunks(x_BHWD: Tensor, w_DD: Tensor, w_D1KK: Tensor) -> Tensor:
    """A sequence of H * W places, of which W neighbours see each other."""
    h_BSD = x_BHWD.flatten(1, 2) @ w_DD
    return h_BSD + attend(h_BSD.reshape(-1, x_BHWD.shape[2], h_BSD.shape[-1])).view_as(h_BSD).sin()


def no_attention(x_BHWD: Tensor, w_DD: Tensor, w_D1KK: Tensor) -> Tensor:
    h_BHWD = x_BHWD + across(x_BHWD, w_D1KK, padding=1).sin() @ w_DD
    h_BDHW = F.conv2d(h_BHWD.permute(0, 3, 1, 2), w_DD[:, :, None, None].expand(-1, -1, 2, 2), stride=2)
    return F.adaptive_avg_pool2d(F.pad(h_BDHW, (1, 0, 1, 1)).cos(), 1)


CASES: dict[str, tuple[Callable[..., Tensor], int, int]] = {
    "flattened": (flattened, 12, 2),
    "flattened, uneven": (flattened, 5, 3),
    "fewer keys": (fewer_keys, 12, 4),
    "fewer keys, uneven": (fewer_keys, 7, 4),
    "axial": (axial, 4, 6),
    "windows": (windows, 16, 8),
    "chunks": (chunks, 8, 4),
    "chunks, uneven": (chunks, 5, 4),
    "no attention": (no_attention, 7, 6),
}
RINGS = {"flattened": 2, "flattened, uneven": 2, "fewer keys": 1, "fewer keys, uneven": 1, "axial": 1}


@pytest.mark.thinned(30)
@pytest.mark.parametrize("degree", [2, 3, 4])
@pytest.mark.parametrize("attention", ["ring", "ulysses"])
@pytest.mark.parametrize("name", CASES)
def test_nobody_gathers(name: str, attention: str, degree: int) -> None:
    function, height, width = CASES[name]
    inputs = [made(2, height, width, 4), made(4, 4), made(4, 1, 3, 3)]
    program = check_pipeline(function, inputs, {"cp": degree}, attention=attention)
    assert {remark.code for remark in program.ctx.remarks.rows} <= {"SPR203"}
    if attention == "ring":
        assert len(nodes_of(program, "spx.ring_attention")) == RINGS.get(name, 0)
