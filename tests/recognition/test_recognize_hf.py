"""Eager attention of Hugging Face models on all ranks: softcap, ALiBi, sinks, masks with a finite fill, dropout.

Dtypes: in float64 a model that casts scores to float32 turns finfo.min into -inf, and has NaN in rows without keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hf_models import packed_positions
from oracle import default_dtype
from torch import Tensor, nn

from spcompile import explain, verify

VOCAB, LENGTH, WINDOW = 60, 16, 5
COMMON = {"vocab_size": VOCAB, "initializer_range": 0.2}
DECODER: dict[str, Any] = {
    **COMMON,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": WINDOW,
    "attn_implementation": "eager",
}


def gemma2() -> nn.Module:
    import transformers as T

    return T.Gemma2ForCausalLM(T.Gemma2Config(**DECODER))


def gpt_oss() -> nn.Module:
    import transformers as T

    kinds = ["sliding_attention", "full_attention"]
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "experts_implementation": "batched_mm"}
    return T.GptOssForCausalLM(T.GptOssConfig(**DECODER, **experts, layer_types=kinds))


def bloom() -> nn.Module:
    import transformers as T

    off = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
    return T.BloomForCausalLM(T.BloomConfig(hidden_size=32, n_layer=1, n_head=4, **off, **COMMON))


def mpt() -> nn.Module:
    import transformers as T

    sizes = {"d_model": 32, "n_layers": 1, "n_heads": 4, "max_seq_len": 64, "expansion_ratio": 2}
    return T.MptForCausalLM(T.MptConfig(**sizes, **COMMON))


def gptj(attention_dropout: float = 0.0) -> nn.Module:
    import transformers as T

    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4, "n_positions": 64}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": attention_dropout}
    return T.GPTJForCausalLM(T.GPTJConfig(**sizes, **off, **COMMON, attn_implementation="eager"))


def gptj_with_dropout() -> nn.Module:
    return gptj(0.3)


def gpt_neo() -> nn.Module:
    import transformers as T

    kinds = {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW, "max_position_embeddings": 64}
    off = {"resid_dropout": 0.0, "embed_dropout": 0.0, "attention_dropout": 0.0}
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4}
    return T.GPTNeoForCausalLM(T.GPTNeoConfig(**sizes, **kinds, **off, **COMMON, attn_implementation="eager"))


def checkpointed_llama() -> nn.Module:
    """Attention dropout in regions that the backward computes again: the seeds must not be drawn again."""
    import transformers as T

    sizes = {name: value for name, value in DECODER.items() if name != "sliding_window"}
    model = T.LlamaForCausalLM(T.LlamaConfig(**sizes, attention_dropout=0.3))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def batch(kind: str) -> dict[str, Any]:
    ids = torch.randint(1, VOCAB, (2, LENGTH))
    keep = torch.ones_like(ids)
    if kind == "right padding":
        keep[0, -4:] = 0
    elif kind == "left padding":
        keep[1, :3] = 0
    extra: dict[str, Tensor] = {"attention_mask": keep} if kind.endswith("padding") else {}
    if kind == "packed":
        extra = {"position_ids": packed_positions(2, LENGTH)}
    return {"input_ids": ids, "labels": ids.clone(), "use_cache": False, **extra}


ALTERNATING = [f"causal window={WINDOW}", "causal"]
PADDED = [f"{mask} key_padding" for mask in ALTERNATING]
CASES: list[Any] = [
    (mpt, "right padding", "ulysses", ["causal key_padding"]),
    (gpt_oss, "left padding", "ring", PADDED),
    (gpt_neo, "plain", "ring", ALTERNATING),
    (gpt_neo, "left padding", "ring", PADDED),
    (gemma2, "left padding", "ring", PADDED),
    (gemma2, "packed", "ulysses", [f"{mask} documents" for mask in ALTERNATING]),
    (bloom, "left padding", "ulysses", ["causal key_padding"]),
    (gptj, "left padding", "ulysses", ["causal key_padding"]),
    (gptj_with_dropout, "right padding", "ring", ["causal key_padding"]),
    (checkpointed_llama, "right padding", "ring", ["causal key_padding"]),
    (gemma2, "plain", "ring", ALTERNATING),
    (gpt_oss, "plain", "ulysses", ALTERNATING),
    (bloom, "plain", "ring", ["causal"]),
    (mpt, "plain", "ring", ["causal"]),
    (gptj, "plain", "ring", ["causal"]),
]


@pytest.mark.slow
@pytest.mark.thinned(30)
@pytest.mark.parametrize(("build", "kind", "attention", "masks"), CASES)
def test_eager_attention(build: Callable[[], nn.Module], kind: str, attention: str, masks: list[str]) -> None:
    with default_dtype(torch.float32 if kind == "left padding" else torch.float64):
        torch.manual_seed(0)
        model, inputs = build().train(), batch(kind)
        tolerance = 1e-5 if kind == "left padding" else 1e-6
        report = verify(model, inputs, mesh={"cp": 2}, attention=attention, tolerance=tolerance)
        assert report.ok, str(report)
        plan = explain(model, inputs, mesh={"cp": 2}, attention=attention)
    assert {row.mask for row in plan.attention} == set(masks)
    apart = {"rows without keys apart" in row.scores for row in plan.attention}
    assert apart == {build in (gpt_neo, gemma2) and kind == "left padding"}
    assert {row.strategy for row in plan.attention} == {attention}
    assert not {"SPR101", "SPR202"} & {remark.code for remark in plan.remarks}
