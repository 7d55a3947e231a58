"""Plain single-GPU transformers that know nothing of spcompile, and the names by which the command line finds them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from . import bert, gpt, llama


@dataclass(frozen=True)
class Entry:
    """A named model: what makes its config, what builds it, and what its labels are."""

    config: Callable[[], Any]
    build: Callable[[Any], nn.Module]
    objective: Literal["next token", "masked token"]


MODELS: dict[str, Entry] = {
    "gpt": Entry(gpt.GPTConfig, gpt.build, "next token"),
    "gpt-tiny": Entry(gpt.GPTConfig.tiny, gpt.build, "next token"),
    "gpt2": Entry(gpt.GPTConfig.gpt2, gpt.build, "next token"),
    "llama": Entry(llama.LlamaConfig, llama.build, "next token"),
    "llama-tiny": Entry(llama.LlamaConfig.tiny, llama.build, "next token"),
    "llama3-8b": Entry(llama.LlamaConfig.llama3_8b, llama.build, "next token"),
    "bert": Entry(bert.BertConfig, bert.build, "masked token"),
    "bert-tiny": Entry(bert.BertConfig.tiny, bert.build, "masked token"),
    "bert-base": Entry(bert.BertConfig.bert_base, bert.build, "masked token"),
}


def build(name: str, **overrides: Any) -> nn.Module:
    """The model called `name`, with fields of its config replaced by `overrides`.

    Raises:
        KeyError: no model has this name.
        TypeError: an override names no field of the config.
    """
    entry = MODELS[name]
    return entry.build(replace(entry.config(), **overrides))
