"""Tiny models of all decoder families of transformers whose config has a plan for tensor parallelism."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

VOCAB = 90
# Settings by name; each config takes those that it has.
_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "attention_dropout": 0.0,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "expert_ffn_hidden_size": 24,
    "ffn_hidden_size": 48,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "max_window_layers": 1,
}
_LOW_RANK: dict[str, Any] = {
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "qk_head_dim": 16,
}


def families() -> dict[str, str]:
    """Every text decoder with a plan: model type -> name of the class with a language model head."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return {
        model_type: class_name
        for model_type, class_name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items())
        if getattr(CONFIG_MAPPING[model_type], "base_model_tp_plan", None)
    }


def build(model_type: str) -> nn.Module:
    """One model in training mode, on torch's default dtype.

    Raises:
        Exception: what its config or constructor raises where it needs more than these sizes.
    """
    import transformers as T

    T.logging.set_verbosity_error()
    config_class = T.models.auto.configuration_auto.CONFIG_MAPPING[model_type]
    known = config_class()
    sizes = {**_SIZES, **_EXPERTS, **_LOW_RANK}
    if hasattr(known, "kv_lora_rank"):
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    config = config_class(**{name: value for name, value in sizes.items() if hasattr(known, name)})
    model_class = getattr(T, families()[model_type])
    config._attn_implementation = "sdpa" if model_class._supports_sdpa else "eager"
    made: nn.Module = model_class(config).train()
    return made


def inputs(length: int = 8) -> dict[str, Any]:
    """Ids, and the same as labels."""
    import torch

    ids_BS: Tensor = torch.randint(3, VOCAB, (2, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids_BS, "labels": ids_BS, "use_cache": False}
