"""Small models of Hugging Face transformers and the ways in which people call them.

Models are unchanged; their dtype is torch's default. Which of a float64 model's values are float32 inside, so that its
sums agree to 1e-6 only, was read from transformers 5.23:
    llama, qwen2, qwen3, mistral   RMSNorm and rotary angles (row by row: equal on every shard); the loss
    gpt2                           the loss, for which the logits are cast; all else is float64
    bert                           nothing: its loss is computed from the logits as they are
The weight gradients of RMSNorm are float64 sums of values that were float32 row by row. So logits, caches and the
gradients of a loss outside the model are exact to 1e-10 everywhere.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB = 90
IGNORED = -100
LOSS_IN_FLOAT32 = ("llama", "qwen2", "qwen3", "mistral", "gpt2")
MODELS = (*LOSS_IN_FLOAT32, "bert")
INPUTS = ("plain", "cache", "right padding", "left padding", "packed", "no labels")


def build(name: str, *, layers: int = 1, checkpointing: bool = False) -> nn.Module:
    """The model called `name`, without dropout; its weights are large enough for attention to matter."""
    import transformers as T

    T.logging.set_verbosity_error()
    common = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "vocab_size": VOCAB,
        "initializer_range": 0.2,
    }
    decoder = {**common, "num_key_value_heads": 2}
    bert = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 1024}
    gpt2 = {"n_embd": 32, "n_layer": layers, "n_head": 4, "vocab_size": VOCAB, "initializer_range": 0.2}
    gpt2_off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    made = {
        "llama": lambda: T.LlamaForCausalLM(T.LlamaConfig(**decoder)),
        "qwen2": lambda: T.Qwen2ForCausalLM(T.Qwen2Config(**decoder)),
        "qwen3": lambda: T.Qwen3ForCausalLM(T.Qwen3Config(**decoder, head_dim=16)),
        "mistral": lambda: T.MistralForCausalLM(T.MistralConfig(**decoder, sliding_window=8)),
        "gpt2": lambda: T.GPT2LMHeadModel(T.GPT2Config(**gpt2, **gpt2_off)),
        "bert": lambda: T.BertForMaskedLM(T.BertConfig(**common, **bert)),
    }[name]()
    model: nn.Module = made.train()
    if checkpointing:
        made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def inputs(number: int, *, model: str, kind: str, length: int = 32, batch: int = 2) -> dict[str, Any]:
    """One batch of random tokens, called in one of the ways of INPUTS."""
    generator = torch.Generator().manual_seed(number)
    ids_BS = torch.randint(1, VOCAB, (batch, length), generator=generator)
    labels_BS = ids_BS.clone()
    labels_BS[0, : length // 3] = IGNORED
    made: dict[str, Any] = {"input_ids": ids_BS}
    if kind != "cache" and model != "bert":
        made["use_cache"] = False
    if kind.endswith("padding"):
        keep_BS = torch.ones_like(ids_BS)
        if kind == "right padding":
            keep_BS[0, length - 5 :] = 0
        else:
            keep_BS[-1, :3] = 0
        made["attention_mask"] = keep_BS
        labels_BS = labels_BS.masked_fill(keep_BS == 0, IGNORED)
    if kind == "packed":
        made["position_ids"] = packed_positions(batch, length)
    if kind != "no labels":
        made["labels"] = labels_BS
    return made


def packed_positions(batch: int, length: int) -> Tensor:
    """Positions of documents that lie end to end; each row is cut elsewhere."""
    rows = []
    for row in range(batch):
        cut = length // 3 + row
        rows.append(torch.cat([torch.arange(cut), torch.arange(length - cut)]))
    return torch.stack(rows)


def outer_loss(out: Any, batch: dict[str, Any]) -> Tensor:
    """The next-token loss on the full logits, outside the model."""
    logits_BSV = out.logits[:, :-1]
    return F.cross_entropy(logits_BSV.flatten(0, 1), batch["input_ids"][:, 1:].flatten())
