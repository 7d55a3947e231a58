"""What we split, found in the graph, against the hand-written `base_model_tp_plan` of every family that has one.

Compared is each weight with two or more dims. Theirs may gather behind or cut in front of a layer on its own
(`colwise_gather_output`, `rowwise_split_input`): the dim that is split is the same, and so is what is compared.
"""

from __future__ import annotations

import re
from typing import Any

import hf_families
import mixing_models
import pytest
import torch
from tp_decisions import decide

import spcompile

THEIRS = {
    "colwise": "colwise",
    "colwise_gather_output": "colwise",
    "packed_colwise": "colwise",
    "rowwise": "rowwise",
    "rowwise_split_input": "rowwise",
    "packed_rowwise": "rowwise",
    "embedding_rowwise": "vocabulary",
}  # all else is whole: mla_kv_a_proj, replicated_with_grad_allreduce, and what has no entry

# (end of the parameter's name, theirs, ours, why). The first row that fits explains a difference.
DIFFERENCES = [
    (r"(embed_tokens|embed_in)", "whole", "vocabulary", "we split the vocabulary too"),
    (r"lm_head", "whole", "colwise", "we split the vocabulary too"),
    (r"(embed_tokens|lm_head)", "whole", r"colwise\+vocabulary", "we split the vocabulary too; tied"),
    (r"experts\.gate_up_proj", "rowwise", "colwise", "the same dim: stored as [in, out]"),
    (r"experts\.down_proj", "colwise", "rowwise", "the same dim: stored as [in, out]"),
    (r"(attn|mixer)\.([qkvgr]|[qo]_b|kv_b|gate|o_a|g_a)_proj", "whole", "colwise", "we split this attention too"),
    (r"(attn|mixer)\.(o|o_b|g_b)_proj", "whole", "rowwise", "we split this attention too"),
    (r"indexer\.(wk|wq_b)", "whole", "colwise", "we split the indexer's heads too"),
    (r"forget_gate\.(f|f_a)_proj", "whole", "colwise", "we split low-rank gates too"),
    (r"forget_gate\.f_b_proj", "whole", "rowwise", "we split low-rank gates too"),
    (r"attn\.b_proj", "whole", "colwise", "we split this attention too"),
    (
        r"(mlp|mixer|shared_\w+)\.(gate|up|gate_up)_proj",
        "whole",
        "colwise",
        "this MLP too",
    ),
    (r"(mlp|mixer|shared_\w+)\.down_proj", "whole", "rowwise", "this MLP too"),
    (r"layernorm\.mlp\.fc1", "whole", "colwise", "this MLP too"),
    (r"layernorm\.mlp\.fc2", "whole", "rowwise", "this MLP too"),
    (r"mixer\.in_proj", "whole", r"colwise(\+whole)?", "the heads of a scan are split, or what feeds none of it"),
    (r"mixer\.out_proj", "whole", "rowwise", "the heads of a scan are split"),
    (r"linear_attn\.in_proj_qkv", "colwise", r"colwise\+whole", "the part of it that feeds no scan"),
    (r"(mixer|linear_attn|_sconv)\.conv1d", "whole", r"part(\+whole)?", "channels of a convolution are computed apart"),
    (r"linear_attn\.(in_proj_\w+|out_proj)", "colwise", "whole", "the heads of this scan are not split"),
    (r"linear_attn\.out_proj", "colwise", "rowwise", "the heads of a scan are split too"),
    (r"hyper_connection\w*\.input_mix_weight_down", "rowwise", "colwise", "we split the space between down and up"),
    (r"hyper_connection\w*\.input_mix_weight_up", "whole", "rowwise", "we split the space between down and up"),
    (r"compressor\.\w+", "whole", "|unused", "not read at this length"),
]
NOT_BUILT = {
    "cohere_compass_text": "needs settings of its own",
    "dots3_note_text": "sizes differ between its layers",
    "gemma3n_text": "needs settings of its own",
    "gemma4_text": "sizes differ between its layers",
    "gemma4_unified_text": "sizes differ between its layers",
    "granitemoehybrid": "needs settings of its own",
    "jamba": "Dynamo's own guards fail",
    "kimi_linear": "too many parameters at these settings",
    "lfm2_moe": "needs settings of its own",
    "llama4": "not a text decoder",
    "longcat_flash": "has no layers at these settings",
    "phi4_multimodal": "too many parameters at these settings",
    "phimoe": "the gradient of its router's own autograd function is no factor: refused, SP302",
}
FAST = ("llama", "phi3", "gpt_neox", "mixtral", "deepseek_v3", "olmo2", "aria_text")


def differences(model_type: str) -> list[tuple[str, str, str]]:
    """(parameter, theirs, ours), layer numbers as `*`."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    plan = CONFIG_MAPPING[model_type].base_model_tp_plan
    model: Any = hf_families.build(model_type)
    kinds = decide(model, hf_families.inputs()).kinds
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        key = re.sub(r"\.\d+(?=\.)", ".*", name.removesuffix(".weight"))
        key = key.removeprefix(f"{model.base_model_prefix}.").removeprefix("model.")
        theirs, ours = THEIRS.get(plan.get(key), "whole"), kinds.get(name, "unused")
        if parameter.ndim > 1 and theirs != ours:
            found[key, theirs, ours] = None
    return list(found)


def explained(key: str, theirs: str, ours: str) -> str | None:
    fitting = (
        why
        for pattern, wanted, have, why in DIFFERENCES
        if theirs == wanted and re.search(rf"{pattern}$", key) and re.fullmatch(have, ours)
    )
    return next(fitting, None)


@pytest.mark.thinned(4)
def test_every_family_is_compared_or_says_why_not() -> None:
    assert list(hf_families.FAMILIES) == hf_families.found_families()
    assert NOT_BUILT.keys() <= set(hf_families.FAMILIES)


@pytest.mark.thinned(10)
@pytest.mark.parametrize(
    "model_type",
    [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in hf_families.FAMILIES],
)
def test_each_difference_has_a_reason(model_type: str) -> None:
    if model_type in NOT_BUILT:
        pytest.skip(NOT_BUILT[model_type])
    unexplained = [row for row in differences(model_type) if explained(*row) is None]
    assert not unexplained


@pytest.mark.slow
@pytest.mark.thinned(10, covers=["degree"])
@pytest.mark.parametrize("degree", [2, 3])
@pytest.mark.parametrize(
    "model_type",
    [
        "phi3",
        "gpt_neox",
        "gemma",
        "olmo2",
        "llama4_text",
        "mixtral",
        "deepseek_v3",
        "nemotron_h",
        "aria_text",
        "glm4_moe",
    ],
)
def test_exact(model_type: str, degree: int) -> None:
    """In float32: the plain model's grouped products have no kernel for float64."""
    model = hf_families.build(model_type)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    report = spcompile.verify(model, hf_families.inputs(9), mesh={"tp": degree}, tolerance=2e-5)
    assert report.ok, str(report)


@pytest.mark.thinned(3)
def test_weights_of_positions_are_split_by_what_stands_between_them() -> None:
    """An MLP over tokens: its hidden dim, never the tokens that its weights are as long as."""
    model, inputs = mixing_models.KINDS["tokens and channels"]()
    found = decide(model, inputs)
    assert found.of("tokens.0.weight") == "colwise"
    assert found.of("tokens.2.weight") == "rowwise"
