"""Every collective on two real processes (gloo) against its spec: results, gradients, strides, opcheck; one program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from functorch.compile import aot_function, make_boxed_func
from worker_pool import WorkerPool

from spcompile.collectives import COLLECTIVES, GRADIENT, Call, Collective
from spcompile.diagnostics import Remarks
from spcompile.graph.axes import bind_axes
from spcompile.machine.mesh import MeshShape
from spcompile.options import Options
from spcompile.passes.schedule.lower_collectives import LowerCollectives
from spcompile.passes_api import Context

spx = torch.ops.spx
DEGREE = 2
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
INT_DTYPES = (torch.int64, torch.bool)


def cases() -> dict[str, tuple[Collective, Call]]:
    return {
        f"{collective.name}-{length}-{i}": (collective, call)
        for collective in COLLECTIVES.values()
        for length in (5, 8, 1)
        for i, call in enumerate(collective.examples(length, DEGREE))
    }


def denoting(state: str, shape: Any, dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    """Small whole numbers, so that sums are exact in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randint(-9, 9, tuple(shape), generator=generator).to(dtype) for _ in range(DEGREE)]
    return [parts[0].clone() for _ in parts] if state in "IR" else parts


def transposed(state: str, call: Call) -> list[torch.Tensor]:
    """Operands whose memory is not row-major."""
    dims = tuple(range(len(call.shape)))[::-1]
    return [x.permute(dims) for x in denoting(state, call.shape[::-1], torch.float64, seed=1)]


def plain(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer over all positions and the mean of its squares."""
    h = torch.tanh(x @ w)
    return (h * h).mean(), h


def sharded(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with the positions of x [2, length, 3] over two ranks."""
    length = x.shape[1]
    h = torch.tanh(spx.shard(x, 1, "cp", 2, "zigzag", 7.0) @ spx.vary(w, "cp", 2))
    squares = spx.mask_padding(h * h, 1, length, "cp", 2, "zigzag", 0.0).sum()
    loss = spx.all_reduce(squares, "cp", 2, "I") / (2 * length * 4)
    return loss, spx.all_gather(h, 1, length, "cp", 2, "zigzag", "I")


def loss_and_gradients(function: Callable[..., Any], length: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((2, length, 3), (3, 4), (2, length, 4))
    x, w, h_grad = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes)
    x.requires_grad_()
    w.requires_grad_()
    loss, h = function(x, w)
    torch.autograd.backward([loss, h], [torch.ones_like(loss), h_grad])
    return [value.detach() for value in (loss, h, x.grad, w.grad)]


def compiled(group: str, dynamic: bool) -> Callable[..., Any]:
    """The sharded program as a backend emits it: differentiated, lowered, bound to this process's group."""

    def finish(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        LowerCollectives().run(gm, Context(MeshShape.of({"cp": DEGREE}), Options(), Remarks()))
        bind_axes(gm.graph, {"cp": group})
        gm.recompile()
        return make_boxed_func(gm.forward)

    return aot_function(sharded, fw_compiler=finish, bw_compiler=finish, dynamic=dynamic)


def run_rank(checked: set[str]) -> dict[str, Any]:
    """This rank's result and gradient of every case; those in `checked` with torch's opcheck."""
    rank, group = dist.get_rank(), dist.group.WORLD.group_name  # type: ignore[union-attr]
    found: dict[str, Any] = {}
    for name, (collective, call) in cases().items():
        arguments = {**call.arguments, "axis": group}
        src, dst = collective.signature(arguments)
        for dtype in DTYPES:
            x = denoting(src, call.shape, dtype, seed=1)[rank].requires_grad_()
            y = collective.op(x, **arguments)
            (grad,) = torch.autograd.grad(y, x, denoting(GRADIENT[dst], y.shape, dtype, seed=2)[rank])
            found[f"{name}-{dtype}"] = (y.detach(), y.stride(), grad, grad.stride())
        if src != "P":
            for dtype in INT_DTYPES:
                y = collective.op(denoting(src, call.shape, dtype, seed=1)[rank], **arguments)
                found[f"{name}-{dtype}"] = (y, y.stride())
        strided = transposed(src, call)[rank]
        y = collective.op(strided, **arguments)
        found[f"{name}-strided"] = (y, y.stride())
        if name in checked:
            x = denoting(src, call.shape, torch.float64, seed=1)[rank].requires_grad_()
            found[f"{name}-opcheck"] = torch.library.opcheck(collective.op, (x,), arguments, raise_exception=False)
    for dynamic in (False, True):
        for length in (5, 8):
            found[f"program-{dynamic}-{length}"] = loss_and_gradients(compiled(group, dynamic), length)
    return found


@pytest.fixture(scope="module")
def ranks(worker_pool: Callable[[int], WorkerPool], request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """One run of all cases, which serves all tests; what only `test_opcheck` needs is done for its cases of today."""
    checks = [item for item in request.session.items if item.function is test_opcheck]  # type: ignore[attr-defined]
    return worker_pool(DEGREE).run(run_rank, {item.callspec.params["name"] for item in checks})  # type: ignore[attr-defined]


def contiguous_strides(x: torch.Tensor) -> tuple[int, ...]:
    return torch.empty(x.shape).stride()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", cases())
def test_result_and_gradient(ranks: list[dict[str, Any]], name: str, dtype: torch.dtype) -> None:
    collective, call = cases()[name]
    src, dst = collective.signature(call.arguments)
    xs = denoting(src, call.shape, dtype, seed=1)
    expected = collective.spec(xs, **call.arguments)
    dual = collective.dual(xs[0], **call.arguments)
    gs = denoting(GRADIENT[dst], expected[0].shape, dtype, seed=2)
    expected_grad = COLLECTIVES[dual.op].spec(gs, **dual.arguments)
    for rank in range(DEGREE):
        y, y_stride, grad, grad_stride = ranks[rank][f"{name}-{dtype}"]
        assert torch.equal(y, expected[rank])
        assert torch.equal(grad, expected_grad[rank])
        assert (y_stride, grad_stride) == (contiguous_strides(y), contiguous_strides(grad))


@pytest.mark.parametrize("dtype", INT_DTYPES)
@pytest.mark.parametrize("name", [name for name, (c, call) in cases().items() if c.signature(call.arguments)[0] != "P"])
def test_numbers_without_gradient(ranks: list[dict[str, Any]], name: str, dtype: torch.dtype) -> None:
    collective, call = cases()[name]
    xs = denoting(collective.signature(call.arguments)[0], call.shape, dtype, seed=1)
    for rank, expected in enumerate(collective.spec(xs, **call.arguments)):
        y, stride = ranks[rank][f"{name}-{dtype}"]
        assert torch.equal(y, expected)
        assert stride == contiguous_strides(y)


@pytest.mark.parametrize("name", cases())
def test_operand_in_other_memory_order(ranks: list[dict[str, Any]], name: str) -> None:
    collective, call = cases()[name]
    parts = transposed(collective.signature(call.arguments)[0], call)
    for rank, expected in enumerate(collective.spec(parts, **call.arguments)):
        y, stride = ranks[rank][f"{name}-strided"]
        assert torch.equal(y, expected)
        assert stride == contiguous_strides(y)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("name", [name for name in cases() if "-5-" in name])
def test_opcheck(ranks: list[dict[str, Any]], name: str) -> None:
    for rank in range(DEGREE):
        assert set(ranks[rank][f"{name}-opcheck"].values()) == {"SUCCESS"}, ranks[rank][f"{name}-opcheck"]


@pytest.mark.parametrize("length", [5, 8])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_lowered_program_computes_what_one_device_computes(
    ranks: list[dict[str, Any]], dynamic: bool, length: int
) -> None:
    expected = loss_and_gradients(plain, length)
    for rank in range(DEGREE):
        for ours, theirs in zip(ranks[rank][f"program-{dynamic}-{length}"], expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
