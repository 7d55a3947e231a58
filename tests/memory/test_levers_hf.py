"""Models of transformers with each lever of a plan alone and with all at once: numbers stay what they are.

B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lever_searches import LEVERS
from oracle import default_dtype
from torch import nn

import spcompile
from spcompile.memory import planner

VOCAB, LENGTH = 90, 37
DROPPED = 0.1
FAMILIES = ("llama", "qwen3", "gemma2", "mistral", "gpt_neox", "phi3", "bert", "t5")
FLOAT32_INSIDE = ("llama", "qwen3", "gemma2", "mistral", "phi3", "gpt_neox")  # the loss at least
HOST = 10**9

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
_DECODER: dict[str, Any] = {**_SIZES, "num_key_value_heads": 2, "head_dim": 8}


def family(name: str) -> nn.Module:
    """A model of two layers in training mode, on torch's default dtype; dropout is on where the family has it."""
    import transformers as T

    T.logging.set_verbosity_error()
    bert = {"hidden_dropout_prob": DROPPED, "attention_probs_dropout_prob": 0.0}
    t5 = {"d_model": 32, "d_ff": 128, "d_kv": 8, "num_layers": 2, "num_heads": 4, "vocab_size": VOCAB}
    made: dict[str, Callable[[], nn.Module]] = {
        "llama": lambda: T.LlamaForCausalLM(T.LlamaConfig(**_DECODER)),
        "qwen3": lambda: T.Qwen3ForCausalLM(T.Qwen3Config(**_DECODER)),
        "gemma2": lambda: T.Gemma2ForCausalLM(T.Gemma2Config(**_DECODER, sliding_window=16)),
        "mistral": lambda: T.MistralForCausalLM(T.MistralConfig(**_DECODER, sliding_window=16)),
        "gpt_neox": lambda: T.GPTNeoXForCausalLM(T.GPTNeoXConfig(**_SIZES, hidden_dropout=DROPPED)),
        "phi3": lambda: T.Phi3ForCausalLM(T.Phi3Config(**_DECODER, resid_pdrop=DROPPED)),
        "bert": lambda: T.BertForMaskedLM(T.BertConfig(**_SIZES, **bert)),
        "t5": lambda: T.T5ForConditionalGeneration(
            T.T5Config(**t5, dropout_rate=DROPPED, decoder_start_token_id=0, pad_token_id=0)
        ),
    }
    return made[name]().train()


def tokens_of(name: str) -> dict[str, Any]:
    ids_BS = torch.randint(1, VOCAB, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    cache = {} if name == "bert" else {"use_cache": False}
    return {"input_ids": ids_BS, "labels": ids_BS, **cache}


@pytest.mark.parametrize(
    ("mesh", "attention"),
    [
        ({"cp": 2}, "ring"),
        pytest.param({"cp": 2}, "ulysses", marks=pytest.mark.slow),
        pytest.param({"tp": 2}, "auto", marks=pytest.mark.slow),
        pytest.param({"tp": 2, "cp": 2}, "ring", marks=pytest.mark.slow),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)
@pytest.mark.parametrize("lever", LEVERS)
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.thinned(30)
def test_numbers_of_families_stay_what_they_are(
    name: str,
    lever: str,
    mesh: dict[str, int],
    attention: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(planner, "best_of_all", LEVERS[lever])
    torch.manual_seed(0)
    with default_dtype(torch.float64):
        _is_exact(name, lever, mesh, attention)


def _is_exact(name: str, lever: str, mesh: dict[str, int], attention: str) -> None:
    model, inputs = family(name), tokens_of(name)
    options: dict[str, Any] = {"memory": "min", "host_memory": HOST, "attention": attention}
    used = {action.kind for action in spcompile.explain(model, inputs, mesh, **options).memory.actions}
    wanted = {"recompute", "offload", "tile"} if lever == "every" else {lever}
    assert used == wanted
    tolerance = 1e-6 if name in FLOAT32_INSIDE else 1e-10
    report = spcompile.verify(model, inputs, mesh, tolerance=tolerance, **options)
    assert report.ok, report
