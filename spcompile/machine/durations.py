"""Seconds as people read them: always in milliseconds."""

from __future__ import annotations


def ms_text(seconds: float) -> str:
    """`5,435`, `9.567`, `0.004`; `< 0.001` for what is less, `0` for nothing."""
    ms = 1e3 * seconds
    if 0 < ms < 0.001:
        return "< 0.001"
    return f"{ms:,.0f}" if ms >= 1000 else f"{float(f'{ms:.4g}'):.6g}" if ms >= 0.1 else f"{ms:.3f}" if ms else "0"
