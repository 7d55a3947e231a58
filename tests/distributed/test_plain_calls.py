"""Whatever brings a call back to plain code: right and remarked over cp and tp, an error over dp; never silent."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import plain_models as pm
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from oracle import EXACT, compare_parameters, compare_tensors, default_dtype
from refusals import refusal, remarks, same_text
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from worker_pool import WorkerPool

import spcompile
from spcompile import backend

PoolOf = Callable[[int], WorkerPool]
SECONDS = 60.0


class Averaged(nn.Module):
    """Its result is not one that a rank's part of the batch has."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = pm.SelfAttention()

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x).pow(2).mean()


class Breaks(Averaged):
    """Asks for a number in its middle."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(x)
        print(y.sum(), end="\r")
        return y.pow(2).mean()


class SkippedOutside(Averaged):
    """Dynamo is told not to compile it, but what it calls."""

    @torch.compiler.disable(recursive=False)
    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x).pow(2).mean()


def forced(model: Any, call: Callable[[], Any]) -> Any:
    with torch.compiler.set_stance("force_eager"):
        return call()


def on_recompile(model: Any, call: Callable[[], Any]) -> Any:
    model.attention.causal = 1  # True, for which Dynamo makes another program
    with torch.compiler.set_stance("eager_on_recompile"):
        return call()


def beyond_the_limit(model: Any, call: Callable[[], Any]) -> Any:
    model.attention.causal = 1
    with torch._dynamo.config.patch(recompile_limit=1):
        return call()


def disabled(model: Any, call: Callable[[], Any]) -> Any:
    model.forward = torch.compiler.disable(model.forward)
    return call()


def swallowed(model: Any, call: Callable[[], Any]) -> Any:
    with torch._dynamo.config.patch(suppress_errors=True):
        return call()


def as_it_is(model: Any, call: Callable[[], Any]) -> Any:
    return call()


def whole(x: Any) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def fallen_back(axis: str, kind: type[nn.Module], way: Callable[..., Any], made_by: str, warm: bool) -> Any:
    """(errors against the plain model, what was remarked), or the text of the error."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=(axis,))
    with default_dtype(torch.float64):
        x = torch.randn(2, 8, pm.WIDTH, generator=torch.Generator().manual_seed(3))
        plain: Any = kind()
        model: Any = copy.deepcopy(plain)
        own = x.chunk(2)[dist.get_rank()] if axis == "dp" else x
        if made_by == "parallelize":
            spcompile.parallelize(model, mesh, (own,), compiler="eager", shard_parameters=axis)
        elif made_by == "compile":
            model.compile(backend="spcompile", options={"mesh": mesh, "compiler": "eager"})
        elif made_by == "partial":
            model.compile(backend=partial(backend.spcompile, options={"mesh": mesh, "compiler": "eager"}))
        else:
            model = torch.compile(model, backend="spcompile", options={"mesh": mesh, "compiler": "eager"})
        if warm:
            model(own)
        if axis == "dp":
            return refusal(lambda: way(model, lambda: model(own)))
        with remarks() as texts:
            have = way(model, lambda: [model(own), model(own)][1])
        have.backward()
        want = plain(x)
        want.backward()
        if made_by != "parallelize":
            return compare_tensors({"loss": want}, {"loss": have}) | compare_parameters(plain, model), texts
        given = {name: p.grad for name, p in plain.named_parameters()}
        found = {name: whole(p.grad) for name, p in model.named_parameters()}
        return compare_tensors({"loss": want, **given}, {"loss": have, **found}), texts


WAYS = [
    (Averaged, forced, True, "torch.compiler.set_stance('force_eager')"),
    (Averaged, forced, False, "torch.compiler.set_stance('force_eager')"),
    (Averaged, on_recompile, True, "torch.compiler.set_stance('eager_on_recompile')"),
    (Averaged, beyond_the_limit, True, "torch._dynamo.config.recompile_limit"),
    (Averaged, disabled, False, "as with torch.compiler.disable"),
    (SkippedOutside, as_it_is, False, "but for 1 of its parts,"),
    (Breaks, swallowed, False, "swallow an error, SP301"),
]


@pytest.mark.parametrize("axis", ["dp", "cp", "tp"])
@pytest.mark.parametrize(("kind", "way", "warm", "words"), WAYS)
@pytest.mark.thinned(4, covers=["axis"])
def test_plain_code_is_never_silent(
    worker_pool: PoolOf, axis: str, kind: Any, way: Callable[..., Any], warm: bool, words: str
) -> None:
    found = worker_pool(2).run(fallen_back, axis, kind, way, "compile", warm, timeout=SECONDS)
    look(axis, found, words)


def look(axis: str, found: list[Any], words: str) -> None:
    if axis == "dp":
        text = same_text(found)
        assert text.startswith("SP305 ran uncompiled: "), text
        assert words in text, text
        return
    for errors, texts in found:
        assert max(errors.values()) <= EXACT, errors
        assert len(texts) == 2, "one for each call"
        assert all(t.startswith("SPR403 ") and f"{axis}=2" in t and "2 times the activations" in t for t in texts), (
            texts
        )
        assert all(words in t for t in texts), texts


@pytest.mark.parametrize("axis", ["dp", "cp", "tp"])
@pytest.mark.parametrize(
    ("made_by", "way"), [("parallelize", forced), ("parallelize", disabled), ("wrapper", forced), ("partial", forced)]
)
@pytest.mark.thinned(6)
def test_however_it_was_compiled(worker_pool: PoolOf, axis: str, made_by: str, way: Callable[..., Any]) -> None:
    look(axis, worker_pool(2).run(fallen_back, axis, Averaged, way, made_by, False, timeout=SECONDS), "torch.compiler")


def skipped_by_rule() -> Any:
    """Dynamo never compiles a forward of torch.nn's own files that is not called from a user's."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    model.compile(backend="spcompile", options={"mesh": mesh, "compiler": "eager"})
    return refusal(lambda: model(torch.ones(1, 8, 16)))


def another_model_beyond_the_limit() -> str:
    """Dynamo counts programs of code, whatever the model; the second model's first call is plain already."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    one, two = Averaged(), Averaged()
    two.attention.causal = 1  # type: ignore[assignment]
    for model in (one, two):
        model.compile(backend="spcompile", options={"mesh": mesh, "compiler": "eager"})
    x = torch.ones(1, 8, pm.WIDTH)
    one(x)
    with torch._dynamo.config.patch(recompile_limit=1):
        return refusal(lambda: two(x))


class Weighted(Averaged):
    def forward(self, x: Tensor, weight: float) -> Tensor:  # type: ignore[override]
        return weight * super().forward(x)


def numbers_that_change() -> str:
    """Over dp each number of the caller's is another program: right ones up to the limit, then an error."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    with default_dtype(torch.float64):
        x = torch.randn(2, 8, pm.WIDTH, generator=torch.Generator().manual_seed(3))
        plain = Weighted()
        model: Any = copy.deepcopy(plain)
        model.compile(backend="spcompile", options={"mesh": mesh, "compiler": "eager"})
        own = x.chunk(2)[dist.get_rank()]
        with torch._dynamo.config.patch(recompile_limit=2):
            for weight in (0.5, 0.25):
                want, have = plain(x, weight), model(own, weight)
                want.backward()
                have.backward()
                errors = compare_parameters(plain, model)
                assert max(errors.values()) <= EXACT, errors
            return refusal(lambda: model(own, 0.125))


def strict() -> str:
    model = Averaged()
    model.compile(backend="spcompile", options={"compiler": "eager", "strict": True})
    return forced(model, lambda: refusal(lambda: model(torch.ones(2, 8, pm.WIDTH))))


def compiled_over_cp() -> tuple[Any, Tensor]:
    model = Averaged()
    model.compile(backend="spcompile", options={"compiler": "eager"})
    x = torch.ones(2, 8, pm.WIDTH)
    model(x)
    return model, x


def forced_on_one_rank() -> str:
    model, x = compiled_over_cp()
    with torch.compiler.set_stance("force_eager" if dist.get_rank() else "default"):
        return refusal(lambda: model(x))


def fails_on_one_rank() -> str:
    """Before there is anything to compare."""
    model, x = compiled_over_cp()
    with torch.compiler.set_stance("fail_on_recompile" if dist.get_rank() else "default"):
        return refusal(lambda: model(x[:, :5]))


def other_batches() -> str:
    model, x = compiled_over_cp()
    return forced(model, lambda: refusal(lambda: model(x * dist.get_rank())))


class Dropped(Averaged):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.5)


def other_seeds() -> str:
    model = Dropped()
    model.compile(backend="spcompile", options={"compiler": "eager"})
    torch.manual_seed(dist.get_rank())
    model.forward = torch.compiler.disable(model.forward)  # type: ignore[method-assign]
    return refusal(lambda: model(torch.ones(2, 8, pm.WIDTH)))


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        (skipped_by_rule, ["SP305", "TransformerEncoder on dp=2", "fullgraph=True"]),
        (another_model_beyond_the_limit, ["SP305", "Averaged on dp=2", "recompile_limit"]),
        (numbers_that_change, ["SP305", "Weighted on dp=2", "recompile_limit", "tensors for numbers"]),
        (strict, ["SP401", "SPR403 Averaged ran uncompiled"]),
        (forced_on_one_rank, ["SP201", "rank 0: runs call 2 of", "rank 1: runs Averaged uncompiled"]),
        (fails_on_one_rank, ["SP201", "rank 1: stopped with RuntimeError Detected recompile", "rank 0: went on"]),
        (other_batches, ["SP201", "runs Averaged uncompiled", "values of input 0", "num_replicas"]),
        (other_seeds, ["SP201", "random state", "seed 0", "seed 1"]),
    ],
)
@pytest.mark.thinned(20)
def test_what_plain_code_may_not_do(worker_pool: PoolOf, mistake: Callable[[], str], words: list[str]) -> None:
    text = same_text(worker_pool(2).run(mistake, timeout=SECONDS))
    assert all(word in text for word in words), text
