"""Trainers of TRL over a mesh, and the same in one process; `dev` installs neither TRL nor PEFT nor datasets."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch
import torch.distributed as dist
from oracle import FLOAT32
from trainer_runs import QUIET_ON_CPU, launched, left_behind, worst
from worker_pool import WorkerPool

pytest.importorskip("trl")
PoolOf = Callable[[int], WorkerPool]
WORDS = hf_models.VOCAB - 3


def text(number: int, length: int) -> str:
    generator = torch.Generator().manual_seed(number)
    return " ".join(f"w{int(at)}" for at in torch.randint(0, WORDS, (length,), generator=generator))


def tokenizer() -> Any:
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    words = [*(f"w{at}" for at in range(WORDS)), *special.values()]
    made = Tokenizer(kinds.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def kind_of(name: str) -> tuple[Any, Any, dict[str, list[str]], dict[str, Any]]:
    """A Trainer's class, that of its arguments, its rows, and settings."""
    import trl

    if name == "dpo":
        rows = {"prompt": (0, 5), "chosen": (100, 8), "rejected": (200, 8)}
        return (
            trl.DPOTrainer,
            trl.DPOConfig,
            {n: [text(s + at, k) for at in range(24)] for n, (s, k) in rows.items()},
            {},
        )
    settings = {"packing": True, "packing_strategy": "wrapped"} if name == "sft, packed" else {}
    return trl.SFTTrainer, trl.SFTConfig, {"text": [text(at, 10 + at % 9) for at in range(24)]}, settings


def compare(name: str, mesh: dict[str, int], folder: str) -> dict[str, float]:
    import datasets
    import transformers

    base, config, rows, settings = kind_of(name)
    if dist.get_rank() == 0:
        hf_models.build("llama", layers=1).save_pretrained(folder)
    dist.barrier()
    common = QUIET_ON_CPU | {
        "bf16": False,
        "max_steps": 3,
        "max_length": 24,
        "gradient_checkpointing": name == "sft, adapters",
    }

    def trained(cls: Any, **others: Any) -> dict[str, Any]:
        torch.manual_seed(0)
        adapters = None
        if name == "sft, adapters":
            from peft import LoraConfig

            adapters = LoraConfig(r=4, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
        trainer = cls(
            transformers.LlamaForCausalLM.from_pretrained(folder),
            args=config(tempfile.mkdtemp(), **common | settings),
            train_dataset=datasets.Dataset.from_dict(rows),
            processing_class=tokenizer(),
            peft_config=adapters,
            **others,
        )
        trainer.train()
        more = ("entropy", "mean_token_accuracy", "num_tokens", "rewards/margins", "logps/chosen")
        history = trainer.state.log_history
        return left_behind(trainer) | {key: [row[key] for row in history if key in row] for key in more}

    with launched(1):
        want = trained(base)
    from spcompile.integrations.trl import SequenceParallelMixin

    with launched(2):
        cls = type("Spread", (SequenceParallelMixin, base), {})
        return worst(want, trained(cls, mesh=mesh, spcompile_options={"compiler": "eager"}))


@pytest.mark.slow
@pytest.mark.thinned(4)
@pytest.mark.parametrize("axis", ["cp", "tp"])
@pytest.mark.parametrize("name", ["sft", "sft, packed", "sft, adapters", "dpo"])
def test_as_in_one_process(worker_pool: PoolOf, tmp_path: Path, name: str, axis: str) -> None:
    for errors in worker_pool(2).run(compare, name, {axis: 2}, str(tmp_path)):
        bad = {key: error for key, error in errors.items() if not error <= FLOAT32}
        assert not bad, bad
        assert len(errors) > 15


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_the_fused_head_written_out(softcap: float | None) -> None:
    from trl.kernels import ChunkedLogProbFunction

    from spcompile.integrations.trl import WrittenOut

    outputs = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    given = [torch.randn(7, 5, requires_grad=True), torch.randn(11, 5, requires_grad=True), torch.randn(11)]
    targets_N = torch.randint(0, 11, (7,))
    with torch.no_grad():
        given[0][0] += given[1][targets_N[0]]
    found = []
    for head in (ChunkedLogProbFunction, WrittenOut):
        results = head.apply(*given, targets_N, 0.7, 4, softcap, 1.3, outputs)
        gradients = torch.autograd.grad((results[0] * torch.arange(7.0)).sum() + results[1].sum(), given[:2])
        found.append([*results, *gradients])
        assert head.apply(*given, targets_N, 0.7, 4, softcap, 1.3, ())[1:] == (None,) * 4
    for want, have in zip(*found, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-5)
