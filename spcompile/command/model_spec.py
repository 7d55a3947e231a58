"""MODEL on the command line: which model to build, with which sizes, and what goes into it.

    models:NAME    one of the plain models that come with spcompile
    hf:TYPE        a small model of a transformers model type, as `hf:qwen3`
    hf:FOLDER      the model of a folder's config.json; weights are drawn at random, nothing is downloaded

B batch, S sequence.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spcompile.command.arguments import parse_dtype, require_model
from spcompile.diagnostics import IllegalModel
from spcompile.machine.host import host_memory
from spcompile.plain_text import one_line

Objective = Literal["next token", "masked token"]
MOST_LAYERS = 1 << 12
MOST_SIZE = 1 << 30
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


def build_model(
    spec: str, *, seq: int, device: str = "cpu", dtype: str = "float32", settings: Mapping[str, Any] | None = None
) -> BuiltModel:
    """Build the model that `spec` names, able to take `seq` tokens. Weights follow torch's global seed.

    Raises:
        IllegalModel: unknown model, unknown or impossible setting, too few positions.
    """
    wanted = getattr(torch, parse_dtype(dtype))
    require_model(spec)
    kind, _, name = spec.partition(":")
    make = _plain if kind == "models" else _transformers
    with torch.device(device), default_dtype(wanted):
        return make(name, seq, dict(settings or {}))


def built_with_inputs(
    spec: str, seq: int, batch: int, dtype: str, device: str, settings: Mapping[str, Any]
) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model and the arguments of a training step on random tokens, both from seed 0."""
    torch.manual_seed(0)
    built = build_model(spec, seq=seq, device=device, dtype=dtype, settings=settings)
    return built.model, built.example_inputs(batch, seq, device)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Torch's default dtype inside the block, so that tables a model keeps in float32 stay so."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def plain_config(name: str, settings: Mapping[str, Any]) -> Any:
    """The config of a plain model with these settings.

    Raises:
        IllegalModel: unknown model, or a setting that is unknown or impossible.
    """
    registry = _plain_models()
    if name not in registry:
        raise IllegalModel(f"models:{one_line(name)}", legal=", ".join(f"models:{known}" for known in registry))
    config = registry[name].config()
    legal = [f.name for f in fields(config)]
    for key, value in settings.items():
        if key not in legal:
            raise IllegalModel(f"setting {key!r} of models:{one_line(name)}", legal=", ".join(legal))
        wanted = _what_it_must_be(key, value, getattr(config, key))
        if wanted is not None:
            raise IllegalModel(f"setting {key}={value!r} of models:{one_line(name)}", legal=wanted)
    config = replace(config, **settings)
    _require_heads(name, config)
    return config


def _what_it_must_be(key: str, value: Any, usual: Any) -> str | None:
    """None for a setting that is possible."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(usual, int):
        most = MOST_LAYERS if key == "layers" else MOST_SIZE
        is_count = isinstance(value, int) and is_number and 1 <= value <= most
        return None if is_count else f"a whole number, 1 to {most}"
    if key == "dropout":
        return None if is_number and 0 <= value < 1 else "a number from 0, below 1"
    return None if is_number and 0 < value < float("inf") else "a positive finite number"


def _require_heads(name: str, config: Any) -> None:
    if config.dim % config.heads:
        raise IllegalModel(f"dim={config.dim} of models:{one_line(name)}", legal=f"a multiple of heads={config.heads}")
    kv_heads = getattr(config, "kv_heads", config.heads)
    if config.heads % kv_heads:
        raise IllegalModel(
            f"heads={config.heads} of models:{one_line(name)}", legal=f"a multiple of kv_heads={kv_heads}"
        )
    if hasattr(config, "theta") and config.dim // config.heads % 2:
        raise IllegalModel(
            f"heads of {config.dim // config.heads} in models:{one_line(name)}", legal="an even width, dim / heads"
        )


def _plain_models() -> Mapping[str, Any]:
    # Found by name, as a user's own module would be: the engine depends on no model.
    models: Mapping[str, Any] = importlib.import_module("spcompile.models").MODELS
    return models


def _plain(name: str, seq: int, settings: dict[str, Any]) -> BuiltModel:
    config = plain_config(name, settings)
    context = getattr(config, "context", seq)
    if context < seq:
        raise IllegalModel(
            f"{seq} tokens for models:{one_line(name)}", legal=f"at most {context}, or --set context={seq}"
        )
    entry = _plain_models()[name]
    build = functools.partial(entry.build, config)
    _require_memory(f"models:{one_line(name)}", build)
    return BuiltModel(build(), "ids_BS", "labels_BS", config.vocab, entry.objective)


def _transformers(name: str, seq: int, settings: dict[str, Any]) -> BuiltModel:
    try:
        import transformers
    except ImportError:
        raise IllegalModel(f"hf:{one_line(name)} needs transformers", legal="pip install 'spcompile[hf]'") from None
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    from spcompile.command import hf_config

    is_folder = Path(name).is_dir()
    config = hf_config.folder_config(name, settings) if is_folder else hf_config.small_config(name, seq, settings)
    config.use_cache = False
    kind: Any
    objective: Objective
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING:
        kind, objective = transformers.AutoModelForMaskedLM, "masked token"
    elif type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        kind, objective = transformers.AutoModelForCausalLM, "next token"
    else:
        raise IllegalModel(f"hf:{one_line(name)}", legal="a model type that transformers has a causal or masked LM for")
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and positions < seq:
        legal = f"at most {positions}, or --set max_position_embeddings={seq}"
        raise IllegalModel(f"{seq} tokens for hf:{one_line(name)}", legal=legal)
    source = repr(str(Path(name) / "config.json")) if is_folder else f"hf:{one_line(name)}"

    def build() -> nn.Module:
        try:
            made: nn.Module = kind.from_config(config, dtype=torch.get_default_dtype(), trust_remote_code=False)
            return made
        except Exception as error:
            raise hf_config.explained(error, source, config.to_dict()) from error

    _require_memory(source, build)
    model = build()
    _require_positions(f"hf:{one_line(name)}", model, seq)
    model.train()
    return BuiltModel(model, "input_ids", "labels", config.get_text_config().vocab_size, objective)


def _require_positions(name: str, model: nn.Module, seq: int) -> None:
    """Tables with a row for padding begin behind it, as RoBERTa's."""
    for path, table in model.named_modules():
        if path.endswith("position_embeddings") and isinstance(table, nn.Embedding) and table.padding_idx is not None:
            first = table.padding_idx + 1
            if table.num_embeddings - first < seq:
                legal = f"at most {table.num_embeddings - first}, or --set max_position_embeddings={seq + first}"
                raise IllegalModel(f"{seq} tokens for {name}", legal=legal)


def _require_memory(name: str, build: Callable[[], nn.Module]) -> None:
    """Raises IllegalModel for weights that this machine cannot hold, before they are made."""
    device = torch.empty(()).device
    there = host_memory()
    if device.type != "cpu" or there is None:
        return
    with torch.device("meta"):
        tensors = [*(model := build()).parameters(), *model.buffers()]
    needed = sum(x.numel() * x.element_size() for x in tensors)
    if needed > there:
        raise IllegalModel(
            f"{name}: {needed:,} bytes of weights", legal=f"at most this machine's memory, {there:,} bytes"
        )
