"""What else people do with a parallelized model, what its graphs may want, and the errors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import EXACT, default_dtype, error, own_loss
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from worker_pool import WorkerPool

import spcompile
from spcompile import models
from spcompile.diagnostics import SpcompileError

PoolOf = Callable[[int], WorkerPool]
LENGTH = 32


class Block(nn.Module):
    """Three heads, which 2 do not divide, in a dim of 12, which they do; a fused projection; one parameter frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.q, self.kv, self.out = nn.Linear(12, 12), nn.Linear(12, 24, bias=False), nn.Linear(12, 12)
        self.gain = nn.Parameter(torch.rand(12), requires_grad=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        h_BSD = self.norm(x_BSD)
        k_BSD, v_BSD = self.kv(h_BSD).chunk(2, dim=-1)
        q_BNSH, k_BNSH, v_BNSH = (t.unflatten(-1, (3, 4)).transpose(1, 2) for t in (self.q(h_BSD), k_BSD, v_BSD))
        y_BNSH = F.scaled_dot_product_attention(q_BNSH, k_BNSH, v_BNSH, is_causal=True)
        return x_BSD + self.gain * self.out(y_BNSH.transpose(1, 2).flatten(2))


class Awkward(nn.Module):
    """Positions are a parameter that is added, and read as a slice; checkpointed blocks; a weight read in two ways."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(64, 12)
        self.positions_SD = nn.Parameter(torch.randn(LENGTH, 12) * 0.1)
        self.more_TD = nn.Parameter(torch.randn(2 * LENGTH, 12) * 0.1)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(12, 64, bias=False)

    def forward(self, ids_BS: Tensor, labels_BS: Tensor | None = None) -> Any:
        S = ids_BS.shape[1]
        x_BSD = self.tokens(ids_BS) + self.more_TD[:S] + (self.positions_SD if S == LENGTH else 0)
        for block in self.blocks:
            x_BSD = checkpoint(block, x_BSD, use_reentrant=False)
        logits_BSV = self.head(x_BSD) + 0.01 * self.head.weight.square().sum()
        if labels_BS is None:
            return logits_BSV
        return F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), labels_BS[:, 1:].flatten())


def batch(length: int = LENGTH) -> dict[str, Tensor]:
    ids_BS = torch.randint(0, 64, (2, length), generator=torch.Generator().manual_seed(length))
    return {"ids_BS": ids_BS, "labels_BS": ids_BS.clone()}


def both(build: Callable[[], nn.Module], sizes: dict[str, int], axis: str | None, **options: Any) -> tuple[Any, Any]:
    plain = build()
    mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    options = {"compiler": "eager", **options}
    return plain, spcompile.parallelize(copy.deepcopy(plain), mesh, batch(), shard_parameters=axis, **options)


def gradients(plain: nn.Module, sharded: nn.Module) -> dict[str, float]:
    errors = {}
    for (name, p), (_, q) in zip(plain.named_parameters(), sharded.named_parameters(), strict=True):
        assert isinstance(q, DTensor)
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None and isinstance(q.grad, DTensor):
            errors[name] = error(p.grad, q.grad.full_tensor(), 1e-3)
    return errors


def awkward(sizes: dict[str, int], axis: str | None, options: dict[str, Any]) -> dict[str, float]:
    with default_dtype(torch.float64):
        plain, sharded = both(Awkward, sizes, axis, **options)
        want, have = (own_loss(model(**batch())) for model in (plain, sharded))
        want.backward()
        have.backward()
        return {"loss": error(want.detach(), have.detach()), **gradients(plain, sharded)}


@pytest.mark.thinned(30)
@pytest.mark.parametrize("balance", ["zigzag", "contiguous"])
@pytest.mark.parametrize(
    ("sizes", "axis"), [({"tp": 2, "cp": 2}, "cp"), ({"tp": 2}, None), ({"cp": 2}, "cp"), ({"cp": 2, "tp": 2}, None)]
)
def test_every_way_to_read_a_parameter(
    worker_pool: PoolOf, sizes: dict[str, int], axis: str | None, balance: str
) -> None:
    options = {"attention": "ring", "balance": balance}
    for errors in worker_pool(2 * len(sizes)).run(awkward, sizes, axis, options):
        assert not {name: e for name, e in errors.items() if not e <= EXACT}


def use(sizes: dict[str, int], axis: str | None) -> dict[str, float]:
    """Evaluation, odd lengths, autocast's dtype left alone, and the model called without its compiled code."""
    with default_dtype(torch.float64):
        plain, sharded = both(lambda: models.build("llama-tiny"), sizes, axis)
        errors = {}
        plan = spcompile.explain(sharded, batch(), mesh=sizes)
        assert plan.memory.parameter_bytes == sum(p.to_local().numel() * 8 for p in sharded.parameters())
        kinds = {(row.op, row.phase) for row in plan.collectives if row.origin == "parameter"}
        assert kinds == ({("all_gather", "forward"), ("all_gather", "backward")} if axis else set())
        with torch.no_grad():
            for length in (8, 7, 1):
                ids_BS = batch(length)["ids_BS"]
                errors[f"logits of {length}"] = error(plain(ids_BS), sharded(ids_BS))
        assert isinstance(sharded.tokens.weight, nn.Parameter)
        want, have = (own_loss(model.forward(**batch())) for model in (plain, sharded))
        want.backward()
        have.backward()
        errors["uncompiled loss"] = error(want.detach(), have.detach())
        return {**errors, **gradients(plain, sharded)}


@pytest.mark.slow
@pytest.mark.thinned(25)
@pytest.mark.parametrize(("sizes", "axis"), [({"cp": 2}, "cp"), ({"tp": 2}, None)])
def test_evaluation_other_lengths_and_uncompiled_calls(
    worker_pool: PoolOf, sizes: dict[str, int], axis: str | None
) -> None:
    for errors in worker_pool(2).run(use, sizes, axis):
        assert not {name: e for name, e in errors.items() if not e <= EXACT}


def one_rank() -> dict[str, float]:
    with default_dtype(torch.float64):
        plain, sharded = both(lambda: models.build("gpt-tiny"), {"tp": 1, "cp": 1}, "cp")
        want, have = (own_loss(model(**batch())) for model in (plain, sharded))
        want.backward()
        have.backward()
        return {"loss": error(want.detach(), have.detach()), **gradients(plain, sharded)}


@pytest.mark.slow
def test_a_mesh_of_one_rank(worker_pool: PoolOf) -> None:
    (errors,) = worker_pool(1).run(one_rank)
    assert not {name: e for name, e in errors.items() if not e <= EXACT}


def refused() -> list[str]:
    """The texts of the errors, none of which may have changed the model."""
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("tp", "cp"))
    model = models.build("llama-tiny")
    with torch.device("meta"):
        empty = models.build("llama-tiny")
    done = spcompile.parallelize(models.build("llama-tiny"), mesh, batch())
    calls: list[Callable[[], Any]] = [
        lambda: spcompile.parallelize(model, mesh, batch(), shard_parameters="dp"),
        lambda: spcompile.parallelize(model, mesh, batch(), shard_parameters=("cp", "dp")),
        lambda: spcompile.parallelize(model, "cp", batch()),  # type: ignore[arg-type]
        lambda: spcompile.parallelize(model, mesh, batch(), atention="ring"),
        lambda: spcompile.parallelize(done, mesh, batch()),
        lambda: spcompile.parallelize(empty, mesh, batch()),
        lambda: spcompile.parallelize(model, mesh, batch(), checkpoint="somewhere"),
        lambda: spcompile.parallelize(empty, mesh, batch(), initialize=lambda: models.build("gpt-tiny")),
    ]
    texts = []
    for call in calls:
        with pytest.raises(SpcompileError) as caught:
            call()
        texts.append(str(caught.value))
        assert not any(isinstance(p, DTensor) for p in model.parameters())
    return texts


@pytest.mark.thinned(2)
def test_errors_say_what_is_legal(worker_pool: PoolOf) -> None:
    (texts,) = worker_pool(1).run(refused)
    wanted = [
        "'dp'",
        "'tp'",
        "DeviceMesh",
        "attention",
        "DTensor already",
        "initialize=",
        "meta",
        "builds the same model",
    ]
    assert all(word in text for word, text in zip(wanted, texts, strict=True)), texts
