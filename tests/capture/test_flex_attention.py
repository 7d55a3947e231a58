"""FlexAttention: mods that mean known scores and masks are recognised, forward and gradients; others are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from example_numerics import check_pipeline
from recognition import qkv, rewrite
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from spcompile.diagnostics import UnknownFlexAttention

LENGTH = 12


@pytest.fixture(autouse=True)
def gradients_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch refuses to train with FlexAttention on CPUs, since its compiled kernel cannot; its formula can."""
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *tensors: None)


DOCUMENTS = torch.tensor([[0] * 5 + [1] * 7, [3] * 2 + [1] * 10])
Mod = Callable[..., Tensor]


def attend(mask_mod: Mod | None = None, score_mod: Mod | None = None) -> Callable[..., Tensor]:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = None
        if mask_mod is not None:
            mask = create_block_mask(mask_mod, q.shape[0], None, q.shape[2], k.shape[2], device="cpu")
        gqa = q.shape[1] != k.shape[1]
        out = flex_attention(q, k, v, score_mod=score_mod, block_mask=mask, enable_gqa=gqa)
        assert isinstance(out, Tensor)
        return out

    return model


MASKS: dict[str, Mod] = {
    "causal": lambda b, h, q, k: q >= k,
    "causal window=4": lambda b, h, q, k: (q >= k) & (q - k < 4),
    "causal prefix=5": lambda b, h, q, k: (k <= q) | (k < 5),
    "chunk=4": lambda b, h, q, k: q // 4 == k // 4,
    "causal documents": lambda b, h, q, k: (q >= k) & (DOCUMENTS[b, q] == DOCUMENTS[b, k]),
    "key_padding": lambda b, h, q, k: k < DOCUMENTS.sum(1)[b],
}


@pytest.mark.thinned(27)
@pytest.mark.parametrize("expected", MASKS)
def test_masks(expected: str) -> None:
    found = rewrite(attend(MASKS[expected]), qkv(4, 2))
    assert str(found.mask) == expected
    assert found.attentions[0].args[1].meta["val"].shape[1] == 2  # type: ignore[union-attr]
    assert (LENGTH, LENGTH) not in {size[-2:] for size in found.sizes()}


SLOPES = 2.0 ** -torch.arange(1.0, 5.0, dtype=torch.float64)


@pytest.mark.thinned(4)
def test_softcap() -> None:
    found = rewrite(attend(MASKS["causal"], lambda s, b, h, q, k: 3 * torch.tanh(s / 3)), qkv())
    assert found.masks == ["causal"]
    assert found.attentions[0].args[14] == 3


@pytest.mark.thinned(4)
def test_alibi() -> None:
    found = rewrite(attend(MASKS["causal"], lambda s, b, h, q, k: s + SLOPES[h] * (k - q)), qkv())
    assert found.masks == ["causal + alibi"]


@pytest.mark.thinned(3)
def test_without_mods() -> None:
    assert rewrite(attend(), qkv()).masks == ["full"]


@pytest.mark.thinned(2)
def test_a_block_mask_from_outside() -> None:
    mask = create_block_mask(MASKS["causal window=4"], None, None, LENGTH, LENGTH, device="cpu")
    found = rewrite(lambda q, k, v: flex_attention(q, k, v, block_mask=mask), qkv())
    assert str(found.mask) == "causal window=4"


@pytest.mark.thinned(10)
@pytest.mark.parametrize("attention", ["ring", "ulysses"])
def test_on_all_ranks(attention: str) -> None:
    model = attend(MASKS["causal window=4"], lambda s, b, h, q, k: 2 * torch.tanh(s / 2))
    check_pipeline(model, qkv(4, 2), {"cp": 2}, attention=attention)


RANDOM = torch.rand(LENGTH, LENGTH) < 0.5
UNKNOWN: dict[str, tuple[Mod | None, Mod | None]] = {
    "mask_mod": (lambda b, h, q, k: RANDOM[q, k], None),
    "scores": (None, lambda s, b, h, q, k: s * s),
    "is replaced by something": (None, lambda s, b, h, q, k: torch.where(q >= k, s, -s)),
}


@pytest.mark.thinned(9)
@pytest.mark.parametrize("name", UNKNOWN)
def test_other_mods_are_refused(name: str) -> None:
    with pytest.raises(Exception, match="SP303") as caught:
        rewrite(attend(*UNKNOWN[name]), qkv())
    cause: Any = caught.value
    assert isinstance(getattr(cause, "inner_exception", cause), UnknownFlexAttention)
