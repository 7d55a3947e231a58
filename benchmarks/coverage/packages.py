"""Small models of other packages, which `pip install` brings: those that are not installed are left out.

B batch, S sequence, D features.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

KIND = "package"
BATCH = 2
LENGTH = 48
DIM = 32
VOCAB = 96
Build = Callable[[], tuple[nn.Module, Any]]
PLAIN = {"dim": DIM, "depth": 2, "heads": 4}


def models() -> Iterator[tuple[str, str]]:
    """(kind, package/model) of what is installed."""
    for name in MODELS:
        if importlib.util.find_spec(name.partition("/")[0]) is not None:
            yield KIND, name


def build(name: str) -> tuple[nn.Module, Any]:
    """A model in float64, and its inputs.

    Raises:
        Exception: what its constructor raises.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return MODELS[name]()
    finally:
        torch.set_default_dtype(before)


def _class(path: str) -> Any:
    """`module.Class`."""
    module, _, name = path.rpartition(".")
    has_vision = importlib.util.find_spec("torchvision") is not None
    unused = _VISION if module.startswith("vit_pytorch") and not has_vision else ()
    sys.modules.update({stand_in: _Unused(stand_in) for stand_in in unused})
    try:
        return getattr(importlib.import_module(module), name)
    finally:
        for stand_in in unused:
            del sys.modules[stand_in]


_VISION = ("torchvision", "torchvision.transforms", "torchvision.ops", "torchvision.models")


class _Unused(types.ModuleType):
    """Stands for torchvision, which packages import beside their models for the augmentation of images."""

    __path__: list[str] = []  # noqa: RUF012 - a module's attribute

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def _ids() -> Tensor:
    return torch.randint(3, VOCAB, (BATCH, LENGTH))


def _language(path: str, **settings: Any) -> tuple[nn.Module, Any]:
    return _class(path)(**settings), [_ids()]


def _features(path: str, **settings: Any) -> tuple[nn.Module, Any]:
    return _class(path)(**settings), [torch.randn(BATCH, LENGTH, DIM)]


def _image(path: str, size: int = 32, **settings: Any) -> tuple[nn.Module, Any]:
    return _class(path)(**settings), [torch.randn(BATCH, 3, size, size)]


def _vit(module: str, name: str = "ViT", **settings: Any) -> Build:
    usual = {"image_size": 32, "patch_size": 4, "num_classes": 10, "mlp_dim": 48, **PLAIN}
    return functools.partial(_image, f"vit_pytorch.{module}.{name}", **{**usual, **settings})


def _x(attention: dict[str, Any], kind: str = "Decoder") -> Build:
    def made() -> tuple[nn.Module, Any]:
        layers = _class(f"x_transformers.{kind}")(dim=DIM, depth=2, heads=4, attn_dim_head=8, **attention)
        wrapper = _class("x_transformers.TransformerWrapper")
        return wrapper(num_tokens=VOCAB, max_seq_len=LENGTH, attn_layers=layers), [_ids()]

    return made


def _encoder_decoder() -> tuple[nn.Module, Any]:
    settings = {"enc_num_tokens": VOCAB, "enc_depth": 2, "enc_heads": 4, "enc_max_seq_len": LENGTH}
    settings |= {"dec_num_tokens": VOCAB, "dec_depth": 2, "dec_heads": 4, "dec_max_seq_len": LENGTH}
    return _class("x_transformers.XTransformer")(dim=DIM, **settings), [_ids(), _ids()]


def _joint_image(name: str, **settings: Any) -> tuple[nn.Module, Any]:
    """Text and image in one attention."""
    model = _class(f"diffusers.{name}")(**settings)
    given = {
        "encoder_hidden_states": torch.randn(BATCH, 16, DIM),
        "timestep": torch.tensor([3, 7]),
        "return_dict": False,
    }
    if name == "SD3Transformer2DModel":
        more = {"hidden_states": torch.randn(BATCH, 4, 16, 16), "pooled_projections": torch.randn(BATCH, DIM)}
    elif name == "FluxTransformer2DModel":
        places = {"img_ids": torch.zeros(64, 3), "txt_ids": torch.zeros(16, 3)}
        more = {"hidden_states": torch.randn(BATCH, 64, 8), "pooled_projections": torch.randn(BATCH, DIM), **places}
    elif name == "AuraFlowTransformer2DModel":
        more = {"hidden_states": torch.randn(BATCH, 4, 16, 16)}
    elif name == "WanTransformer3DModel":
        more = {"hidden_states": torch.randn(BATCH, 4, 2, 8, 8)}
    else:
        more = {"hidden_states": torch.randn(BATCH, 2, 4, 8, 8)}
    return model, given | more


def _class_image(name: str, **settings: Any) -> tuple[nn.Module, Any]:
    model = _class(f"diffusers.{name}")(num_attention_heads=4, attention_head_dim=8, num_layers=2, **settings)
    given = {"hidden_states": torch.randn(BATCH, 4, 16, 16), "timestep": torch.tensor([3, 7]), "return_dict": False}
    if name == "DiTTransformer2DModel":
        return model, given | {"class_labels": torch.tensor([1, 2])}
    return model, given | {"encoder_hidden_states": torch.randn(BATCH, 16, DIM), "added_cond_kwargs": {}}


def _torch_encoder(**settings: Any) -> tuple[nn.Module, Any]:
    layer = nn.TransformerEncoderLayer(DIM, 4, 48, batch_first=True, **settings)
    return _Around(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)), [torch.randn(BATCH, LENGTH, DIM)]


def _torch_both() -> tuple[nn.Module, Any]:
    model = _Around(nn.Transformer(DIM, 4, 2, 2, 48, batch_first=True))
    return model, [torch.randn(BATCH, LENGTH, DIM), torch.randn(BATCH, 32, DIM)]


class _Around(nn.Module):
    """Dynamo compiles no frame of torch's own files: a module of one's own around it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Tensor) -> Any:
        return self.inner(*args)


def _alone(path: str, **settings: Any) -> Build:
    return functools.partial(_features, path, **settings)


def _text(path: str, **settings: Any) -> Build:
    return functools.partial(_language, path, **settings)


_JOINT = {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4, "joint_attention_dim": DIM}
_SD3 = {"sample_size": 16, "in_channels": 4, "out_channels": 4, "caption_projection_dim": DIM}
_SD3 |= {"pooled_projection_dim": DIM, "pos_embed_max_size": 16}
_FLUX = {"in_channels": 8, "num_single_layers": 2, "pooled_projection_dim": DIM, "axes_dims_rope": (2, 2, 4)}
_AURA = {"sample_size": 16, "num_mmdit_layers": 1, "num_single_dit_layers": 1, "caption_projection_dim": DIM}
_AURA |= {"attention_head_dim": 8, "num_attention_heads": 4, "joint_attention_dim": DIM, "pos_embed_max_size": 64}
_COG = {"num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2}
_COG |= {"time_embed_dim": 16, "text_embed_dim": DIM, "sample_width": 8, "sample_height": 8, "sample_frames": 5}
_COG |= {"max_text_seq_length": 16}
_WAN = {"num_attention_heads": 4, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": DIM}
_WAN |= {"freq_dim": 16, "ffn_dim": 48, "num_layers": 2}

MODELS: dict[str, Build] = {
    "torch/TransformerEncoder": _torch_encoder,
    "torch/TransformerEncoder, norm first": functools.partial(_torch_encoder, norm_first=True, activation="gelu"),
    "torch/Transformer": _torch_both,
    "x_transformers/decoder": _x({}),
    "x_transformers/encoder": _x({}, "Encoder"),
    "x_transformers/rotary": _x({"rotary_pos_emb": True}),
    "x_transformers/ALiBi": _x({"alibi_pos_bias": True}),
    "x_transformers/T5 bias": _x({"rel_pos_bias": True}),
    "x_transformers/one key head": _x({"attn_one_kv_head": True}),
    "x_transformers/gated": _x({"ff_glu": True, "use_rmsnorm": True}),
    "x_transformers/talking heads": _x({"attn_pre_talking_heads": True}),
    "x_transformers/memory tokens in attention": _x({"attn_num_mem_kv": 4}),
    "x_transformers/shifted tokens": _x({"shift_tokens": 1}),
    "x_transformers/macaron": _x({"macaron": True}),
    "x_transformers/sandwich": _x({"sandwich_norm": True}),
    "x_transformers/query key norm": _x({"attn_qk_norm": True}),
    "x_transformers/XTransformer": _encoder_decoder,
    "vit_pytorch/ViT": _vit("vit"),
    "vit_pytorch/ViT, mean": _vit("vit", pool="mean"),
    "vit_pytorch/SimpleViT": _vit("simple_vit", "SimpleViT"),
    "vit_pytorch/registers": _vit("simple_vit_with_register_tokens", "SimpleViT"),
    "vit_pytorch/QK norm": _vit("simple_vit_with_qk_norm", "SimpleViT"),
    "vit_pytorch/value residual": _vit("simple_vit_with_value_residual", "SimpleViT"),
    "vit_pytorch/hyper connections": _vit("simple_vit_with_hyper_connections", "SimpleViT", num_residual_streams=2),
    "vit_pytorch/FFT": _vit("simple_vit_with_fft", "SimpleViT", freq_patch_size=4),
    "vit_pytorch/DeepViT": _vit("deepvit", "DeepViT"),
    "vit_pytorch/CaiT": _vit("cait", "CaiT", cls_depth=1),
    "vit_pytorch/parallel": _vit("parallel_vit", num_parallel_branches=2),
    "vit_pytorch/small dataset": _vit("vit_for_small_dataset"),
    "vit_pytorch/patch merger": _vit("vit_with_patch_merger", patch_merge_layer=1, patch_merge_num_tokens=8),
    "vit_pytorch/RvT": _vit("rvt", "RvT"),
    "vit_pytorch/learnable memory": _vit("learnable_memory_vit"),
    "vit_pytorch/normalized": _vit("normalized_vit", "nViT"),
    "vit_pytorch/efficient": lambda: _image(
        "vit_pytorch.efficient.ViT",
        image_size=32,
        patch_size=4,
        num_classes=10,
        dim=DIM,
        transformer=_class("x_transformers.Encoder")(dim=DIM, depth=2, heads=4),
    ),
    "vit_pytorch/1d": lambda: (
        _class("vit_pytorch.vit_1d.ViT")(seq_len=96, patch_size=4, num_classes=10, mlp_dim=48, **PLAIN),
        [torch.randn(BATCH, 3, 96)],
    ),
    "vit_pytorch/XCiT": _vit("xcit", "XCiT", cls_depth=1),
    "diffusers/SD3": functools.partial(_joint_image, "SD3Transformer2DModel", **_SD3, **_JOINT),
    "diffusers/Flux": functools.partial(_joint_image, "FluxTransformer2DModel", **_FLUX, **_JOINT),
    "diffusers/AuraFlow": functools.partial(_joint_image, "AuraFlowTransformer2DModel", **_AURA),
    "diffusers/CogVideoX": functools.partial(_joint_image, "CogVideoXTransformer3DModel", **_COG),
    "diffusers/Wan": functools.partial(_joint_image, "WanTransformer3DModel", **_WAN),
    "diffusers/DiT": functools.partial(_class_image, "DiTTransformer2DModel", sample_size=16),
    "diffusers/PixArt": functools.partial(
        _class_image, "PixArtTransformer2DModel", sample_size=16, cross_attention_dim=DIM, caption_channels=DIM
    ),
    "local_attention/LocalTransformer": _text(
        "local_attention.LocalTransformer", num_tokens=VOCAB, max_seq_len=LENGTH, local_attn_window_size=12, **PLAIN
    ),
    "linformer/Linformer": _alone("linformer.Linformer", seq_len=LENGTH, k=8, **PLAIN),
    "nystrom_attention/Nystromformer": _alone("nystrom_attention.Nystromformer", dim_head=8, num_landmarks=8, **PLAIN),
    "performer_pytorch/Performer": _alone("performer_pytorch.Performer", dim_head=8, **PLAIN),
    "perceiver_pytorch/PerceiverLM": _text(
        "perceiver_pytorch.PerceiverLM",
        num_tokens=VOCAB,
        dim=DIM,
        depth=2,
        max_seq_len=LENGTH,
        num_latents=8,
        latent_dim=DIM,
        cross_heads=1,
        latent_heads=4,
        cross_dim_head=8,
        latent_dim_head=8,
    ),
    "palm_pytorch/PaLM": _text("palm_pytorch.PaLM", num_tokens=VOCAB, dim_head=8, **PLAIN),
    "colt5_attention/ConditionalRoutedFeedForward": _alone(
        "colt5_attention.ConditionalRoutedFeedForward", dim=DIM, light_ff_mult=0.5, heavy_ff_mult=2, num_heavy_tokens=12
    ),
    "soft_moe_pytorch/SoftMoE": _alone("soft_moe_pytorch.SoftMoE", dim=DIM, seq_len=LENGTH, num_experts=4),
    "g_mlp_pytorch/gMLP": _text("g_mlp_pytorch.gMLP", num_tokens=VOCAB, dim=DIM, depth=2, seq_len=LENGTH),
    "conformer/Conformer": _alone("conformer.Conformer", dim_head=8, **PLAIN),
    "mmdit/MMDiT": lambda: (
        _class("mmdit.MMDiT")(depth=2, dim_text=DIM, dim_image=DIM, dim_cond=DIM, dim_head=8, heads=4),
        {
            "time_cond": torch.randn(BATCH, DIM),
            "text_tokens": torch.randn(BATCH, 16, DIM),
            "image_tokens": torch.randn(BATCH, 64, DIM),
        },
    ),
}
