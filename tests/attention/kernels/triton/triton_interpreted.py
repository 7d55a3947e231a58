"""The Triton kernels on CPU tensors against `naive` in float64; `test_kernel_triton.py` runs this file.

TRITON_INTERPRET must be set before triton is imported, and must not be for other tests: so this runs in a process of
its own. Deterministic mode fills every new tensor with NaN, so an element that no kernel writes shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton.language as tl
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder
from triton_cases import ROUNDINGS, TILES, Case, check

from spcompile.attention.kernels import hop_state, naive, table_op  # noqa: F401  (the last defines spx::tile_tables)
from spcompile.attention.kernels.triton import configs as config_table
from spcompile.attention.kernels.triton.configs import Config, Configs
from spcompile.attention.kernels.triton.hop_provider import Triton
from spcompile.attention.ring.ring import Ring, ring_backward, ring_forward
from spcompile.attention.scores.mask import AttentionMask
from spcompile.attention.scores.provider import Rows, Scores
from spcompile.attention.scores.runs import Run, natural_runs
from spcompile.collectives.point_to_point import drive_all
from spcompile.machine import sequence


@pytest.fixture(autouse=True)
def right_dot(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter (3.7) holds bfloat16 as bits in uint16, and its dot multiplies those: widen operands first."""
    dot = InterpreterBuilder.create_dot

    def wide_dot(builder: InterpreterBuilder, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (builder.cast_impl(x, tl.float32) for x in (a, b))
        return dot(builder, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", wide_dot)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


PLAIN = Case(torch.float32, AttentionMask(), B=1, G=1, group=2, S=33, T=40, H=16, V=16)
MASKS = [
    "full",
    "causal",
    "causal offset=3",
    "causal offset=-2",
    "causal window=5",
    "window=9 window_right=3",
    "causal chunk=12",
    "causal prefix=19",
    "causal documents",
    "documents key_padding",
    "causal key_padding window=17",
]


@pytest.mark.thinned(10)
@pytest.mark.parametrize("order", ["natural", "shuffled"])
@pytest.mark.parametrize("text", MASKS)
def test_masks(text: str, order: str) -> None:
    B = 2 if "documents" in text or "key_padding" in text else 1
    check(replace(PLAIN, mask=AttentionMask.parse(text), order=order, hops=2, B=B, seed=len(text)))


@pytest.mark.thinned(10)
@pytest.mark.parametrize("dtype", ROUNDINGS, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1), (63, 63, 16, 64), (17, 90, 40, 24), (70, 5, 24, 40)],
    ids=lambda shape: "-".join(map(str, shape)),
)
def test_shapes(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    S, T, H, V = shape
    check(replace(PLAIN, dtype=dtype, mask=AttentionMask(causal=True), S=S, T=T, H=H, V=V))


@pytest.mark.thinned(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_descriptors(dtype: torch.dtype) -> None:
    check(replace(PLAIN, dtype=dtype, mask=AttentionMask(causal=True), S=50, T=63, H=24, V=40, hops=2, described=True))


FEATURES = {
    "softcap": {"softcap": 0.7},
    "alibi": {"alibi": True},
    "sinks": {"sinks": True},
    "dropout": {"dropout": 0.25},
    "much dropout": {"dropout": 0.6},
    "bias": {"bias": "added"},
    "bias of all heads": {"bias": "added", "bias_shape": (True, False, True)},
    "bias of all entries": {"bias": "added", "bias_shape": (False, True, True)},
    "bias of all rows": {"bias": "added", "bias_shape": (False, True, False)},
    "kept": {"bias": "kept", "bias_shape": (True, False, True)},
    "rounded": {"mask": AttentionMask.parse("causal documents rounded_by=-1e+30"), "order": "shuffled", "B": 2},
    "rounded behind a cap": {
        "mask": AttentionMask.parse("causal documents rounded_by=-3.4028234663852886e+38"),
        "B": 2,
        "softcap": 0.7,
    },
    "filled": {"mask": AttentionMask.parse("causal documents fill=-1e+30"), "order": "shuffled", "B": 2},
    "filled with a bias": {
        "mask": AttentionMask.parse("causal window=9 documents fill=-3.4028234663852886e+38"),
        "B": 2,
        "bias": "added",
        "softcap": 0.7,
        "dropout": 0.25,
    },
    "rounded and kept": {"mask": AttentionMask.parse("rounded_by=-1e+30"), "bias": "kept", "dropout": 0.25},
    "rounded with biases": {"mask": AttentionMask.parse("rounded_by=-1e+30"), "bias": "added", "alibi": True},
}


@pytest.mark.thinned(10)
@pytest.mark.parametrize("name", FEATURES)
def test_features(name: str) -> None:
    case = {"mask": AttentionMask(causal=True), "order": "padded", "B": 2 if "bias" in name else 1, **FEATURES[name]}
    check(replace(PLAIN, hops=2, **case))


@pytest.mark.manual
def test_everything_at_once() -> None:
    check(
        replace(
            PLAIN, mask=AttentionMask.parse("causal window=20 documents key_padding"), B=2, G=2, hops=3, order="padded",
            bias="added", bias_shape=(False, True, True), softcap=2.0, alibi=True, sinks=True, dropout=0.3,
        )
    )  # fmt: skip


def test_rows_without_keys_are_zero_and_so_are_their_gradients() -> None:
    """Exactly, in the outputs that were NaN before: one sequence without a valid key, beside one with all of them."""
    q, k, v, grad_out = (torch.randn(2, 2, 20, 16) for _ in range(4))
    valid = torch.tensor([[False], [True]]).expand(2, 20)
    scores, tiles = Scores(AttentionMask(key_padding=True), 0.3, key_valid=valid), TILES[0]
    provider = Triton(lambda *_: Configs(tiles, tiles, tiles, tiles))
    hop = k, v, natural_runs(20), natural_runs(20)
    state = provider.start_forward(q, v, scores)
    state.add(*hop, last=True)
    out, lse = state.result()
    gradients, _ = provider.backward(Rows(q, out, grad_out, lse, None), *hop, scores, False)
    assert bool((lse[0] == -torch.inf).all())
    assert all(bool((x[0] == 0).all()) and bool(x[1].isfinite().all()) for x in (out, *gradients))


@pytest.mark.thinned(2)
@pytest.mark.parametrize("text", ["causal documents key_padding", "documents window=30"])
def test_a_ring_reads_the_tables_that_were_made_for_all_its_hops(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 kernels against block providers in float64, on every rank; scattered padding makes many segments."""
    for key in config_table.TABLE:
        monkeypatch.setitem(config_table.TABLE, key, Configs(*TILES, TILES[0]))
    mask, ring, random = AttentionMask.parse(text), Ring(75, 75, 2, "zigzag"), torch.Generator().manual_seed(0)
    ids = torch.randint(0, 3, (2, 75), generator=random).sort(-1).values + 2**40
    valid = torch.rand(2, 75, generator=random) > 0.3 if mask.key_padding else None
    data = {"q_documents": ids, "k_documents": ids, "key_valid": valid}
    shapes = ((2, 2, 38, 16), (2, 1, 38, 16), (2, 1, 38, 16), (2, 2, 38, 16))
    parts = [[torch.randn(shape, generator=random) for shape in shapes] for _ in range(2)]

    def results(dtype: torch.dtype) -> list[tuple[Tensor, ...]]:
        forward, backward = [], []
        for rank, (q, k, v, grad_out) in enumerate(parts):
            q, k, v, grad_out = (x.to(dtype) for x in (q, k, v, grad_out))
            at = sequence.positions(75, rank, 2, "zigzag")
            layout = (75, 75, 2, "zigzag", 1, 4, 16, 16, "rich")
            tables = torch.ops.spx.tile_tables(at, None, ids, ids, valid, text, *layout)
            scores = Scores(mask, 0.3, **data, tables=tables)
            forward.append(ring_forward(q, k, v, scores, ring, rank))
            backward.append((q, k, v, grad_out, scores))
        outs = drive_all(forward)
        grads = drive_all(
            [
                ring_backward(Rows(q, out, grad_out, lse, None), k, v, scores, ring, rank, False)
                for rank, ((q, k, v, grad_out, scores), (out, lse)) in enumerate(zip(backward, outs, strict=True))
            ]
        )
        return [(*out, *grad[:3]) for out, grad in zip(outs, grads, strict=True)]

    expected = results(torch.float64)
    monkeypatch.setattr(hop_state, "_whole_hops", lambda *_: Triton())
    for rank, found in enumerate(results(torch.float32)):
        for a, b in zip(found, expected[rank], strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.manual
def test_the_backward_is_deterministic() -> None:
    """Twice the same bits, with keys that several heads share, and over hops."""
    q, grad_out = (torch.randn(1, 4, 40, 16).bfloat16() for _ in range(2))
    k, v = (torch.randn(1, 1, 40, 16).bfloat16() for _ in range(2))
    scores, tiles = Scores(AttentionMask.parse("causal window=17"), 0.3), TILES[1]
    provider = Triton(lambda *_: Configs(tiles, tiles, tiles, tiles))
    hops = [(k[:, :, a:b], v[:, :, a:b], natural_runs(40), (Run(0, 20, a, b - 1),)) for a, b in ((0, 20), (20, 40))]
    found = []
    for _ in range(2):
        state = provider.start_forward(q, v, scores)
        for hop in hops:
            state.add(*hop, last=hop is hops[-1])
        out, lse = state.result()
        gradients = provider.start_backward(Rows(q, out, grad_out, lse, None), v, scores, False)
        keys = [x for hop in hops for x in gradients.add(*hop, last=hop is hops[-1])]
        found.append([out, lse, gradients.result()[0], *keys])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.manual
def test_error_does_not_grow_with_hops() -> None:
    """Root mean square error of bfloat16 against float64, for the same attention in more and more hops."""
    B, N, G, S, H = 1, 2, 1, 128, 32
    shapes = ((N, S), (G, S), (G, S), (N, S))
    q, k, v, grad_out = (torch.randn(B, n, s, H).bfloat16() for n, s in shapes)
    wide, scale = [x.double() for x in (q, k, v)], H**-0.5
    keep = AttentionMask(causal=True).allowed(torch.arange(S), torch.arange(S))
    exact, exact_lse = naive.forward(*wide, scale, keep)
    delta = (exact * grad_out.double()).sum(-1)
    exacts = [exact, *naive.backward(*wide, grad_out.double(), exact_lse, delta, scale, keep)[:3]]
    tiles = Config(32, 16, 4, 1)  # of no more keys than a hop has, so that only the hops differ
    provider, scores = Triton(lambda *_: Configs(tiles, tiles, tiles, tiles)), Scores(AttentionMask(causal=True), scale)
    table = {}
    for hops in (1, 2, 4, 8):
        part = S // hops
        steps = [
            (k[:, :, i : i + part], v[:, :, i : i + part], natural_runs(S), (Run(0, part, i, i + part - 1),))
            for i in range(0, S, part)
        ]
        state = provider.start_forward(q, v, scores)
        for step in steps:
            state.add(*step, last=step is steps[-1])
        out, lse = state.result()
        gradients = provider.start_backward(Rows(q, out, grad_out, lse, None), v, scores, False)
        dk, dv = (
            torch.cat(x, 2).bfloat16()  # as a ring rounds them, once
            for x in zip(*(gradients.add(*step, last=step is steps[-1]) for step in steps), strict=True)
        )
        found = (out, gradients.result()[0], dk, dv)
        table[hops] = [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exacts, strict=True)]
        print(hops, *(f"{error:.3e}" for error in table[hops]))
    for errors in table.values():
        assert all(error <= 1.1 * alone for error, alone in zip(errors, table[1], strict=True))


masks = st.builds(
    AttentionMask,
    causal=st.just(True),
    offset=st.integers(-5, 5),
    window=st.none() | st.integers(1, 40),
    chunk=st.none() | st.integers(1, 40),
    prefix=st.none() | st.integers(1, 40),
    documents=st.booleans(),
    key_padding=st.booleans(),
) | st.builds(
    AttentionMask,
    window=st.none() | st.integers(1, 40),
    window_right=st.none() | st.integers(1, 40),
    chunk=st.none() | st.integers(1, 40),
    documents=st.booleans(),
    key_padding=st.booleans(),
)
lengths = st.sampled_from([1, 2, 15, 16, 17, 31, 48, 63])
cases = st.builds(
    Case,
    dtype=st.sampled_from(list(ROUNDINGS)),
    mask=masks,
    B=st.integers(1, 2),
    G=st.integers(1, 2),
    group=st.integers(1, 3),
    S=lengths,
    T=lengths,
    H=st.sampled_from([1, 8, 16, 24, 40, 64]),
    V=st.sampled_from([1, 8, 16, 24, 40, 64]),
    hops=st.integers(1, 3),
    order=st.sampled_from(["natural", "shuffled", "padded"]),
    bias=st.sampled_from(["none", "none", "added", "kept"]),
    bias_shape=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    softcap=st.sampled_from([0.0, 0.0, 0.5, 20.0]),
    alibi=st.booleans(),
    sinks=st.booleans(),
    dropout=st.sampled_from([0.0, 0.0, 0.1, 0.7]),
    tiles=st.sampled_from(TILES),
    described=st.booleans(),
    seed=st.integers(0, 1000),
)
quiet = settings(  # shrinking would take the interpreter many minutes
    derandomize=True, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)


@pytest.mark.manual
@settings(quiet, max_examples=12)
@given(case=cases)
def test_drawn(case: Case) -> None:
    check(case)


@pytest.mark.manual
@settings(quiet, max_examples=400)
@given(case=cases)
def test_drawn_at_length(case: Case) -> None:
    check(case)


@pytest.mark.manual
@pytest.mark.parametrize("dtype", ROUNDINGS, ids=str)
@pytest.mark.parametrize("text", ["causal", "causal window=130 documents", "full"])
def test_long(text: str, dtype: torch.dtype) -> None:
    tiles = Config(64, 64, 4, 1)
    check(replace(PLAIN, dtype=dtype, mask=AttentionMask.parse(text), S=1000, T=1000, H=128, V=96, hops=2, tiles=tiles))
