"""What strategies are predicted to cost: bytes by the papers' formulas, times by the table of links."""

from __future__ import annotations

import pytest

from spcompile.attention.scores.mask import AttentionMask
from spcompile.attention.strategy import Strategy
from spcompile.attention.strategy_cost import Cost, Problem, cost
from spcompile.machine.links import link_of
from spcompile.machine.mesh import MeshShape

CAUSAL = AttentionMask(causal=True)
SIZE = 128


def costs(
    heads: int,
    kv_heads: int,
    degree: int,
    length: int,
    links: dict[str, str] | None = None,
    mask: AttentionMask = CAUSAL,
) -> dict[str, Cost]:
    """Of every strategy, in bfloat16."""
    mesh = MeshShape.of({"cp": degree})
    problem = Problem(1, heads, kv_heads, length, length, SIZE, SIZE, 2, mask)
    found = {}
    for strategy in (Strategy(degree, 1), Strategy(1, degree), *Strategy.hybrids(degree)):
        inner, outer = (link_of(mesh, "cp", links or {}, n) for n in (strategy.inner, None))
        order = "zigzag" if strategy.outer > 1 else "contiguous"
        found[str(strategy)] = cost(problem, strategy, order, inner, outer, 400e12)
    return found


@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 32), (32, 8), (32, 2)])
@pytest.mark.parametrize("degree", [2, 4, 8])
def test_bytes_of_ulysses_and_ring(heads: int, kv_heads: int, degree: int) -> None:
    found, length, e = costs(heads, kv_heads, degree, 8192), 8192, 2
    sent = max(kv_heads, degree)
    sent_bytes = (degree - 1) / degree**2 * length * SIZE * e
    again = heads + (2 * sent if kv_heads < degree else 0)
    assert found["ulysses"].inner_bytes == pytest.approx(sent_bytes * (2 * (2 * heads + 2 * sent) + again))
    keys = 2 * length * kv_heads * SIZE / degree
    assert found["ring"].outer_bytes == keys * ((degree - 1) * 2 * e + degree * 4)
    assert found["ring"].inner_bytes == found["ulysses"].outer_bytes == 0


@pytest.mark.parametrize(("inner", "outer"), [(2, 4), (4, 2)])
def test_a_hybrid_sends_as_ulysses_inside_and_as_a_ring_outside(inner: int, outer: int) -> None:
    """Ulysses over its part of the sequence, a ring over all of it with its part of the key heads."""
    length = 8192
    found = costs(32, 8, inner * outer, length)[f"hybrid {inner}x{outer}"]
    assert found.inner_bytes == pytest.approx(costs(32, 8, inner, length // outer)["ulysses"].inner_bytes)
    assert found.outer_bytes == costs(32, 8 // inner, outer, length)["ring"].outer_bytes


@pytest.mark.parametrize(
    ("heads", "kv_heads", "degree", "length", "expected"),
    [
        (32, 8, 8, 8192, "ulysses"),  # fewer bytes, and whole kernels
        (3, 3, 2, 8192, "ring"),  # a padded head costs more than blocks do
        (1, 1, 4, 8192, "ring"),  # nothing to share out
        (8, 2, 4, 8192, "ulysses"),  # key heads on two ranks each
        (12, 12, 16, 131072, "hybrid 2x8"),  # 12 heads over 16 would be 16; a ring alone is slower than the network
        (32, 32, 64, 131072, "hybrid 8x8"),  # fewer heads than ranks, and nodes of eight
    ],
)
def test_the_fastest(heads: int, kv_heads: int, degree: int, length: int, expected: str) -> None:
    found = costs(heads, kv_heads, degree, length)
    assert min(found, key=lambda name: found[name].seconds) == expected


def test_a_hop_hides_behind_the_block_before_it() -> None:
    """Of a long sequence on NVLink only the gradients' way home is seen, and the blocks' slower kernels."""
    fast, slow = (costs(32, 8, 8, 131072, {"cp": link})["ring"].seconds for link in ("nvlink", "network"))
    numbers = 2 * 131072 // 8 * 8 * SIZE
    assert slow - fast == pytest.approx(4 * numbers * (1 / 50e9 - 1 / 400e9) + 7e-6)
    short = [costs(32, 8, 8, 4096, {"cp": link})["ring"].seconds for link in ("nvlink", "network")]
    assert short[1] > 2 * short[0]


def test_a_window_sends_fewer_keys_around() -> None:
    windowed = costs(32, 8, 8, 8192, mask=AttentionMask(causal=True, window=64))
    whole = costs(32, 8, 8, 8192)
    assert windowed["ulysses"].inner_bytes == whole["ulysses"].inner_bytes
    assert windowed["ulysses"].seconds < whole["ulysses"].seconds
