"""MODEL on the command line: which model to build, with which sizes, and what goes into it.

    models:NAME    one of the plain models that come with spcompile
    hf:TYPE        a small model of a transformers model type, as `hf:qwen3`
    hf:FOLDER      the model of a folder's config.json; weights are drawn at random, nothing is downloaded

B batch, S sequence.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spcompile.diagnostics import IllegalModel

Objective = Literal["next token", "masked token"]
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
MASKED_SHARE = 0.15  # of the tokens, for masked-token models (https://arxiv.org/abs/1810.04805)


@dataclass(frozen=True)
class BuiltModel:
    """A model and how it is called: argument names, size of its vocabulary, meaning of its labels."""

    model: nn.Module
    ids: str
    labels: str
    vocab: int
    objective: Objective

    def inputs(self, ids_BS: Tensor) -> dict[str, Tensor]:
        """The arguments of a training step on these tokens. Masked tokens are drawn by torch's global generator."""
        if self.objective == "next token":
            return {self.ids: ids_BS, self.labels: ids_BS}
        masked_BS = torch.rand(ids_BS.shape, device=ids_BS.device) < MASKED_SHARE
        return {self.ids: ids_BS.masked_fill(masked_BS, 0), self.labels: ids_BS.masked_fill(~masked_BS, -100)}

    def example_inputs(self, batch: int, seq: int, device: str) -> dict[str, Tensor]:
        """Arguments with random tokens (on `meta`: without values) of shape [batch, seq]."""
        return self.inputs(torch.randint(self.vocab, (batch, seq), device=device))


def build(
    spec: str, *, seq: int, device: str = "cpu", dtype: str = "float32", settings: Mapping[str, Any] | None = None
) -> BuiltModel:
    """Build the model that `spec` names, able to take `seq` tokens. Weights follow torch's global seed.

    Raises:
        IllegalModel: unknown model, unknown or impossible setting, too few positions.
    """
    kind, _, name = spec.partition(":")
    if dtype not in DTYPES:
        raise IllegalModel(f"dtype {dtype!r}", legal=", ".join(DTYPES))
    if kind not in ("models", "hf") or not name:
        raise IllegalModel(repr(spec), legal="models:NAME, hf:TYPE or hf:FOLDER with a config.json")
    make = _plain if kind == "models" else _transformers
    with torch.device(device), default_dtype(DTYPES[dtype]):
        return make(name, seq, dict(settings or {}))


def parse_settings(lines: Sequence[str]) -> dict[str, Any]:
    """`["layers=2", "hidden_act=relu"]` as a dict: Python literals where they are ones, else text.

    Raises:
        IllegalModel: a line without `=`.
    """
    settings: dict[str, Any] = {}
    for line in lines:
        key, equals, value = line.partition("=")
        if not equals or not key:
            raise IllegalModel(f"setting {line!r}", legal="key=value")
        try:
            settings[key] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            settings[key] = value
    return settings


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Torch's default dtype inside the block, so that tables a model keeps in float32 stay so."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _plain(name: str, seq: int, settings: dict[str, Any]) -> BuiltModel:
    # Found by name, as a user's own module would be: the engine depends on no model.
    registry = importlib.import_module("spcompile.models").MODELS
    if name not in registry:
        raise IllegalModel(f"models:{name}", legal=", ".join(f"models:{known}" for known in registry))
    entry = registry[name]
    config = entry.config()
    legal = [f.name for f in fields(config)]
    unknown = [key for key in settings if key not in legal]
    if unknown:
        raise IllegalModel(f"setting {unknown[0]!r} of models:{name}", legal=", ".join(legal))
    config = replace(config, **settings)
    context = getattr(config, "context", seq)
    if context < seq:
        raise IllegalModel(f"{seq} tokens for models:{name}", legal=f"at most {context}, or --set context={seq}")
    return BuiltModel(entry.build(config), "ids_BS", "labels_BS", config.vocab, entry.objective)


def _transformers(name: str, seq: int, settings: dict[str, Any]) -> BuiltModel:
    try:
        import transformers
    except ImportError:
        raise IllegalModel(f"hf:{name} needs transformers", legal="pip install 'spcompile[hf]'") from None
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    config = _folder_config(name, settings) if Path(name).is_dir() else _small_config(name, seq, settings)
    config.use_cache = False
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING:
        model = transformers.AutoModelForMaskedLM.from_config(config, dtype=torch.get_default_dtype())
        objective: Objective = "masked token"
    elif type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.get_default_dtype())
        objective = "next token"
    else:
        raise IllegalModel(f"hf:{name}", legal="a model type that transformers has a causal or masked LM for")
    model.train()
    return BuiltModel(model, "input_ids", "labels", config.get_text_config().vocab_size, objective)


def _folder_config(folder: str, settings: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    if not (Path(folder) / "config.json").is_file():
        raise IllegalModel(f"hf:{folder}", legal="a folder that has a config.json")
    return AutoConfig.from_pretrained(folder, local_files_only=True, **settings)


def _small_config(model_type: str, seq: int, settings: dict[str, Any]) -> Any:
    """The config of a type, small where it has the usual names; `settings` win."""
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        raise IllegalModel(f"hf:{model_type}", legal="a transformers model type, or a folder with a config.json")
    config_class: Any = CONFIG_MAPPING[model_type]
    usual = config_class()
    small = {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "vocab_size": 256,
        "max_position_embeddings": max(seq, getattr(usual, "max_position_embeddings", None) or 0),
    }
    unknown = [key for key in settings if not hasattr(usual, key)]
    if unknown:
        raise IllegalModel(f"setting {unknown[0]!r} of hf:{model_type}", legal="a field of its config.json")
    wanted = {key: value for key, value in small.items() if getattr(usual, key, None) is not None} | settings
    special = {key: getattr(usual, key, None) for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
    outside = {key: 0 for key, token in special.items() if isinstance(token, int) and token >= wanted["vocab_size"]}
    renamed = {config_class.attribute_map.get(key, key): value for key, value in {**outside, **wanted}.items()}
    return config_class(**renamed)
