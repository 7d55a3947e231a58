"""sink-all-reduce: which ops partial sums pass, what that saves, and that gradients stay right."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spcompile

D, HIDDEN = 4, 6


class Block(nn.Module):
    """Attention over [B, S, D], a gate of three numbers a token, and what `end` makes of them and of two MLPs."""

    def __init__(self, end: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.end = end
        self.up, self.other_up = (nn.Linear(D, HIDDEN, bias=False, dtype=torch.float64) for _ in range(2))
        self.down, self.other_down = (nn.Linear(HIDDEN, D, bias=False, dtype=torch.float64) for _ in range(2))
        self.gate = nn.Linear(D, 3, dtype=torch.float64)

    def forward(self, x_BSD: Tensor) -> Tensor:
        h_B1SD = x_BSD.unsqueeze(1)
        y_BSD = F.scaled_dot_product_attention(h_B1SD, h_B1SD, h_B1SD).squeeze(1)
        first_BSD = self.down(F.gelu(self.up(y_BSD)))
        second_BSD = self.other_down(F.gelu(self.other_up(y_BSD)))
        return self.end(x_BSD, first_BSD, second_BSD, self.gate(y_BSD)).square().sum()


def branches(x_BSD: Tensor, first_BSD: Tensor, second_BSD: Tensor, gate_BS3: Tensor) -> Tensor:
    return first_BSD - second_BSD * gate_BS3[..., :1].sigmoid() + x_BSD


def scattered(x_BSD: Tensor, first_BSD: Tensor, second_BSD: Tensor, gate_BS3: Tensor) -> Tensor:
    out_TD = torch.zeros(x_BSD.shape[0] * x_BSD.shape[1], D, dtype=x_BSD.dtype)
    places_T = torch.arange(len(out_TD)).flip(0)
    out_TD = out_TD.index_add(0, places_T, first_BSD.flatten(0, 1)).index_add(0, places_T, second_BSD.flatten(0, 1))
    return out_TD.view(x_BSD.shape) + x_BSD


def onto_something(x_BSD: Tensor, first_BSD: Tensor, second_BSD: Tensor, gate_BS3: Tensor) -> Tensor:
    """A sum that a rank adds to what all have would be added once a rank."""
    places_S = torch.arange(x_BSD.shape[1])
    return x_BSD.index_add(1, places_S, first_BSD).index_add(1, places_S, second_BSD)


def product(x_BSD: Tensor, first_BSD: Tensor, second_BSD: Tensor, gate_BS3: Tensor) -> Tensor:
    return (first_BSD * second_BSD).sum(1)


def rounded(x_BSD: Tensor, first_BSD: Tensor, second_BSD: Tensor, gate_BS3: Tensor) -> Tensor:
    return first_BSD.float().sum(1) + second_BSD.float().sum(1)


def widened(x_BSD: Tensor, first_BSD: Tensor, second_BSD: Tensor, gate_BS3: Tensor) -> Tensor:
    """Three copies of a value are not sent where one would do."""
    return first_BSD.unsqueeze(2).expand(-1, -1, 3, -1) * gate_BS3.unsqueeze(-1) + second_BSD.unsqueeze(2)


def sent(model: nn.Module, inputs: dict[str, Tensor], **options: object) -> float:
    """Bytes of all activations."""
    plan = spcompile.explain(model, inputs, mesh={"tp": 2}, **options)
    return sum(float(row.bytes) for row in plan.collectives if row.origin != "parameter gradient")


@pytest.mark.thinned(29)
@pytest.mark.parametrize(
    ("end", "passed"),
    [
        (branches, True),
        (scattered, True),
        (onto_something, False),
        (product, False),
        (rounded, False),
        (widened, False),
    ],
)
def test_what_is_passed(end: Callable[..., Tensor], passed: bool) -> None:
    model, inputs = Block(end), {"x_BSD": torch.randn(2, 7, D, dtype=torch.float64)}
    report = spcompile.verify(model, inputs, mesh={"tp": 2}, tolerance=1e-6 if end is rounded else None)
    assert report.ok, str(report)
    now, before = sent(model, inputs), sent(model, inputs, passes={"sink-all-reduce": False})
    assert now < before if passed else now == before


@pytest.mark.thinned(8)
@pytest.mark.slow
def test_experts_are_weighted_before_their_sum_is_completed() -> None:
    """Bytes of the completed sum no longer grow with the experts of a token."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.MixtralConfig(
        vocab_size=32, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, **sizes
    )
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config)
    ids_BS = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids_BS, "labels": ids_BS}
    report = spcompile.verify(model, inputs, mesh={"tp": 2})
    assert report.ok, str(report)
    now, before = sent(model, inputs), sent(model, inputs, passes={"sink-all-reduce": False})
    token = 2 * 8 * 16 * 4 // 2  # bytes that a rank sends of one number for each feature of each token
    assert before - now >= 2 * token
