"""Option `memory`: what is made again changes bytes and seconds, never a number.

B batch, S sequence, D width, N heads, H head width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from memory_models import D, Decoder
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import spcompile
from spcompile.graph.storage import root_of
from spcompile.memory.account import saved_bytes
from spcompile.memory.planner import ROOM
from spcompile.program.observed import observed
from spcompile.schedule.saved_bytes import saved_activation_bytes

S = 101
LONG = 401  # where activations outweigh gradients, which travel in buckets that no plan counts


def memory_of(model: nn.Module, mesh: Mapping[str, int], *, length: int = S, **options: Any) -> Any:
    return spcompile.explain(model, (torch.randn(1, length, D, dtype=torch.float64),), mesh, **options).memory


@pytest.mark.parametrize(
    ("mesh", "attention"),
    [({"cp": 2}, "ring"), ({"cp": 2}, "ulysses"), ({"tp": 2}, "ring"), ({"tp": 2, "cp": 2}, "ulysses")],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)
@pytest.mark.parametrize("kind", ["plain", "dropout", "checkpointed"])
@pytest.mark.thinned(30)
def test_numbers_stay_what_they_are(mesh: dict[str, int], attention: str, kind: str) -> None:
    torch.manual_seed(0)
    model = Decoder(p=0.2 if kind == "dropout" else 0.0, again=kind == "checkpointed").double()
    options: dict[str, Any] = {"attention": attention} if "cp" in mesh else {}
    if kind != "checkpointed":
        speed, least = (memory_of(model, mesh, memory=memory, **options) for memory in ("speed", "min"))
        on_device = memory_of(model, mesh, memory="min", host_memory=0, **options)
        assert on_device.saved_activation_bytes < 0.6 * speed.saved_activation_bytes
        assert least.peak_bytes < speed.peak_bytes
        assert ROOM * least.peak_bytes <= on_device.peak_bytes  # the host is one lever more
        assert least.actions
    report = spcompile.verify(model, (torch.randn(1, S, D, dtype=torch.float64),), mesh, memory="min", **options)
    assert report.ok, report


@pytest.mark.thinned(10)
def test_a_budget_is_kept_and_the_plan_says_how() -> None:
    model = Decoder().double()
    speed, least = (memory_of(model, {"cp": 2}, length=LONG, memory=memory) for memory in ("speed", "min"))
    budget = int(speed.total_bytes + least.total_bytes) // 2
    plan = spcompile.explain(model, (torch.randn(1, LONG, D, dtype=torch.float64),), {"cp": 2}, memory=budget)
    assert plan.memory.fits
    assert plan.memory.total_bytes <= budget
    assert plan.memory.budget_bytes == budget
    assert "SPR601" in [remark.code for remark in plan.remarks]
    assert "Not saved for backward" in str(plan)
    found = plan.to_dict()["memory"]
    assert found["fits"] is True
    assert {"optimizer_bytes", "transient_bytes", "host_bytes", "budget_bytes", "total_bytes"} <= set(found)
    assert all({"kind", "bytes", "seconds", "source"} <= set(row) for row in found["actions"])


@pytest.mark.thinned(30)
def test_what_does_not_fit_is_said_by_explain_and_refused_by_the_backend() -> None:
    model, x_BSD = Decoder(), torch.randn(1, S, D)
    plan = spcompile.explain(model, (x_BSD,), {"cp": 2}, memory=1000)
    assert not plan.memory.fits
    assert "SPR603" in [remark.code for remark in plan.remarks]
    compiled = torch.compile(model, backend="spcompile", options={"memory": 1000, "compiler": "eager"})
    with pytest.raises(Exception, match="SP106") as refused:
        compiled(x_BSD)
    assert "shard_parameters" in str(refused.value)


@pytest.mark.thinned(5)
def test_what_is_saved_is_what_is_planned() -> None:
    model, x_BSD = Decoder(), torch.randn(1, S, D)
    options = {"memory": "min", "host_memory": 0, "compiler": "eager"}
    compiled = torch.compile(model, backend="spcompile", options=options)
    with observed() as programs:
        compiled(x_BSD).backward()
    ((_, emission),) = programs
    assert saved_activation_bytes(model, lambda: compiled(x_BSD)) == saved_bytes(emission.graphs) + x_BSD.nbytes


@pytest.mark.thinned(6)
@pytest.mark.parametrize("compiler", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_gradients_of_one_device(compiler: str) -> None:
    torch.manual_seed(0)
    model, x_BSD = Decoder(), torch.randn(1, S, D)
    compiled = torch.compile(model, backend="spcompile", options={"memory": "min", "compiler": compiler})
    with observed() as programs:
        compiled(x_BSD).backward()
    assert programs[0][1].memory is not None
    assert programs[0][1].memory.trades
    own = [p.grad for p in model.parameters()]
    model.zero_grad()
    model(x_BSD).backward()
    for p, gradient in zip(model.parameters(), own, strict=True):
        torch.testing.assert_close(gradient, p.grad, rtol=1e-5, atol=1e-6)


class Residual(nn.Module):
    """x + W2 gelu(W1 x). `again`: checkpointed by the model itself."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)
        self.again = again

    def block(self, x_BSD: Tensor) -> Tensor:
        return x_BSD + self.down(F.gelu(self.up(x_BSD)))

    def forward(self, x_BSD: Tensor) -> Tensor:
        return checkpoint(self.block, x_BSD, use_reentrant=False) if self.again else self.block(x_BSD)


@pytest.mark.parametrize("again", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.thinned(6)
def test_gradients_of_a_deep_model_that_keeps_only_some_inputs_of_blocks(again: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[Residual(again) for _ in range(24)]).double()
    x_BSD = torch.randn(1, 1001, D, dtype=torch.float64)
    options = {"memory": "min", "host_memory": 0, "compiler": "eager"}
    compiled = torch.compile(model, backend="spcompile", options=options)
    with observed() as programs:
        compiled(x_BSD).square().mean().backward()
    plan = programs[0][1].memory
    assert plan is not None
    assert plan.blocks is not None
    saved = {root_of(node) for node in plan.saved}
    assert 2 < sum(root_of(node) in saved for node in plan.blocks.inputs) < 15
    assert saved_bytes(programs[0][1].graphs) < 15 * x_BSD.nbytes
    own = [p.grad for p in model.parameters()]
    model.zero_grad()
    model(x_BSD).square().mean().backward()
    for p, gradient in zip(model.parameters(), own, strict=True):
        torch.testing.assert_close(gradient, p.grad, rtol=1e-10, atol=1e-14)
