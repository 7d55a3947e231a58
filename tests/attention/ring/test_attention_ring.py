"""Ring attention with all ranks in one process, against dense attention over the whole sequence in plain torch."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from ring_requests import noted
from torch import Tensor

from spcompile.attention.kernels import hop_state
from spcompile.attention.op import spec_ring_attention, spec_ring_attention_backward
from spcompile.attention.ring.ring import (
    Ring,
    backward_bytes,
    forward_bytes,
    message_numbers,
    ring_backward,
    ring_forward,
)
from spcompile.attention.scores.mask import AttentionMask, Kind
from spcompile.attention.scores.provider import Rows, Scores
from spcompile.collectives.point_to_point import Requests, RingDeadlock, Shift, Wait, drive_all
from spcompile.diagnostics import IllegalOption
from spcompile.machine import sequence

SCALE = 0.37
MASKS = [
    "full",
    "causal",
    "causal offset=2",
    "causal window=9",
    "window=4 window_right=6",
    "causal chunk=10",
    "causal prefix=5",
    "causal documents",
    "documents key_padding",
    "causal key_padding",
]
LENGTHS = [1, 7, 63, 64, 65]


@dataclass
class Problem:
    """Global inputs [2, 4, S, 6], [2, 2, T, 6], [2, 2, T, V] in float64, and the gradients of both results."""

    inputs: list[Tensor]
    mask: AttentionMask
    q_documents: Tensor | None
    k_documents: Tensor | None
    key_valid: Tensor | None
    bias: Tensor | None
    grad_out: Tensor
    grad_lse: Tensor


def make_problem(text: str, S: int, T: int, V: int = 6, bias: str | None = None) -> Problem:
    torch.manual_seed(S + T)
    mask = AttentionMask.parse(text)
    inputs = [torch.randn(2, n, s, d, dtype=torch.float64) for n, s, d in ((4, S, 6), (2, T, 6), (2, T, V))]
    documents = [torch.randint(0, 4, (2, n)).sort(-1).values if mask.documents else None for n in (S, T)]
    key_valid = torch.rand(2, T) > 0.3 if mask.key_padding else None
    dense = None
    if bias is not None:
        dense = torch.randn(1, 4, S, T, dtype=torch.float64) if bias == "float" else torch.rand(2, 1, S, T) > 0.3
    grads = torch.randn(2, 4, S, V, dtype=torch.float64), torch.randn(2, 4, S, dtype=torch.float64)
    return Problem(inputs, mask, *documents, key_valid, dense, *grads)


def oracle(problem: Problem) -> tuple[Tensor, ...]:
    """out, lse, dq, dk, dv(, dbias) by torch's autograd; rows without keys count as zero."""
    leaves = [x.clone().requires_grad_() for x in problem.inputs]
    q, k, v = leaves[0], *(x.repeat_interleave(2, 1) for x in leaves[1:])
    positions = [torch.arange(x.shape[2]) for x in (q, k)]
    keep = problem.mask.allowed(*positions, problem.q_documents, problem.k_documents, problem.key_valid)
    scores = q @ k.mT * SCALE
    if problem.bias is not None and problem.bias.is_floating_point():
        leaves.append(problem.bias.clone().requires_grad_())
        scores = scores + leaves[-1]
    elif problem.bias is not None:
        keep = keep & problem.bias
    empty = ~keep.expand_as(scores).any(-1)
    scores = torch.where(keep | empty[..., None], scores, -torch.inf)
    out, lse = (scores.softmax(-1) @ v).masked_fill(empty[..., None], 0), scores.logsumexp(-1)
    loss = (out * problem.grad_out).sum() + (lse * problem.grad_lse).masked_fill(empty, 0).sum()
    return out.detach(), lse.detach().masked_fill(empty, -torch.inf), *torch.autograd.grad(loss, leaves)


def ring_over(problem: Problem, degree: int, order: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """The same from the simulated ring. The padding of every sharded input is NaN: nothing may read it."""

    def shards(x: Tensor) -> list[Tensor]:
        fill = torch.nan if x.is_floating_point() else True
        return [sequence.take(x, 2, rank, degree, order, fill) for rank in range(degree)]

    q, k, v = (shards(x.to(dtype)) for x in problem.inputs)
    bias = [None] * degree if problem.bias is None else shards(problem.bias)
    lengths = problem.inputs[0].shape[2], problem.inputs[1].shape[2]
    data = problem.q_documents, problem.k_documents, problem.key_valid
    arguments = [
        (q[r], k[r], v[r], *data, bias[r], str(problem.mask), SCALE, *lengths, "cp", degree, order)
        for r in range(degree)
    ]
    results = spec_ring_attention(arguments)
    grad_out, grad_lse = shards(problem.grad_out.to(dtype)), shards(problem.grad_lse)
    backward = spec_ring_attention_backward(
        [
            (grad_out[r], grad_lse[r].masked_fill(results[r][1].isinf(), 0), *results[r], *arguments[r], True)
            for r in range(degree)
        ]
    )
    outputs = [*zip(*results, strict=True)]
    gradients = [*zip(*backward, strict=True)]
    q_length, k_length = lengths
    found = [sequence.restore_all(outputs[i], 2, q_length, order) for i in (0, 1)]
    found += [sequence.restore_all(gradients[i], 2, n, order) for i, n in enumerate((q_length, k_length, k_length))]
    if problem.bias is not None and problem.bias.is_floating_point():
        found.append(sequence.restore_all(gradients[3], 2, q_length, order))
    for rank in range(degree):
        padding = sequence.positions(q_length, rank, degree, order) >= q_length
        for tensor in (results[rank][0], backward[rank][0]):
            assert bool((tensor[:, :, padding] == 0).all())
    return tuple(found)


def check(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=lambda text, i=index: f"result {i}: {text}")


@pytest.mark.thinned(6, covers=["order", "degree", "text"])
@pytest.mark.parametrize("order", sequence.ORDERS)
@pytest.mark.parametrize("degree", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("text", MASKS)
def test_ring(text: str, degree: int, order: str) -> None:
    for length in LENGTHS:
        problem = make_problem(text, length, length)
        check(ring_over(problem, degree, order), oracle(problem))


@pytest.mark.thinned(10, covers=["order"])
@pytest.mark.parametrize("order", sequence.ORDERS)
@pytest.mark.parametrize("bias", [None, "float", "bool"])
@pytest.mark.parametrize("text", MASKS)
def test_ring_cross_lengths_and_bias(text: str, bias: str | None, order: str) -> None:
    for degree in (2, 3):
        for S, T in ((9, 20), (21, 5), (16, 16)):
            problem = make_problem(text, S, T, V=10, bias=bias)
            check(ring_over(problem, degree, order), oracle(problem))


@pytest.mark.parametrize("text", ["causal", "full"])
def test_bf16_error_does_not_grow_with_degree(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Against float64: a table of relative errors, and no ring's is more than a tenth above that of one device."""
    problem = make_problem(text, 128, 128)
    problem.inputs = [x.bfloat16().double() for x in problem.inputs]
    problem.grad_out = problem.grad_out.bfloat16().double()
    problem.grad_lse = torch.zeros_like(problem.grad_lse)
    expected = oracle(problem)
    columns = ("out", "lse", "dq", "dk", "dv")
    lines = [f"{text:>8}" + "".join(f"{name:>12}" for name in columns)]
    errors: dict[int, list[float]] = {}
    for degree in (1, 2, 4, 8, 16):
        found = ring_over(problem, degree, "zigzag", torch.bfloat16)
        errors[degree] = [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]
        lines.append(f"n = {degree:4d}" + "".join(f"{error:12.3e}" for error in errors[degree]))
    with capsys.disabled():
        print("", *lines, sep="\n")
    assert all(ring <= 1.1 * alone for row in errors.values() for ring, alone in zip(row, errors[1], strict=True))


@pytest.mark.parametrize("order", sequence.ORDERS)
@pytest.mark.parametrize("text", ["full", "causal", "causal window=9", "causal window=1", "causal chunk=16"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_bytes_on_the_wire(dtype: torch.dtype, text: str, order: str) -> None:
    ring, mask = Ring(64, 64, 4, order), AttentionMask.parse(text)
    q, k, v = (torch.zeros(2, n, 16, d, dtype=dtype) for n, d in ((4, 6), (2, 6), (2, 10)))
    sizes = (message_numbers(2, 2, 16, 6, 10), len(ring.distances(mask)), dtype.itemsize)
    sent: list[list[Shift]] = [[] for _ in range(4)]
    results = drive_all([noted(ring_forward(q, k, v, Scores(mask, 1.0), ring, r), sent[r]) for r in range(4)])
    assert [sum(shift.message.nbytes for shift in shifts) for shifts in sent] == [forward_bytes(*sizes)] * 4
    assert [len(shifts) for shifts in sent] == [len(ring.distances(mask))] * 4
    sent = [[] for _ in range(4)]
    rows = [Rows(q, out, torch.zeros_like(out), lse, None) for out, lse in results]
    drive_all([noted(ring_backward(rows[r], k, v, Scores(mask, 1.0), ring, r, False), sent[r]) for r in range(4)])
    assert [sum(shift.message.nbytes for shift in shifts) for shifts in sent] == [backward_bytes(*sizes)] * 4


@pytest.mark.parametrize(
    ("text", "distances"),
    [
        ("full", (1, 2, 3, 4, 5, 6, 7)),
        ("causal", (1, 2, 3, 4, 5, 6, 7)),
        ("causal window=2", (1,)),
        ("causal window=9", (1,)),
        ("causal window=10", (1, 2)),
        ("causal chunk=8", ()),
        ("causal chunk=16", (1,)),
        ("window=9 window_right=9", (1, 7)),  # both neighbours, and nobody between
        ("window=10 window_right=3", (1, 2, 7)),
    ],
)
def test_only_hops_the_mask_needs(text: str, distances: tuple[int, ...]) -> None:
    assert Ring(64, 64, 8, "contiguous").distances(AttentionMask.parse(text)) == distances


@pytest.mark.parametrize("order", sequence.ORDERS)
@pytest.mark.parametrize("text", MASKS)
def test_hops_are_those_with_a_block_that_is_not_empty(text: str, order: str) -> None:
    """By looking at every pair of ranks."""
    mask = AttentionMask.parse(text)
    for degree, inner, q_length, k_length in (
        (8, 1, 64, 64),
        (5, 1, 61, 61),
        (4, 2, 60, 60),
        (3, 1, 9, 20),
        (4, 1, 21, 5),
    ):
        ring = Ring(q_length, k_length, degree, order, inner)
        expected = {
            (q_rank - k_rank) % degree
            for q_rank in range(degree)
            for k_rank in range(degree)
            for q in ring.q_runs(q_rank)
            for k in ring.k_runs(k_rank)
            if mask.classify(q.first, q.last, k.first, k.last) is not Kind.EMPTY
        }
        assert ring.distances(mask) == tuple(sorted(expected - {0}))


@pytest.mark.parametrize("text", ["window=9 window_right=9", "window=3 window_right=12", "causal window=10"])
def test_keys_jump_over_ranks_that_see_nothing_of_them(text: str) -> None:
    for length in (64, 61):
        problem = make_problem(text, length, length)
        check(ring_over(problem, 8, "contiguous"), oracle(problem))


def test_the_next_keys_are_on_their_way_while_a_block_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """And at most two messages of keys are alive: a ring's memory does not grow with its ranks."""
    degree, log = 8, []
    ring, mask = Ring(64, 64, degree, "contiguous"), AttentionMask()
    q, k, v = (torch.zeros(1, 2, 8, 4) for _ in range(3))
    start = hop_state.start_forward

    def started(*args: Any) -> Any:
        state = start(*args)
        monkeypatch.setattr(state, "add", lambda *a, add=state.add, **more: (log.append("block"), add(*a, **more))[1])
        return state

    monkeypatch.setattr(hop_state, "start_forward", started)
    requests = ring_forward(q, k, v, Scores(mask, 1.0), ring, 0)
    alive: list[weakref.ref[Tensor]] = []
    most, answer = 0, None
    while True:
        try:
            request = requests.send(answer)
        except StopIteration:
            break
        log.append(type(request).__name__)
        answer = request.message.clone() if isinstance(request, Shift) else request.handle
        if isinstance(request, Shift):
            alive.append(weakref.ref(answer))
        del request
        most = max(most, sum(message() is not None for message in alive))
    assert log == ["Shift", "block", "Wait"] * (degree - 1) + ["block"]
    assert most <= 2


def test_wrong_local_length_is_refused() -> None:
    q = torch.zeros(1, 1, 5, 2)
    with pytest.raises(IllegalOption):
        spec_ring_attention([(q, q, q, None, None, None, None, "full", 1.0, 8, 8, "cp", 2, "zigzag")] * 2)


def test_simulator_finds_broken_rings() -> None:
    message = torch.ones(2)

    def waits_for_nobody(rank: int) -> Requests[None]:
        if rank == 0:
            handle = yield Shift(message)
            yield Wait(handle)

    def overwrites(rank: int) -> Requests[None]:
        mine = torch.ones(2)
        handle = yield Shift(mine)
        mine.zero_()
        yield Wait(handle)

    def differs(rank: int) -> Requests[None]:
        yield Wait((yield Shift(message, distance=1 + rank)))

    def reads_early(rank: int) -> Requests[Tensor]:
        handle = yield Shift(message)
        early = handle.received.clone()
        yield Wait(handle)
        return early

    for broken in (waits_for_nobody, overwrites, differs):
        with pytest.raises(RingDeadlock):
            drive_all([broken(rank) for rank in range(2)])
    assert all(bool(early.isnan().all()) for early in drive_all([reads_early(rank) for rank in range(2)]))
