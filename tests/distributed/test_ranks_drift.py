"""Ranks that are not given the same, or do not do the same, are named at once: one error, the same on every rank."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable
from typing import Any

import plain_models as pm
import pytest
import torch
import torch.distributed as dist
from refusals import compiled, refusal, same_text
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DistributedSampler
from worker_pool import WorkerPool

import spcompile
from spcompile import backend, models
from spcompile.diagnostics import SpcompileError

PoolOf = Callable[[int], WorkerPool]
SECONDS = 60.0


def rows(seed: int = 0) -> Tensor:
    return torch.randn(2, 8, pm.WIDTH, generator=torch.Generator().manual_seed(seed))


def over(axis: str) -> Any:
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=(axis,))


def other_weights(axis: str) -> str:
    torch.manual_seed(dist.get_rank())
    model = compiled(pm.SelfAttention(), mesh=over(axis))
    return refusal(lambda: model(rows()))


def other_norm_of_a_parallelized_model() -> str:
    """What tp splits differs by right; what it does not must agree."""
    model = pm.SelfAttention()
    if dist.get_rank() == 1:
        with torch.no_grad():
            next(model.parameters()).add_(1)
            model.out.bias.add_(1)
    spcompile.parallelize(model, over("tp"), (rows(),), compiler="eager")
    return refusal(lambda: model(rows()))


def loaded_on_one_rank() -> str:
    """A step of training changes parameters, and is no reason to compare; a checkpoint that one rank loads is."""
    model = compiled(pm.SelfAttention())
    saved = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model(rows()).sum().backward()
        optimizer.step()
    if dist.get_rank() == 1:
        model.load_state_dict(saved)
    return refusal(lambda: model(rows()))


def batch_of_a_sampler() -> Tensor:
    """The batch of a trainer that takes ranks for places in the batch."""
    data = torch.arange(4)
    return rows()[:, list(DistributedSampler(data, shuffle=True)), :].contiguous()  # type: ignore[arg-type]


def other_batches() -> str:
    model = compiled(pm.SelfAttention())
    return refusal(lambda: model(batch_of_a_sampler()))


def same_rows_in_another_order() -> str:
    model = compiled(pm.SelfAttention())
    return refusal(lambda: model(rows().flip(0) if dist.get_rank() else rows()))


def other_batches_found_later() -> str:
    """As on accelerators: the call runs, and the next one, or its backward, raises."""
    model = compiled(pm.SelfAttention(), compare="later")
    model(rows()).sum().backward()
    model(rows(dist.get_rank()))
    return refusal(lambda: model(rows()))


def other_samples() -> str:
    """As `generate` does with another seed on each rank: the first token that differs is refused."""
    model = compiled(models.build("gpt-tiny", layers=1).eval())
    torch.manual_seed(dist.get_rank())
    sampled_BS, drawn = pm.ids(0, 5, batch=1), [None, None]
    with torch.no_grad():
        while drawn[0] == drawn[1]:
            token_B1 = torch.multinomial(model(sampled_BS)[:, -1].softmax(-1), 1)
            dist.all_gather_object(drawn, token_B1.tolist())
            sampled_BS = torch.cat([sampled_BS, token_B1], 1)
        return refusal(lambda: model(sampled_BS))


def models_in_another_order() -> str:
    """Two of one class, with equal weights, as a policy and its reference."""
    one = compiled(pm.SelfAttention())
    two = compiled(copy.deepcopy(one))
    for model in (one, two):
        model(rows())
    order = (one, two) if dist.get_rank() == 0 else (two, one)
    return refusal(lambda: [model(rows()) for model in order])


def no_backward() -> str:
    model = compiled(pm.SelfAttention())
    model(rows()).sum().backward()
    loss = model(rows()).sum()
    if dist.get_rank() == 0:
        return refusal(loss.backward)
    return refusal(lambda: model(rows()))


def other_python() -> str:
    import platform

    backend._agreement.cache_clear()
    version = platform.python_version()
    platform.python_version = lambda: version if dist.get_rank() == 0 else "3.9.0"
    try:
        model = compiled(pm.SelfAttention())
        return refusal(lambda: model(rows()))
    finally:
        platform.python_version = lambda: version
        backend._agreement.cache_clear()


@pytest.mark.thinned(30)
@pytest.mark.parametrize(
    ("mistake", "arguments", "words"),
    [
        (other_weights, ("cp",), ["parameter qkv.weight", "checksum", "legal: seed before", "spcompile.broadcast"]),
        (other_weights, ("dp",), ["parameter qkv.weight", "legal: seed before"]),
        (other_norm_of_a_parallelized_model, (), ["parameter out.bias", "legal: seed before"]),
        (loaded_on_one_rank, (), ["call 3 of graph", "parameter qkv.weight", "load one checkpoint"]),
        (other_batches, (), ["call 1 of graph", "values of input x", "legal: all ranks of cp and tp", "num_replicas"]),
        (same_rows_in_another_order, (), ["values of input x"]),
        (other_batches_found_later, (), ["call 2 of graph", "values of input x"]),
        (other_samples, (), ["values of input ids_BS", "sampled", "torch.manual_seed with one seed"]),
        (models_in_another_order, (), ["call 3 of graph", "parameters\n", "set ", "in the same order"]),
        (no_backward, (), ["the backward of call 2", "call 3", "backwards of them, in the same order"]),
        (other_python, (), ["Python", "3.9.0", "legal: one environment"]),
    ],
)
def test_ranks_that_drift(
    worker_pool: PoolOf, mistake: Callable[..., str], arguments: tuple[Any, ...], words: list[str]
) -> None:
    text = same_text(worker_pool(2).run(mistake, *arguments, timeout=SECONDS))
    assert text.startswith("SP201 ranks disagree"), text
    assert all(word in text for word in ["rank 0", "rank 1", *words]), text
    assert text.count("\n") < 16, "what differs, and no more"


def broadcast_weights() -> tuple[float, float]:
    torch.manual_seed(dist.get_rank())
    model = pm.SelfAttention()
    spcompile.broadcast(model)
    torch.manual_seed(0)
    plain = pm.SelfAttention()
    return float(compiled(model)(rows()).sum()), float(plain(rows()).sum())


@pytest.mark.thinned(2)
def test_rank_0_becomes_the_truth(worker_pool: PoolOf) -> None:
    for have, want in worker_pool(2).run(broadcast_weights):
        assert have == pytest.approx(want, abs=1e-4)


def allowed() -> int:
    """Own rows over dp; other batches where nobody wants to know; weights that train, and are not compared again."""
    model = compiled(pm.SelfAttention(), mesh=over("dp"))
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(3):
        model(rows(dist.get_rank())).sum().backward()
        optimizer.step()
        agreement = backend._agreement(dist.group.WORLD, backend.runtime_mesh(over("dp"), "cpu"))  # type: ignore[arg-type]
        if step == 0:
            before = agreement.count
    other = compiled(pm.SelfAttention(), compare_inputs=False)
    other(rows(dist.get_rank()))
    return agreement.count - before


@pytest.mark.thinned(9)
def test_what_may_differ(worker_pool: PoolOf) -> None:
    assert worker_pool(2).run(allowed) == [4, 4], "a call and a backward, twice"


def text_with_an_address() -> tuple[str, str]:
    """An internal error whose text has an object in it."""
    model, kept = compiled(pm.SelfAttention()), backend.mark_part

    def fails(*_: Any) -> None:
        raise TypeError(f"no rule for {[object() for _ in range(1 + dist.get_rank())][-1]!r}")

    backend.mark_part = fails
    try:
        model(rows())
    except Exception as error:
        inner = getattr(error, "inner_exception", error)
        return type(inner).__name__, str(inner)
    finally:
        backend.mark_part = kept
    return "", ""


def test_addresses_are_no_difference(worker_pool: PoolOf) -> None:
    for kind, text in worker_pool(2).run(text_with_an_address):
        assert kind == "TypeError", text
        assert "no rule for <object" in text


class Slow(nn.Module):
    """Long enough that two calls overlap."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = pm.SelfAttention()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(4):
            x = self.attention(x)
        return x


def two_threads() -> list[str]:
    model = compiled(Slow())
    model(rows())
    together, found = threading.Barrier(2), list[str]()

    def work() -> None:
        together.wait()
        try:
            for _ in range(20):
                with torch.no_grad():
                    model(rows())
        except SpcompileError as error:
            found.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.thinned(8)
def test_two_threads(worker_pool: PoolOf) -> None:
    for found in worker_pool(2).run(two_threads, timeout=SECONDS):
        assert found, "nothing was refused"
        assert all("from one thread at a time" in text or "called from two threads" in text for text in found), found


def in_a_forked_child() -> str:
    model = compiled(pm.SelfAttention())
    model(rows())
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            text = refusal(lambda: model(rows()))
        except BaseException as error:
            text = repr(error)
        os.write(sender, text.encode())
        os._exit(0)
    os.waitpid(child, 0)
    return os.read(receiver, 10000).decode()


@pytest.mark.thinned(2)
def test_a_forked_child(worker_pool: PoolOf) -> None:
    for text in worker_pool(2).run(in_a_forked_child, timeout=SECONDS):
        assert text.startswith("SP204 called in a forked process"), text


def parts_over_dp() -> int:
    """Parts of ZeRO-3 differ by right, and are the same set at every call: their values are compared once."""
    model = pm.SelfAttention()
    spcompile.parallelize(model, over("dp"), (rows(),), shard_parameters="dp", compiler="eager")
    optimizer = torch.optim.AdamW(model.parameters())
    agreement = backend._agreement(dist.group.WORLD, backend.runtime_mesh(over("dp"), "cpu"))  # type: ignore[arg-type]
    for _ in range(3):
        before = agreement.count
        model(rows(dist.get_rank())).sum().backward()
        optimizer.step()
    return agreement.count - before


@pytest.mark.thinned(4)
def test_parts_over_dp(worker_pool: PoolOf) -> None:
    assert worker_pool(2).run(parts_over_dp) == [2, 2], "a call and a backward"
