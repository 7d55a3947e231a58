"""Copies to the host and back: what they give, what they refuse, and what the simulator shows of them in flight."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.fx as fx
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from spcompile.check.simulate import simulate
from spcompile.check.verifier import verify_graph
from spcompile.collectives.host_copy import HOST_COPIES, WAIT_COPY
from spcompile.diagnostics import InvalidGraph
from spcompile.graph.storage import root_of
from spcompile.machine.mesh import MeshShape
from spcompile.passes_api import Stage

spx = torch.ops.spx


def there_and_back(x: Tensor) -> Tensor:
    host = spx.wait_copy(spx.to_host(x), x)
    return spx.wait_copy(spx.to_device(host, x.device), host)


@pytest.mark.parametrize("x", [torch.randn(3, 5), torch.randn(3, 5).t(), torch.randn(2, 3, 4).transpose(0, 2)])
def test_what_comes_back_is_what_went_in_memory_of_its_own(x: Tensor) -> None:
    back = there_and_back(x)
    assert torch.equal(back, x)
    assert back.stride() == x.stride()
    assert back.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


def test_the_copies_know_each_other() -> None:
    names = {copy.name: copy for copy in HOST_COPIES.values()}
    assert {copy.dual for copy in names.values()} == set(names)
    for copy in names.values():
        x = torch.randn(4, 3).t()
        found = copy.spec(*((x,) if copy.name == "to_host" else (x, x.device)))
        assert torch.equal(found, x)
        assert found.stride() == x.stride()
        assert found is not x


def traced(function: Callable[..., Tensor], *inputs: Tensor) -> fx.GraphModule:
    gm = make_fx(function, tracing_mode="fake")(*inputs)
    for node in gm.graph.nodes:
        if node.op == "call_function":
            node.meta["spx_origin"] = "a test"
    return gm


def test_nothing_is_there_before_its_wait() -> None:
    def early(x: Tensor) -> Tensor:
        start = spx.to_host(x)
        read = start + 0
        return torch.stack([read, spx.wait_copy(start, x) + 0])

    (found,) = simulate(traced(early, torch.ones(2)), [[torch.ones(2)]], {"cp": 1})
    assert found[0].isnan().all()
    assert torch.equal(found[1], torch.ones(2))


def test_a_wait_shares_the_storage_of_its_start() -> None:
    gm = traced(there_and_back, torch.randn(3))
    waits = gm.graph.find_nodes(op="call_function", target=WAIT_COPY)
    assert all(root_of(wait).target in HOST_COPIES for wait in waits)


def refusal(function: Callable[[Tensor], Tensor]) -> str:
    gm = traced(function, torch.randn(3))
    try:
        verify_graph(gm, Stage.SCHEDULE, MeshShape(()))
    except InvalidGraph as error:
        return str(error)
    return ""


def test_right_graphs_are_right() -> None:
    assert refusal(there_and_back) == ""
    assert refusal(lambda x: spx.wait_copy(spx.to_host(x), x)) == ""


def test_reading_before_the_wait() -> None:
    assert "before its wait" in refusal(lambda x: spx.to_host(x) + 1)


def test_no_wait() -> None:
    def never(x: Tensor) -> Tensor:
        y = x + 1
        spx.to_host(y)
        return y + 1

    gm = traced(never, torch.randn(3))
    start = next(node for node in gm.graph.nodes if node.target in HOST_COPIES)
    assert not start.users
    with pytest.raises(InvalidGraph, match="never waited for"):
        verify_graph(gm, Stage.SCHEDULE, MeshShape(()))


def test_reading_on_the_device_what_went_to_the_host() -> None:
    def late(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x.sin()
        view = y.view(3, 1)
        host = spx.wait_copy(spx.to_host(y), y)
        return host, view + 1

    assert "which is in the host's memory" in refusal(late)


def test_computing_with_what_is_on_the_host() -> None:
    assert "computes with" in refusal(lambda x: spx.wait_copy(spx.to_host(x), x) + 1)

    def reads(x: Tensor) -> Tensor:
        back = spx.wait_copy(spx.to_device(x, x.device), x)
        return back

    assert refusal(reads) == ""
    assert "which is in the host's memory" in refusal(lambda x: (spx.wait_copy(spx.to_host(x), x), x * 2)[1])


def test_waiting_for_another_copy() -> None:
    assert "waits for no copy" in refusal(lambda x: spx.wait_copy(spx.to_host(x), x + 1))
