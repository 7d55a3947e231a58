"""Running sums along a split dim: ranks send each other what their parts come to, and nothing else.

B batch, S sequence, D width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from example_numerics import after_pass, check_pipeline, nodes_of, remarks_of
from torch import Tensor

B, S, D = 2, 11, 4


def made(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def attend(x_BSD: Tensor) -> Tensor:
    h = x_BSD.unsqueeze(1)
    return F.scaled_dot_product_attention(h, h, h, is_causal=True).squeeze(1)


def means_so_far(x_BSD: Tensor, w_DD: Tensor) -> Tensor:
    h_BSD = attend(x_BSD @ w_DD)
    return h_BSD.cumsum(1) / torch.arange(1, S + 1)[:, None] + h_BSD.sin()


def of_all_entries(x_BSD: Tensor, w_DD: Tensor) -> Tensor:
    """Tokens of one entry are counted behind those of the entry before, and columns behind rows."""
    h_BSD = attend(x_BSD @ w_DD)
    return h_BSD.flatten(0, 1).sin().cumsum(0).view_as(h_BSD) + h_BSD.flatten(1).cos().cumsum(-1).view_as(h_BSD)


def from_the_end(x_BSD: Tensor, w_DD: Tensor) -> Tensor:
    return attend(x_BSD @ w_DD).sin().flip(1).cumsum(1).flip(1) @ w_DD


def places_in_experts(x_BSD: Tensor, w_DD: Tensor) -> Tensor:
    """Of the tokens of all entries, the first three that choose an expert get it."""
    h_ND = attend(x_BSD @ w_DD).flatten(0, 1)
    scores_NE = h_ND.softmax(-1)
    chosen_NE = F.one_hot(scores_NE.argmax(-1), D)
    has_place_NE = chosen_NE * (chosen_NE.cumsum(0) <= 3)
    return (h_ND * (scores_NE * has_place_NE).sum(-1, keepdim=True)).view_as(x_BSD)


@pytest.mark.thinned(17)
@pytest.mark.parametrize(("degree", "attention"), [(2, "ring"), (3, "ring"), (2, "ulysses"), (4, "ulysses")])
@pytest.mark.parametrize("sums", [means_so_far, of_all_entries, from_the_end, places_in_experts])
def test_only_totals_are_sent(sums: Callable[..., Any], degree: int, attention: str) -> None:
    program = check_pipeline(sums, (made(B, S, D), made(D, D)), {"cp": degree}, attention=attention)
    assert not remarks_of(program, "SPR103")
    assert not remarks_of(program, "SPR108")
    gathers = [n for n in nodes_of(program, "spx.all_gather") if all(user.op != "output" for user in n.users)]
    lengths = {n.args[2] for n in gathers}
    assert lengths <= {degree, 2 * degree}, "one total of each chunk"


def test_sums_in_half_precision_are_taken_in_float32() -> None:
    """A rank's own sums, and those of the chunks before, would be rounded once more."""
    x_BSD = torch.randn(1, S, D).bfloat16().requires_grad_()
    program = after_pass("lower", means_so_far, (x_BSD, torch.eye(D).bfloat16()))
    assert {n.meta["val"].dtype for n in nodes_of(program, "aten.cumsum")} == {torch.float32}
