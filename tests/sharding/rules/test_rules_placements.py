"""Every rule against the truth, wherever its operands lie: on 2 and 3 ranks, in order and zigzag, with uneven parts.

Where an operand lies and over which factor the call runs is forced (`placed_calls`): all combinations, also those that
propagation would never choose. Sizes are 2 to 12, so that on three ranks some have less, or nothing but padding. A run
takes a few of the combinations of an op, other ones with another seed; `--all-cases` takes ten times as many.
"""

from __future__ import annotations

import random

import pytest
import torch
from placed_calls import PlacedCall
from rule_calls import Call
from rules_table import CASES

COMBINATIONS = 2  # of an op on one mesh, in one run
LAYOUTS = [(2, "contiguous"), (2, "zigzag"), (3, "contiguous"), (3, "zigzag")]


def has_one_truth(call: Call) -> bool:
    """Whether equal operands give equal results, of a shape that is known: no random or uninitialised numbers."""
    tags = {torch.Tag.nondeterministic_seeded, torch.Tag.dynamic_output_shape}
    return tags.isdisjoint(call.op.tags) and "empty" not in call.name


CALLS = [call for call, _ in CASES if has_one_truth(call)]


@pytest.mark.thinned(30)
@pytest.mark.parametrize("call", CALLS, ids=[call.name for call in CALLS])
@pytest.mark.parametrize(("degree", "order"), LAYOUTS)
def test_all_placements(call: Call, degree: int, order: str, pytestconfig: pytest.Config) -> None:
    placed = PlacedCall(call, seed=0)
    ways = placed.ways(order)
    rotates = random.Random(f"{call.name} {degree} {order} {pytestconfig.option.thinning_seed}")
    count = COMBINATIONS * (10 if pytestconfig.option.all_cases else 1)
    for way in rotates.sample(ways, min(len(ways), count)):
        placed.check(way, degree, order)
