"""The bar of `explain` moves forward, reaches its end, and begins anew for the next model."""

from spcompile.command.compile_progress import Share
from spcompile.passes import PIPELINE


def test_it_moves_forward_and_ends_below_all() -> None:
    share = Share()
    steps = ["building the model", "tracing the model", "reading the graph", *(p.name for p in PIPELINE)]
    steps += ["forward and backward of one rank", "planning memory", "forward and backward of one device, to compare"]
    found = [share.begin(step) for step in steps]
    assert found == sorted(found)
    assert found[0] == 0
    assert 60 < found[-1] <= 99


def test_candidates_are_counted_and_a_next_model_begins_anew() -> None:
    share = Share()
    share.begin("tracing the model")
    assert share.begin("compiling candidates, 1 of 4 done") == 25
    assert share.begin("compiling candidates, 4 of 4 done") == 100
    assert share.begin("tracing the model") == 0
