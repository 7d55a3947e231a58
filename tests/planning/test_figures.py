"""Figures of many layers from those of few."""

from __future__ import annotations

from spcompile.planning.figures import Figures, extrapolated


def _figures(compute: float, exposed: float) -> Figures:
    none = {"communication": 0.0, "again": 0.0, "parameters": 0.0, "gradients": 0.0, "states": 0.0, "saved": 0.0}
    rest = {"products": 0.0, "attention": 0.0, "attention_full": 0.0}
    return Figures(seconds=compute + exposed, compute=compute, exposed=exposed, peaks=(0.0, 0.0, 0.0), **none, **rest)


def test_time_is_linear_in_layers() -> None:
    found = extrapolated(_figures(2.0, 0.5), _figures(3.0, 0.6), (2, 4), 8)
    assert (found.compute, round(found.exposed, 9), round(found.seconds, 9)) == (5.0, 0.8, 5.8)


def test_no_less_than_nothing_is_exposed() -> None:
    found = extrapolated(_figures(2.0, 0.5), _figures(3.0, 0.3), (2, 4), 8)
    assert (found.exposed, found.seconds, found.compute) == (0.0, 5.0, 5.0)
