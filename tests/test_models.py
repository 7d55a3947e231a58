"""The plain models: they are deterministic, causal where they say so, blind to padding, and they learn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spcompile.models import MODELS, bert, build, gpt, llama

TINY = [name for name in MODELS if name.endswith("-tiny")]
CAUSAL = [name for name in TINY if MODELS[name].objective == "next token"]


def make(name: str, **overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    return build(name, **overrides).double()


def tokens(batch: int, seq: int, vocab: int = 64) -> Tensor:
    return torch.randint(vocab, (batch, seq), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", TINY)
def test_the_same_seed_gives_the_same_parameters(name: str) -> None:
    first, second = make(name), make(name)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("name", TINY)
def test_a_few_steps_lower_the_loss_and_every_parameter_has_a_gradient(name: str) -> None:
    model, ids_BS = make(name), tokens(2, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(ids_BS, labels_BS=ids_BS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", CAUSAL)
def test_logits_do_not_depend_on_later_tokens(name: str) -> None:
    model, ids_BS = make(name), tokens(2, 12)
    changed_BS = ids_BS.clone()
    changed_BS[:, 7:] = (changed_BS[:, 7:] + 1) % 64
    before, after = model(ids_BS), model(changed_BS)
    torch.testing.assert_close(after[:, :7], before[:, :7], rtol=0, atol=1e-14)
    assert not torch.allclose(after[:, 7:], before[:, 7:])


@pytest.mark.parametrize("name", CAUSAL)
def test_the_loss_is_the_mean_over_next_tokens_that_are_not_ignored(name: str) -> None:
    model, ids_BS = make(name), tokens(2, 12)
    labels_BS = ids_BS.clone()
    labels_BS[0, 3:9] = -100
    log_p_BSV = model(ids_BS).log_softmax(-1)
    rows = [-log_p_BSV[b, s, ids_BS[b, s + 1]] for b in range(2) for s in range(11) if labels_BS[b, s + 1] != -100]
    torch.testing.assert_close(model(ids_BS, labels_BS=labels_BS), torch.stack(rows).mean())


def test_llama_is_relative_in_position() -> None:
    """Rotary angles: a query and a key turned by the same shift have the same product."""
    x = torch.randn(1, 1, 1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).expand(1, 1, 8, 16)
    cos_SH, sin_SH = llama.rotary_angles(8, 16, 10000.0, like=x)
    turned = llama.rotate(x, cos_SH, sin_SH)[0, 0]
    products = turned @ turned.T
    for shift in range(8):
        diagonal = products.diagonal(shift)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


def test_gpt_ties_its_output_weights_and_llama_does_not() -> None:
    tied, untied = gpt.build(gpt.GPTConfig.tiny()), llama.build(llama.LlamaConfig.tiny())
    assert tied.head.weight is tied.tokens.weight
    assert untied.head.weight is not untied.tokens.weight


def test_gpt_dropout_is_off_in_eval() -> None:
    model, ids_BS = make("gpt-tiny", dropout=0.5), tokens(1, 8)
    assert not torch.equal(model(ids_BS), model(ids_BS))
    model.eval()
    assert torch.equal(model(ids_BS), model(ids_BS))


def test_bert_ignores_padding_and_looks_both_ways() -> None:
    model, ids_BS = make("bert-tiny"), tokens(2, 12)
    keep_BS = torch.arange(12) < torch.tensor([[12], [9]])
    changed_BS = torch.where(keep_BS, ids_BS, (ids_BS + 1) % 64)
    before, after = model(ids_BS, keep_BS=keep_BS), model(changed_BS, keep_BS=keep_BS)
    torch.testing.assert_close(after[keep_BS], before[keep_BS], rtol=0, atol=1e-14)
    last_changed_BS = ids_BS.clone()
    last_changed_BS[:, 11] = (last_changed_BS[:, 11] + 1) % 64
    assert not torch.allclose(model(last_changed_BS)[:, 0], model(ids_BS)[:, 0])


def test_bert_reads_token_types_and_scores_masked_tokens_only() -> None:
    model, ids_BS = make("bert-tiny"), tokens(2, 12)
    types_BS = (torch.arange(12) >= 6).long().expand(2, 12)
    assert not torch.allclose(model(ids_BS, token_types_BS=types_BS), model(ids_BS))
    labels_BS = torch.full_like(ids_BS, -100)
    labels_BS[0, 4], labels_BS[1, 7] = ids_BS[0, 4], ids_BS[1, 7]
    log_p_BSV = model(ids_BS).log_softmax(-1)
    expected = -(log_p_BSV[0, 4, ids_BS[0, 4]] + log_p_BSV[1, 7, ids_BS[1, 7]]) / 2
    torch.testing.assert_close(model(ids_BS, labels_BS=labels_BS), expected)


def test_overrides_reach_the_config_and_unknown_names_are_errors() -> None:
    assert len(make("llama-tiny", layers=3).get_submodule("blocks")._modules) == 3
    with pytest.raises(TypeError):
        build("llama-tiny", no_such_field=1)
    with pytest.raises(KeyError):
        build("no-such-model")


@pytest.mark.thinned(6)
@pytest.mark.parametrize("config", [gpt.GPTConfig.gpt2(), llama.LlamaConfig.llama3_8b(), bert.BertConfig.bert_base()])
def test_full_sizes_build_on_the_meta_device(config: Any) -> None:
    module = {gpt.GPTConfig: gpt, llama.LlamaConfig: llama, bert.BertConfig: bert}[type(config)]
    with torch.device("meta"):
        model = module.build(config)
        ids_BS = torch.zeros(1, 32, dtype=torch.long)
    assert model(ids_BS, labels_BS=ids_BS).shape == ()
