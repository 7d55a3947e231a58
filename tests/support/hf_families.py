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
# Their model types. To ask transformers for them imports the configs of all its models, in every process of pytest.
_NAMES = """
    afmoe apertus arcee aria_text axk1 axk2 bailing_hybrid beam cohere cohere2 cohere2_moe cohere_compass_text cwm
    deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 doge dots1 dots3_note_text ernie4_5 ernie4_5_moe exaone4
    exaone_moe flex_olmo flint gemma gemma2 gemma3_text gemma3n_text gemma4_text gemma4_unified_text glm glm4
    glm4_moe glm4_moe_lite glm_moe_dsa gpt_neox granite granite_swa granitemoe granitemoe_swa granitemoehybrid
    granitemoeshared helium hrm_text hunyuan_v1_moe hy_v3 hy_v4 hyperclovax inkling2_text inkling_text internlm3
    iquestcoder jais2 jamba kimi_linear kolibri1 laguna lfm2_moe llama llama4 llama4_text longcat_flash mellum
    mimo_v2_flash minicpm3 minimax minimax_m2 minimax_m3_vl_text ministral ministral3 mistral mixtral nanochat
    nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe phi phi3 phi4_multimodal phimoe qwen2 qwen2_moe qwen3
    qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next qwen4_exp_text seed_oss smollm3 solar_open starcoder2
    vaultgemma youtu
"""
FAMILIES = tuple(_NAMES.split())


def found_families() -> list[str]:
    """Every text decoder that has a plan in this version of transformers."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return [
        model_type
        for model_type in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        if getattr(CONFIG_MAPPING[model_type], "base_model_tp_plan", None)
    ]


def build(model_type: str) -> nn.Module:
    """One model in training mode, on torch's default dtype.

    Raises:
        Exception: what its config or constructor raises where it needs more than these sizes.
    """
    import transformers as T
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    T.logging.set_verbosity_error()
    config_class = T.models.auto.configuration_auto.CONFIG_MAPPING[model_type]
    known = config_class()
    sizes = {**_SIZES, **_EXPERTS, **_LOW_RANK}
    if hasattr(known, "kv_lora_rank"):
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    config = config_class(**{name: value for name, value in sizes.items() if hasattr(known, name)})
    model_class = getattr(T, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
    config._attn_implementation = "sdpa" if model_class._supports_sdpa else "eager"
    made: nn.Module = model_class(config).train()
    return made


def inputs(length: int = 8) -> dict[str, Any]:
    """Ids, and the same as labels."""
    import torch

    ids_BS: Tensor = torch.randint(3, VOCAB, (2, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids_BS, "labels": ids_BS, "use_cache": False}
