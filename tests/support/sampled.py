"""Products of parameters of which CI runs a part; the other cases run with `make test-long`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest


def sampled(every: int, *values: Sequence[Any]) -> list[Any]:
    """All combinations, one in `every` of which is not marked `long`.

    It is that whose places in the lists add up to a multiple of `every`: any two values of two lists meet in one of
    them, where a third list has at least `every` values.
    """
    return [
        pytest.param(*case, marks=() if sum(places) % every == 0 else pytest.mark.long)
        for case, places in zip(product(*values), product(*(range(len(v)) for v in values)), strict=True)
    ]
