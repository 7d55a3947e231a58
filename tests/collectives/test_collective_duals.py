"""Every collective: its dual has the transposed states and is its adjoint, exactly, in float64, in the simulator."""

from __future__ import annotations

import pytest
import torch
import torch.fx as fx

from spcompile.check.simulate import simulate
from spcompile.collectives import COLLECTIVES, GRADIENT, Call, Collective

LENGTHS = ((2, 5), (2, 8), (3, 7), (4, 5), (4, 11), (8, 5), (8, 32))
CASES = [
    pytest.param(collective, call, degree, id=f"{collective.name}-{degree}-{length}-{i}")
    for collective in COLLECTIVES.values()
    for degree, length in LENGTHS
    for i, call in enumerate(collective.examples(length, degree))
]


def one_op(collective: Collective, call: Call) -> fx.GraphModule:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(collective.op, (x,), dict(call.arguments)))
    return fx.GraphModule(torch.nn.Module(), graph)


def denoting(state: str, shape: torch.Size, degree: int, seed: int) -> list[torch.Tensor]:
    """Random values of one state: equal on all ranks for I and R, independent for S and P."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(shape, dtype=torch.float64, generator=generator)
    if state in "IR":
        return [first.clone() for _ in range(degree)]
    return [first, *[torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(degree - 1)]]


def pairing(state: str, values: list[torch.Tensor], gradients: list[torch.Tensor]) -> torch.Tensor:
    """<gradient, value> of the denoted tensors: for I both are one tensor held everywhere, else ranks' terms add up."""
    terms = [(v * g).sum() for v, g in zip(values, gradients, strict=True)]
    return terms[0] if state == "I" else torch.stack(terms).sum()


@pytest.mark.thinned(10)
@pytest.mark.parametrize(("collective", "call", "degree"), CASES)
def test_the_dual_is_the_adjoint(collective: Collective, call: Call, degree: int) -> None:
    src, dst = collective.signature(call.arguments)
    xs = [x.requires_grad_() for x in denoting(src, torch.Size(call.shape), degree, seed=1)]
    ys = simulate(one_op(collective, call), [[x] for x in xs], {"cp": degree})
    gs = denoting(GRADIENT[dst], ys[0].shape, degree, seed=2)
    x_gradients = list(torch.autograd.grad(ys, xs, gs))
    if dst in "IR":
        assert all(torch.equal(y, ys[0]) for y in ys)
    if GRADIENT[src] in "IR":
        assert all(torch.equal(g, x_gradients[0]) for g in x_gradients)
    torch.testing.assert_close(pairing(dst, ys, gs), pairing(src, xs, x_gradients), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("collective", "call", "degree"), CASES)
def test_the_dual_has_the_transposed_states(collective: Collective, call: Call, degree: int) -> None:
    src, dst = collective.signature(call.arguments)
    dual = collective.dual(torch.empty(call.shape), **call.arguments)
    assert COLLECTIVES[dual.op].signature(dual.arguments) == (GRADIENT[dst], GRADIENT[src])


@pytest.mark.thinned(9)
@pytest.mark.parametrize(("collective", "call", "degree"), CASES)
def test_the_fake_has_the_shape_of_the_spec(collective: Collective, call: Call, degree: int) -> None:
    parts = [torch.randn(call.shape) for _ in range(degree)]
    with torch._subclasses.FakeTensorMode() as mode:
        fake = collective.op(mode.from_tensor(parts[0]), **call.arguments)
    results = collective.spec(parts, **call.arguments)
    assert len(results) == degree
    for result in results:
        assert (result.shape, result.stride(), result.dtype) == (fake.shape, fake.stride(), fake.dtype)
        assert all(result.data_ptr() != x.data_ptr() for x in parts)


@pytest.mark.thinned(6)
@pytest.mark.parametrize(("collective", "call", "degree"), CASES)
def test_the_spec_is_pure(collective: Collective, call: Call, degree: int) -> None:
    parts = [torch.randn(call.shape) for _ in range(degree)]
    before = [x.clone() for x in parts]
    collective.spec(parts, **call.arguments)
    assert all(torch.equal(a, b) for a, b in zip(before, parts, strict=True))
