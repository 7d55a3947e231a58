"""Small models of the families of transformers: every model type of five kinds, with sizes by the names of settings.

B batch, S sequence. A kind is an auto class of transformers. What a family needs beside these sizes stands in `NEEDS`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

BATCH = 2
LENGTH = 48
VOCAB = 96
IMAGE = 32
PATCH = 4

_COUNTS = {
    ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"): 2,
    ("num_encoder_layers", "num_decoder_layers", "encoder_num_hidden_layers", "decoder_num_hidden_layers"): 2,
    ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads"): 4,
    ("encoder_num_attention_heads", "decoder_num_attention_heads"): 4,
    ("num_key_value_heads", "encoder_num_key_value_heads", "decoder_num_key_value_heads"): 2,
    ("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "emb_dim", "embedding_size", "decoder_hidden_size"): 32,
    ("intermediate_size", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim", "ffn_hidden_size"): 48,
    ("head_dim", "d_kv", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_channels"): 8,
    ("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"): 24,
    ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"): 4,
    ("num_experts_per_tok", "moe_k"): 2,
    ("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "max_window_layers"): 1,
    ("q_lora_rank",): 12,
    ("kv_lora_rank", "qk_head_dim"): 16,
    ("vocab_size", "decoder_vocab_size", "encoder_vocab_size"): VOCAB,
    ("max_position_embeddings", "n_positions", "max_source_positions", "max_target_positions", "max_length"): 128,
    ("image_size",): IMAGE,
    ("patch_size",): PATCH,
    ("use_cache",): False,
    ("vocab_size_per_layer_input",): 96,
    ("hidden_size_per_layer_input",): 8,
    ("pad_token_id",): 0,
    ("bos_token_id", "decoder_start_token_id"): 1,
    ("eos_token_id",): 2,
}
SIZES: dict[str, Any] = {name: value for names, value in _COUNTS.items() for name in names}
_SOUND = {"conv_dim": (16, 16), "conv_stride": (4, 2), "conv_kernel": (8, 4), "num_feat_extract_layers": 2}
_SCANS = {"mamba_d_state": 8, "mamba_chunk_size": 16}
NEEDS: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "codegen": {"rotary_dim": 4},
    "deepseek_v2": {"topk_method": "greedy"},
    "dots1": {"moe_intermediate_size": 24},
    "efficientnet": {"hidden_dim": 2560},
    "esmc": {"num_key_value_heads": 4},
    "falcon_h1": _SCANS | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 1, "state_size": 8},
    "neomme": {"head_dim": 16},
    "pegasus_x": {"block_size": 6, "num_global_tokens": 8},
    "siglip2": {"num_patches": 64},
    "xlnet": {"d_inner": 48, "n_layer": 2},
    "zaya": {"num_experts_per_tok": 1},
    **dict.fromkeys(
        ("wav2vec2", "hubert", "wavlm", "unispeech", "unispeech-sat", "data2vec-audio", "wav2vec2-conformer"), _SOUND
    ),
}
_EXPERTS = {
    "num_experts",
    "n_routed_experts",
    "num_local_experts",
    "moe_num_experts",
    "num_experts_per_tok",
    "top_k_experts",
}
_PARTS = (
    *("text_config", "vision_config", "audio_config", "encoder", "decoder", "encoder_config", "decoder_config"),
    *("global_config", "patcher_config"),
)
KINDS = {
    "decoder": "CAUSAL_LM",
    "encoder": "MASKED_LM",
    "encoder-decoder": "SEQ_TO_SEQ_CAUSAL_LM",
    "vision": "IMAGE_CLASSIFICATION",
    "audio": "CTC",
}


def model_types() -> Iterator[tuple[str, str]]:
    """(kind, model type) of everything that transformers has."""
    from transformers.models.auto import modeling_auto

    for kind, mapping in KINDS.items():
        for model_type in sorted(getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES")):
            yield kind, model_type


def build(kind: str, model_type: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model of this type in float64, and one batch for it.

    Models with experts are in float32, which is what torch's grouped product takes on a CPU.

    Raises:
        Exception: what its config or its constructor raises, where it needs more than these sizes.
    """
    import transformers
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    names = getattr(modeling_auto, f"MODEL_FOR_{KINDS[kind]}_MAPPING_NAMES")[model_type]
    model_class = getattr(transformers, names if isinstance(names, str) else names[0])
    config = small(CONFIG_MAPPING[model_type], NEEDS.get(model_type, {}))
    config._attn_implementation = "sdpa" if getattr(model_class, "_supports_sdpa", False) else "eager"
    dtype = torch.float32 if _EXPERTS & {*config.to_dict()} else torch.float64
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return model_class(config), batch_of(kind)
    finally:
        torch.set_default_dtype(before)


def small(config_class: type[Any], needs: dict[str, Any]) -> Any:
    """A config with small sizes, in its parts too."""
    known = config_class()
    values = known.to_dict()
    sizes = {name: value for name, value in SIZES.items() if _is_size(values.get(name, ""))}
    if "kv_lora_rank" in values and "num_attention_heads" in sizes:
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    for part in _PARTS:
        inner = getattr(known, part, None)
        if inner is not None and hasattr(inner, "to_dict"):
            sizes[part] = small(type(inner), needs).to_dict()
    config = config_class(**{**sizes, **needs})
    for name, value in {"pad_token_id": 0, "decoder_start_token_id": 1}.items():
        if getattr(config, name, None) is None:
            setattr(config, name, value)  # some models read them, and their configs do not have them
    return config


def _is_size(value: Any) -> bool:
    return value is None or isinstance(value, (int, float))


def batch_of(kind: str) -> dict[str, Any]:
    """Random inputs, with labels."""
    drawn = torch.Generator().manual_seed(0)
    if kind == "vision":
        pixels_BCHW = torch.randn(BATCH, 3, IMAGE, IMAGE, generator=drawn, dtype=torch.get_default_dtype())
        return {"pixel_values": pixels_BCHW, "labels": torch.zeros(BATCH, dtype=torch.long)}
    if kind == "audio":
        sound_BT = torch.randn(BATCH, 512, generator=drawn, dtype=torch.get_default_dtype())
        return {"input_values": sound_BT, "labels": torch.randint(3, 30, (BATCH, 5), generator=drawn)}
    ids_BS: Tensor = torch.randint(3, VOCAB, (BATCH, LENGTH), generator=drawn)
    given: dict[str, Any] = {"input_ids": ids_BS, "labels": ids_BS.clone()}
    if kind in ("decoder", "encoder-decoder"):
        given["use_cache"] = False
    return given
