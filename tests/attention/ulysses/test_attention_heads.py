"""Which heads a rank gets: every query head is with the key head it reads, none is lost, for any numbers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from spcompile.attention.ulysses.head_shares import HeadSplit

COUNTS = [(n * g, g) for n, g in itertools.product((1, 2, 3, 7), (1, 2, 3, 4, 6))]


@pytest.mark.parametrize("degree", [1, 2, 3, 4, 6, 8])
def test_every_rank_has_the_keys_of_its_queries(degree: int) -> None:
    for heads, kv_heads in COUNTS:
        split = HeadSplit(heads, kv_heads, degree)
        queries = split.split_queries(torch.arange(1, heads + 1), 0)
        keys = split.split_keys(torch.arange(1, kv_heads + 1), 0)
        assert queries.shape == (degree, split.local_heads)
        assert keys.shape == (degree, split.local_kv_heads)
        assert queries[queries > 0].sort().values.tolist() == list(range(1, heads + 1))
        read = keys.repeat_interleave(split.local_heads // split.local_kv_heads, 1)  # as grouped attention reads them
        wanted = (queries - 1).div(heads // kv_heads, rounding_mode="floor") + 1
        assert torch.equal(read[queries > 0], wanted[queries > 0])


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_joining_is_the_inverse_of_splitting(dim: int) -> None:
    for (heads, kv_heads), degree in itertools.product(COUNTS, (1, 2, 3, 4, 6, 8)):
        split = HeadSplit(heads, kv_heads, degree)
        shape = [2, 3, 5]
        shape[dim] = heads
        x = torch.randn(shape)
        assert torch.equal(split.join_queries(split.split_queries(x, dim), dim), x)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "degree", "queries", "keys"),
    [(32, 8, 8, 4, 1), (32, 8, 16, 2, 1), (12, 3, 2, 6, 3), (5, 5, 2, 3, 3), (6, 1, 4, 2, 1), (14, 2, 4, 4, 1)],
)
def test_sizes(heads: int, kv_heads: int, degree: int, queries: int, keys: int) -> None:
    split = HeadSplit(heads, kv_heads, degree)
    assert (split.local_heads, split.local_kv_heads) == (queries, keys)
    assert queries >= math.ceil(heads / degree)


def test_nothing_is_padded_or_moved_where_numbers_divide() -> None:
    """Then heads lie in memory as the all-to-all wants them."""
    for heads, kv_heads, degree in ((8, 8, 4), (8, 4, 4), (8, 2, 4), (8, 1, 8)):
        split = HeadSplit(heads, kv_heads, degree)
        assert split.split_queries(torch.arange(heads), 0).flatten().tolist() == list(range(heads))
