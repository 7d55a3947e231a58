"""recognize-mask on the masks that transformers builds: what is read, and the numerics of the whole graph."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from recognition import Rewritten, difference, run_passes
from torch import Tensor

from spcompile.capture.retrace import capture


def transformers_models() -> dict[str, tuple[str, str, dict[str, Any]]]:
    small = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 50,
    }
    grouped = {**small, "num_key_value_heads": 2}
    gpt2 = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0}
    no_dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    bert = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
    return {
        "llama": ("LlamaForCausalLM", "LlamaConfig", grouped),
        "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", grouped),
        "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**grouped, "head_dim": 8}),
        "mistral": ("MistralForCausalLM", "MistralConfig", {**grouped, "sliding_window": 8}),
        "gpt2": ("GPT2LMHeadModel", "GPT2Config", {**gpt2, **no_dropout}),
        "bert": ("BertForMaskedLM", "BertConfig", {**small, **bert}),
    }


TOKENS = 24
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no cache": {"use_cache": False},
    "padded": {"attention_mask": (torch.arange(TOKENS) < torch.tensor([[24], [15]])).long()},
    "left padded": {"attention_mask": (torch.arange(TOKENS) >= torch.tensor([[0], [5]])).long()},
    "packed": {
        "position_ids": torch.cat([torch.arange(10), torch.arange(14)])[None].expand(2, -1).contiguous(),
        "use_cache": False,
    },
}


def compile_model(model: torch.nn.Module, inputs: dict[str, Any]) -> Rewritten:
    """The model's graph after both passes; its output and all gradients equal the plain model's."""
    reference = copy.deepcopy(model)
    found: list[Rewritten] = []

    def backend(gm: torch.fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        captured = capture(gm, examples)
        found.append(run_passes(captured))
        return captured.forward

    torch._dynamo.reset()
    logits = [torch.compile(model, backend=backend)(**inputs).logits, reference(**inputs).logits]
    for value in logits:
        (value.double() * torch.linspace(-1, 1, value.numel()).view_as(value)).sum().backward()
    assert difference(*(x.detach() for x in logits)) < 1e-10
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        assert difference(a.grad, b.grad) < 1e-9 * max(1.0, float(b.grad.abs().max()) if b.grad is not None else 0)
    return found[0]


def transformers_calls() -> list[tuple[str, str, bool]]:
    """Every model with every call that it has."""
    cases = product(transformers_models(), CALLS, (False, True))
    return [case for case in cases if case[0] != "bert" or case[1] not in ("no cache", "packed")]


@pytest.mark.slow
@pytest.mark.thinned(30)
@pytest.mark.parametrize(("name", "call", "dynamic"), transformers_calls())
def test_transformers(name: str, call: str, dynamic: bool) -> None:
    transformers = pytest.importorskip("transformers")
    model_name, config_name, sizes = transformers_models()[name]
    model = getattr(transformers, model_name)(getattr(transformers, config_name)(**sizes)).double()
    inputs = {"input_ids": torch.randint(0, 50, (2, TOKENS)), **copy.deepcopy(CALLS[call])}
    if dynamic:
        for value in inputs.values():
            if isinstance(value, Tensor):
                torch._dynamo.mark_dynamic(value, 1)
    found = compile_model(model, inputs)
    words = [] if name == "bert" else ["causal"]
    words += ["window=8"] if name == "mistral" else []
    words += ["documents"] if call == "packed" else []
    words += ["key_padding"] if "padded" in call else []
    assert found.masks == [" ".join(words) or "full"]
    assert not found.remarks.rows
    grouped = name not in ("gpt2", "bert")
    assert [n.args[1].meta["val"].shape[1] for n in found.attentions] == [2 if grouped else 4]  # type: ignore[union-attr]
    assert not [op for op in found.ops() if "scaled_dot" in op or "tril" in op]


@pytest.mark.thinned(10)
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "bert"])
def test_transformers_written_out(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    model_name, config_name, sizes = transformers_models()[name]
    config = getattr(transformers, config_name)(**sizes, attn_implementation="eager")
    model = getattr(transformers, model_name)(config)
    found: list[Rewritten] = []
    compiled = torch.compile(model, backend=lambda gm, ex: found.append(run_passes(capture(gm, ex))) or gm.forward)
    compiled(input_ids=torch.randint(0, 50, (2, TOKENS)))
    expected = {"mistral": "causal window=8", "bert": "full"}.get(name, "causal")
    assert found[0].masks == [expected]
