"""Triton kernels without a GPU: the cases of triton_interpreted.py, and which tiles a mask leaves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spcompile.attention.kernels.triton.tile_tables import Places, document_numbers, segments, tile_kinds
from spcompile.attention.scores.mask import WITHOUT_KEYS, AttentionMask

INTERPRETED = Path(__file__).with_name("triton_interpreted.py")


def run_interpreted(marked: str, config: pytest.Config) -> None:
    """The other file's tests with that mark, in a process where triton is imported as an interpreter."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", str(INTERPRETED), "-q", "-x", "-m", marked, "-p", "no:cacheprovider"]
    command += ["--all-cases"] if config.option.all_cases else ["--thinning-seed", str(config.option.thinning_seed)]
    found = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.thinned(30)
def test_interpreted(pytestconfig: pytest.Config) -> None:
    run_interpreted("not manual", pytestconfig)


@pytest.mark.manual
@pytest.mark.timeout(6000)
def test_interpreted_at_length(pytestconfig: pytest.Config) -> None:
    run_interpreted("manual", pytestconfig)


masks = (
    st.builds(
        AttentionMask,
        causal=st.just(True),
        offset=st.integers(-9, 9),
        window=st.none() | st.integers(1, 30),
        chunk=st.none() | st.integers(1, 30),
        prefix=st.none() | st.integers(1, 30),
        documents=st.booleans(),
        key_padding=st.booleans(),
    )
    | st.builds(
        AttentionMask,
        window=st.none() | st.integers(1, 30),
        window_right=st.none() | st.integers(1, 30),
        chunk=st.none() | st.integers(1, 30),
        documents=st.booleans(),
    )
    | st.builds(AttentionMask, window=st.none() | st.integers(1, 30), documents=st.just(True), fill=st.just(-1e30))
)


@pytest.mark.thinned(2)
@settings(derandomize=True, deadline=None, database=None, max_examples=300)
@given(mask=masks, seed=st.integers(0, 99), S=st.integers(1, 70), T=st.integers(1, 70), shuffled=st.booleans())
def test_tiles_say_what_the_dense_mask_says(mask: AttentionMask, seed: int, S: int, T: int, shuffled: bool) -> None:
    """An empty tile has no score, a full one all of them; with ranges of positions alone the others are cut."""
    random = torch.Generator().manual_seed(seed)
    block_m, block_n = 8, 4
    orders = [torch.randperm(n, generator=random) if shuffled else torch.arange(n) for n in (S, T)]
    documents = [
        torch.randint(0, 3, (2, n), generator=random).sort(-1).values if mask.documents else None for n in (S, T)
    ]
    if mask.fill is not None and documents[0] is not None:
        documents[0][:, torch.randint(0, S, (2,), generator=random)] = WITHOUT_KEYS
    valid = torch.rand(2, T, generator=random) > 0.3 if mask.key_padding else None
    keep = mask.allowed(*orders, *documents, valid).expand(2, 1, S, T)[:, 0]
    k_positions = orders[1].int()[None]
    if valid is not None:
        k_positions = torch.where(valid, k_positions, -1)
    places = Places(orders[0].int()[None], documents[0]), Places(k_positions, documents[1])
    full, partial = (x.expand(2, -1, -1) for x in tile_kinds(mask, *places, block_m, block_n))
    assert not (full & partial).any()
    grown = torch.nn.functional.pad(keep, (0, -T % block_n, 0, -S % block_m))
    tiles = grown.unflatten(2, (-1, block_n)).unflatten(1, (-1, block_m)).transpose(2, 3)
    some, every = tiles.flatten(3).any(-1), tiles.flatten(3).all(-1)
    assert not (some & ~full & ~partial).any()
    assert not (full & ~every).any()
    if not shuffled and not mask.needs_data and mask.window is None and mask.chunk is None and mask.prefix is None:
        assert torch.equal(full, every)
        assert torch.equal(full | partial, some)


@pytest.mark.parametrize("tiles", [0, 1, 2, 7])
def test_segments_cover_what_was_chosen(tiles: int) -> None:
    chosen = torch.rand(2, 5, tiles) > 0.4
    table, count, *_ = segments(chosen, ~chosen)
    for batch in range(2):
        for row in range(5):
            found = torch.zeros(tiles, dtype=torch.bool)
            for first, stop in table[batch, row, : int(count[batch, row])].tolist():
                assert not found[max(first - 1, 0) : stop + 1].any()  # maximal, so apart
                found[first:stop] = True
            assert torch.equal(found, chosen[batch, row])


IDS = {
    "above 2**31": torch.tensor([[3, 3 + 2**32, 2**31, 2**31 + 2**32]]),
    "pairs": torch.tensor([[5, 5 + 2**32, 7 + 2**32, -(2**40)]]),
    "floats": torch.tensor([[0.25, 0.5, -0.5, 1e10]]),
    "small": torch.tensor([[4, 2, 2, -1]], dtype=torch.int32),
    "bools": torch.tensor([[True, False, True, True]]),
}


@pytest.mark.parametrize("name", IDS)
def test_document_ids_keep_what_is_equal_and_what_is_greater(name: str) -> None:
    """Which tiles two documents share is told from the least and the greatest id of each."""
    q, k = IDS[name], IDS[name][:, torch.tensor([3, 0, 1, 1, 2])].expand(2, -1)
    q_numbers, k_numbers = document_numbers(q, k)
    assert (q_numbers.dtype, k_numbers.dtype) == (torch.int32, torch.int32)
    assert (q_numbers.shape, k_numbers.shape) == (q.shape, k.shape)
    for compare in (torch.eq, torch.lt):
        wanted = compare(q[:, :, None], k[:, None].to(q.dtype))
        assert torch.equal(compare(q_numbers[:, :, None], k_numbers[:, None]), wanted)
