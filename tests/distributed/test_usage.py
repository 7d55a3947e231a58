"""How people use a compiled model: other lengths, micro-batches, eval, torch.compile(model), other outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import hf_models
import plain_models as pm
import pytest
import torch
import torch.nn.functional as F
from oracle import (
    EXACT,
    FLOAT32,
    FLOAT32_INSIDE,
    Case,
    assert_same,
    compare_parameters,
    compare_tensors,
    default_dtype,
    error,
    recorded,
)
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from worker_pool import WorkerPool

from spcompile import models
from spcompile.diagnostics import NotComputed

PoolOf = Callable[[int], WorkerPool]


def tokens(number: int, *, length: int = 32, labels: bool = True, grows: int = 0) -> dict[str, Tensor]:
    ids_BS = torch.randint(0, 64, (2, length + grows * number), generator=torch.Generator().manual_seed(number))
    return {"ids_BS": ids_BS, "labels_BS": ids_BS} if labels else {"ids_BS": ids_BS}


def outer_loss(logits_BSV: Tensor, batch: dict[str, Any]) -> Tensor:
    return F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), batch["ids_BS"][:, 1:].flatten())


GPT = partial(models.build, "gpt-tiny", layers=1)
LLAMA = partial(models.build, "llama-tiny", layers=1)


@pytest.mark.thinned(4)
def test_loss_outside_the_model(worker_pool: PoolOf) -> None:
    assert_same(worker_pool(2), Case(GPT, partial(tokens, labels=False), outer_loss))


class Shrinking(nn.Module):
    """Its forward writes to the data of a weight, and to a buffer; a learned bias is added to a finite fill."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.heads, self.head = nn.Embedding(64, 16), nn.Linear(16, 48), nn.Linear(16, 64)
        self.distances = nn.Embedding(64, 2)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, ids_BS: Tensor, labels_BS: Tensor) -> Tensor:
        self.steps += 1
        self.heads.weight.data.mul_(0.75)
        q, k, v = self.heads(self.tokens(ids_BS)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        rows = torch.arange(ids_BS.shape[1], device=ids_BS.device)
        bias = self.distances((rows[None] - rows[:, None]).clamp(-31, 31) + 31).permute(2, 0, 1)
        hidden = torch.where(ids_BS > 3, 0.0, torch.finfo(q.dtype).min).to(q.dtype)[:, None, None, :]
        x_BSD = ((q @ k.mT + (bias + hidden)).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return F.cross_entropy(self.head(x_BSD).flatten(0, 1), labels_BS.flatten())


def padded(number: int) -> dict[str, Tensor]:
    """One sequence is all padding: each of its rows averages all values."""
    batch = {name: x.clone() for name, x in tokens(number, length=21).items()}
    batch["ids_BS"][1] = 2
    return batch


@pytest.mark.thinned(8)
def test_a_forward_that_writes_to_a_parameter(worker_pool: PoolOf) -> None:
    assert_same(worker_pool(2), Case(Shrinking, padded))


@pytest.mark.thinned(4)
def test_two_micro_batches_accumulate(worker_pool: PoolOf) -> None:
    outcomes = assert_same(worker_pool(2), Case(GPT, tokens, micro_batches=(0, 1)))
    assert len(outcomes[0].graphs) == 2, "one forward and one backward for both"


@pytest.mark.thinned(6)
def test_torch_compile(worker_pool: PoolOf) -> None:
    assert_same(worker_pool(2), Case(LLAMA, tokens, wrap=True))


@pytest.mark.thinned(9)
def test_float32(worker_pool: PoolOf) -> None:
    assert_same(worker_pool(2), Case(GPT, tokens, dtype=torch.float32), FLOAT32)


INDUCTOR = {
    "loss inside": Case(LLAMA, partial(tokens, length=45)),
    "logits in zigzag order": Case(
        LLAMA, partial(tokens, length=33, labels=False), outer_loss, options={"attention": "ring"}
    ),
    "transformers": Case(
        partial(hf_models.build, "llama"),
        partial(hf_models.inputs, model="llama", kind="no labels"),
        hf_models.outer_loss,
    ),
}


@pytest.mark.slow
@pytest.mark.thinned(23)
@pytest.mark.parametrize("name", INDUCTOR)
def test_inductor(worker_pool: PoolOf, name: str) -> None:
    """Inductor fuses what RMSNorm of transformers computes in float32 and rounds it in another order."""
    case = INDUCTOR[name]
    case = replace(case, options={"compiler": "inductor", **case.options})
    assert_same(worker_pool(2), case, FLOAT32_INSIDE if name == "transformers" else EXACT)


@pytest.mark.slow
@pytest.mark.thinned(6)
def test_lengths_that_change_compile_once_more(worker_pool: PoolOf) -> None:
    outcomes = assert_same(worker_pool(2), Case(GPT, partial(tokens, grows=15), micro_batches=(0, 1, 2, 3)))
    assert len(outcomes[0].graphs) <= 4, "the second length is the last to compile"


def marked(number: int) -> dict[str, Tensor]:
    batch = tokens(number, grows=9)
    for ids_BS in batch.values():
        torch._dynamo.mark_dynamic(ids_BS, 1)
    return batch


@pytest.mark.slow
@pytest.mark.thinned(6)
def test_mark_dynamic_compiles_once(worker_pool: PoolOf) -> None:
    outcomes = assert_same(worker_pool(2), Case(LLAMA, marked, micro_batches=(0, 1, 2)))
    assert len(outcomes[0].graphs) == 2


def evaluate() -> dict[str, float]:
    """Train for a step, then evaluate: eval() with dropout in the model, and no_grad."""
    with default_dtype(torch.float64):
        plain = models.build("gpt-tiny", layers=1, dropout=0.5).eval()
        compiled = models.build("gpt-tiny", layers=1, dropout=0.5).eval()
        compiled.load_state_dict(plain.state_dict())
        compiled.compile(backend="spcompile", options={"compiler": "eager"})
        batch = tokens(0)
        errors = {}
        for name, context in (
            ("eval", torch.enable_grad),
            ("no_grad", torch.no_grad),
            ("inference", torch.inference_mode),
        ):
            with context():
                errors[name] = error(plain(**batch), compiled(**batch))
        assert torch.isfinite(compiled.train()(**batch))
    return errors


@pytest.mark.thinned(10)
def test_eval_and_no_grad(worker_pool: PoolOf) -> None:
    for errors in worker_pool(2).run(evaluate):
        assert all(found <= EXACT for found in errors.values()), errors


def compiled_pair(build: Callable[[], nn.Module], **options: Any) -> tuple[nn.Module, nn.Module]:
    plain, compiled = build(), build()
    compiled.load_state_dict(plain.state_dict())
    compiled.compile(backend="spcompile", options={"compiler": "eager", **options})
    return plain, compiled


def sharded_outputs(length: int) -> dict[str, float]:
    """Logits as a DTensor; a loss on its local part, whose gradients flow through it."""
    with default_dtype(torch.float64), recorded() as record:
        plain, compiled = compiled_pair(GPT, outputs="sharded")
        batch = tokens(0, length=length, labels=False)
        want, have = plain(**batch), compiled(**batch)
        assert isinstance(have, DTensor), type(have)
        assert have.shape == want.shape
        errors = compare_tensors({"logits": want.detach()}, {"logits": have.full_tensor().detach()})
        want.square().mean().backward()
        have.square().mean().full_tensor().backward()
        errors |= compare_parameters(plain, compiled)
    assert record.graphs
    return errors


@pytest.mark.thinned(8)
@pytest.mark.parametrize("length", [32, 33])
def test_sharded_outputs(worker_pool: PoolOf, length: int) -> None:
    for errors in worker_pool(2).run(sharded_outputs, length):
        assert all(found <= EXACT for found in errors.values()), errors


class LossAndLogits(nn.Module):
    """Returns what Hugging Face models do: a loss and all logits."""

    def __init__(self) -> None:
        super().__init__()
        self.model = LLAMA()

    def forward(self, ids_BS: Tensor) -> tuple[Tensor, Tensor]:
        logits_BSV = self.model(ids_BS)
        return outer_loss(logits_BSV, {"ids_BS": ids_BS}), logits_BSV


def loss_only() -> tuple[dict[str, float], str, int]:
    with default_dtype(torch.float64), recorded() as record:
        plain, compiled = compiled_pair(LossAndLogits, outputs="loss")
        ids_BS = tokens(0)["ids_BS"]
        want, have = plain(ids_BS), compiled(ids_BS)
        want[0].backward()
        have[0].backward()
        errors = {"loss": error(want[0], have[0]), **compare_parameters(plain, compiled)}
        text = ""
        try:
            have[1].sum()
        except NotComputed as refusal:
            text = str(refusal)
    return errors, text, len(record.graphs)


@pytest.mark.thinned(5)
def test_loss_only(worker_pool: PoolOf) -> None:
    for errors, text, graphs in worker_pool(2).run(loss_only):
        assert all(found <= EXACT for found in errors.values()), errors
        assert text.startswith("SP402")
        assert graphs == 2


def wrong_gradient() -> list[str]:
    """What the oracle finds where one parameter's gradient misses one rank's part."""
    with default_dtype(torch.float64):
        plain, other = compiled_pair(partial(pm.Reduced, "mean"))
        for model in (plain, other):
            out = nn.Module.__call__(model, words=pm.ids(0, 16), answers=pm.ids(1, 16))
            out.backward()
        gradient = other.get_parameter("attention.qkv.weight").grad
        assert gradient is not None
        gradient[3] *= 0.999
    return [name for name, found in compare_parameters(plain, other).items() if found > EXACT]


@pytest.mark.thinned(5)
def test_the_oracle_sees_a_wrong_gradient(worker_pool: PoolOf) -> None:
    expected = ["gradient of attention.qkv.weight", "attention.qkv.weight after a step"]
    assert worker_pool(2).run(wrong_gradient) == [expected, expected]
