"""Evaluation and prediction of Trainers over a mesh, against the same in one process: tokens are generated, every entry
counts once.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import hf_models
import pytest
import torch
import torch.distributed as dist
from oracle import FLOAT32
from trainer_runs import QUIET_ON_CPU, Rows, launched, padded, worst
from worker_pool import WorkerPool

PoolOf = Callable[[int], WorkerPool]


def encoder_and_decoder() -> Any:
    import transformers as T

    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": hf_models.VOCAB, "init_std": 0.3}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    torch.manual_seed(0)
    return T.BartForConditionalGeneration(T.BartConfig(**sizes, **heads, **special, forced_eos_token_id=None))


def with_values(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A number for each row in the place of its labels."""
    batch = padded(rows)
    return batch | {"labels": batch["input_ids"].float().mean(-1) / hf_models.VOCAB}


def run(kind: str, batch: int, spread: Any, **others: Any) -> dict[str, Any]:
    """An evaluation of seven or five rows, and a prediction."""
    import transformers as T

    def metrics(seen: Any) -> dict[str, float]:
        return {"entries": len(seen.predictions), "sum": float(abs(seen.predictions).sum())}

    settings = QUIET_ON_CPU | {"per_device_eval_batch_size": batch}
    if kind == "values":
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
        config = T.BertConfig(**sizes, vocab_size=hf_models.VOCAB, num_labels=1, initializer_range=0.2)
        made = T.TrainingArguments(tempfile.mkdtemp(), **settings)
        model: Any = T.BertForSequenceClassification(config)
        base, collate, rows, asked = T.Trainer, with_values, Rows(5), {}
    else:
        beams = {"predict_with_generate": True, "generation_max_length": 10, "generation_num_beams": 2}
        made = T.Seq2SeqTrainingArguments(tempfile.mkdtemp(), **settings | beams)
        model, base, collate, rows = encoder_and_decoder(), T.Seq2SeqTrainer, padded, Rows(7)
        asked = {"do_sample": True, "num_beams": 1} if kind == "sampled" else {}
    trainer = spread(base)(model, made, collate, None, rows, compute_metrics=metrics, **others)
    torch.manual_seed(dist.get_rank() if others else 0)  # the first rank's counts
    evaluated, predicted = trainer.evaluate(**asked), trainer.predict(rows, **asked)
    found = {"predictions": torch.tensor(predicted.predictions), "labels": torch.tensor(predicted.label_ids)}
    found |= {name: [evaluated[f"eval_{name}"]] for name in ("loss", "entries", "sum")}
    return found | {"test loss": [predicted.metrics["test_loss"]]}


def compare(kind: str, mesh: dict[str, int]) -> dict[str, float]:
    from spcompile.integrations.transformers import SequenceParallelMixin

    with launched(1):
        want = run(kind, 2 * mesh.get("dp", 1), lambda base: base)
    with launched(2):
        eager = {"mesh": mesh, "spcompile_options": {"compiler": "eager"}}
        return worst(want, run(kind, 2, lambda base: type("Spread", (SequenceParallelMixin, base), {}), **eager))


CASES = [(kind, axis) for kind in ("beams", "sampled", "values") for axis in ("cp", "tp", "dp")]


@pytest.mark.thinned(30)
@pytest.mark.parametrize(("kind", "axis"), [case for case in CASES if case != ("sampled", "dp")])
def test_as_in_one_process(worker_pool: PoolOf, kind: str, axis: str) -> None:
    mesh = {axis: 2} | ({"cp": 1} if axis == "dp" else {})
    for rank, errors in enumerate(worker_pool(2).run(compare, kind, mesh)):
        bad = {name: error for name, error in errors.items() if not error <= FLOAT32}
        assert not bad, f"rank {rank}: {bad}"
        assert len(errors) == 6
