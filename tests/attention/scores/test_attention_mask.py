"""AttentionMask: its text, its dense form against the definition, and classification against the dense form."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spcompile.attention.scores.mask import AttentionMask, Kind
from spcompile.diagnostics import IllegalOption

sizes = st.none() | st.integers(1, 12)


@st.composite
def masks(draw: st.DrawFn) -> AttentionMask:
    causal = draw(st.booleans())
    return AttentionMask(
        causal=causal,
        offset=draw(st.integers(-6, 6)) if causal else 0,
        window=draw(sizes),
        window_right=draw(sizes),
        chunk=draw(sizes),
        prefix=draw(sizes) if causal else None,
        documents=draw(st.booleans()),
        key_padding=draw(st.booleans()),
    )


def sees(mask: AttentionMask, q: int, k: int) -> bool:
    """The definition, one pair at a time, without documents and padding."""
    if mask.causal and not (k <= q + mask.offset or (mask.prefix is not None and k < mask.prefix)):
        return False
    if mask.window is not None and not q - k < mask.window:
        return False
    if mask.window_right is not None and not k - q < mask.window_right:
        return False
    return mask.chunk is None or q // mask.chunk == k // mask.chunk


@given(masks())
def test_text_round_trip(mask: AttentionMask) -> None:
    assert AttentionMask.parse(str(mask)) == mask


def test_text_is_compact() -> None:
    assert str(AttentionMask()) == "full"
    assert str(AttentionMask(causal=True, offset=-2, window=4, documents=True)) == "causal offset=-2 window=4 documents"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "causal full",
        "causal=1",
        "window",
        "window=x",
        "window=0",
        "offset=1",
        "prefix=3",
        "causal causal",
        "x",
        "causal fill=-1e+30",
    ],
)
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(IllegalOption):
        AttentionMask.parse(text)


@settings(max_examples=200)
@given(masks(), st.integers(0, 2**31 - 1))
def test_dense_form(mask: AttentionMask, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 20, (5,), generator=random, dtype=torch.int32)
    k = torch.randint(0, 20, (6,), generator=random, dtype=torch.int32)
    q_documents, k_documents = (torch.randint(0, 2, (2, n), generator=random) for n in (5, 6))
    key_valid = torch.rand(2, 6, generator=random) > 0.4
    dense = mask.allowed(q, k, q_documents, k_documents, key_valid)
    for b in range(dense.shape[0]):
        for i in range(5):
            for j in range(6):
                expected = sees(mask, int(q[i]), int(k[j]))
                if mask.documents:
                    expected = expected and bool(q_documents[b, i] == k_documents[b, j])
                if mask.key_padding:
                    expected = expected and bool(key_valid[b, j])
                assert bool(dense[b, 0, i, j]) == expected


@pytest.mark.thinned(3)
@settings(max_examples=600)
@given(masks(), st.integers(0, 20), st.integers(1, 10), st.integers(0, 20), st.integers(1, 10))
def test_classify_and_reach(mask: AttentionMask, q_first: int, q_length: int, k_first: int, k_length: int) -> None:
    q_last, k_last = q_first + q_length - 1, k_first + k_length - 1
    pairs = {(q, k): sees(mask, q, k) for q in range(q_first, q_last + 1) for k in range(k_first, k_last + 1)}
    kind = mask.classify(q_first, q_last, k_first, k_last)
    if kind is Kind.EMPTY:
        assert not any(pairs.values())
    elif mask.documents or mask.key_padding:
        assert kind is Kind.PARTIAL
    elif kind is Kind.FULL:
        assert all(pairs.values())
    elif kind is Kind.CAUSAL_DIAGONAL:
        assert all(seen == (k - k_first <= q - q_first) for (q, k), seen in pairs.items())
    first, last = mask.reach(q_first, q_last)
    assert all(first <= k and (last is None or k <= last) for (_, k), seen in pairs.items() if seen)


def test_classify_is_sharp() -> None:
    causal, window = AttentionMask(causal=True), AttentionMask(causal=True, window=4)
    assert causal.classify(8, 15, 0, 7) is Kind.FULL
    assert causal.classify(8, 15, 8, 15) is Kind.CAUSAL_DIAGONAL
    assert causal.classify(8, 15, 16, 23) is Kind.EMPTY
    assert causal.classify(8, 15, 4, 11) is Kind.PARTIAL
    assert window.classify(8, 15, 0, 4) is Kind.EMPTY
    assert window.classify(8, 15, 0, 5) is Kind.PARTIAL
    assert AttentionMask(chunk=8).classify(8, 15, 8, 15) is Kind.FULL
    assert AttentionMask().classify(0, 3, 0, 9) is Kind.FULL
