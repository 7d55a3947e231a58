"""Loops are found in listings of machine code, and FlexAttention's kernels can be rendered and compiled."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import flex_kernels
from machine_code import CARDS, loops_of, read

# A loop over 0x10 .. 0x40, a spin on its barrier that stands behind the end, and a loop that multiplies nothing.
LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA 0x90 ;
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0030*/                   MUFU.EX2 R5, R5 ;
        /*0040*/               @P1 BRA 0x10 ;
        /*0050*/                   FADD R2, R2, R3 ;
        /*0060*/               @P2 BRA 0x50 ;
        /*0070*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0080*/                   EXIT ;
        /*0090*/                   SYNCS.PHASECHK.TRANS64 P0, [R7] ;
        /*00a0*/              @!P0 BRA 0x90 ;
        /*00b0*/                   BRA 0x20 ;
"""


def test_a_loop_is_what_comes_back() -> None:
    (loop,) = loops_of(LISTING)
    assert loop.counts == {"matrix": 1, "exp": 1, "barrier": 1, "integer and moves": 4}
    card = CARDS[90]
    assert loop.cycles(card, 4, 2.0 * card.tensor)["tensor"] == 2.0
    assert loop.cycles(card, 4, 0.0)["special"] == 128 / card.special


@pytest.mark.thinned(13)
@pytest.mark.parametrize("capability", [90, 100])
def test_loops_of_flex_attention(capability: int) -> None:
    """Tiles with and without a mask; in the backward for dq, and for dk with dv. Each score has its exponential."""
    for make, loops in ((flex_kernels.forward, 2), (flex_kernels.backward, 4)):
        kernel, tile = make(64, capability)
        code = read(kernel)
        assert len(code.loops) == loops
        scores = tile[0] * tile[1] / (32 * code.warps)
        assert all(scores <= loop.counts["exp"] <= 1.1 * scores for loop in code.loops)
        assert all(loop.counts["matrix"] for loop in code.loops)
