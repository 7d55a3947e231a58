"""What a plan tells first: whether a step fits, what makes it fit, how fast it is. Nothing is told twice."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from explained import VOCAB, WIDTH, Model, plan_of
from torch import Tensor, nn

import spcompile
from spcompile.memory.account import Action


def test_flops_tokens_and_shares_by_hand() -> None:
    plan = plan_of(2, length=64, layers=2, rows=3)
    tokens, scores = 3 * 64, 3 * 64 * 65 / 2
    products = 2 * tokens * (2 * 4 * WIDTH * WIDTH + WIDTH * VOCAB)
    attention = 2 * 2 * 2 * scores * WIDTH
    found = plan.answers
    assert found.tokens == tokens
    assert found.flops == pytest.approx(3 * (products + attention), rel=0.02)
    assert found.flops_full == pytest.approx(3 * (products + 2 * attention), rel=0.02)
    seconds = plan.predicted.total("seconds")
    assert plan.to_dict()["answers"]["tokens_per_second_per_rank"] == pytest.approx(tokens / seconds / 2)
    assert found.mfu(seconds)[0] == pytest.approx(found.flops / seconds / found.peak)


def test_the_answers_stand_first_and_once() -> None:
    lines = str(plan_of(2, attention="ring")).splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["Memory", "Speed"]
    assert lines[1].startswith("Memory     fits: ")
    assert re.search(r"tokens/s, .* on each rank; MFU ", lines[2])
    text = "\n".join(lines)
    assert text.count("asked for") == 1  # why a ring: not among the remarks once more
    assert not re.search(r"\d us|\d MB", text)


@pytest.mark.thinned(8)
def test_where_it_does_not_fit_what_was_tried_is_told_and_holds() -> None:
    with torch.device("meta"):
        model, ids = Model(2), torch.zeros(1, 4096, dtype=torch.int64)
    asked = {"ids_BS": ids}
    plan = spcompile.explain(model, asked, mesh={"cp": 2}, memory="500KiB", attention="ring")
    assert not plan.memory.fits
    assert "does not fit" in str(plan)
    (way,) = plan.answers.ways
    mesh = re.match(r"mesh cp=(\d+) with shard_parameters=\['cp'\]: ", way)
    assert mesh is not None
    then = spcompile.explain(
        model, asked, mesh={"cp": int(mesh[1])}, memory="500KiB", attention="ring", shard_parameters=["cp"]
    )
    assert then.memory.fits
    assert str(plan).count("does not fit") == 1


DONE = {
    (): "with the states of adamw",
    ("recompute",): "; 2.00 KiB are made again instead of saved, for 1.5 ms",
    ("offload",): "; 2.00 KiB wait in the memory of the host, for 1.5 ms",
    ("stage",): "; 2.00 KiB of heads are not there all at once, for 1.5 ms",
    ("tile", "recompute"): "; 2.00 KiB are made again instead of saved; 2.00 KiB never stand whole, for 3 ms",
}


@pytest.mark.parametrize("kinds", DONE)
def test_what_was_done_with_values_is_said_by_kind(kinds: tuple[str, ...]) -> None:
    plan = plan_of(2)
    actions = tuple(Action(kind, 1, 2048, 0.0015, "mm", None) for kind in kinds)
    memory = replace(plan.memory, actions=actions, budget_bytes=2**30)
    line = str(replace(plan, memory=memory)).splitlines()[1]
    assert line.endswith(DONE[kinds])


class Blocks(nn.Module):
    """Two heads and a feed-forward, which tp splits."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x_BSD: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x_BSD).chunk(3, dim=-1))
        y_BNSH = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y_BNSH.transpose(1, 2).flatten(2)).square().mean()


@pytest.mark.thinned(6)
@pytest.mark.parametrize("mesh", [{"tp": 2}, {"dp": 2}, {"cp": 1}])
def test_no_word_about_rings_where_there_is_no_cp(mesh: dict[str, int]) -> None:
    text = str(spcompile.explain(Blocks(), (torch.zeros(2, 8, 8),), mesh=mesh)).partition("\nPasses")[0]
    assert not re.search("ring|ulysses|zigzag|contiguous", text, re.IGNORECASE)


@pytest.mark.thinned(6)
def test_values_alike_are_one_row() -> None:
    few, more = (plan_of(2, layers=layers).largest_tensors for layers in (3, 6))
    assert len({(row.shape, row.dtype, row.source) for row in more}) == len(more)
    counts = [{row.shape: row.count for row in rows if row.source is not None} for rows in (few, more)]
    assert [shape for shape in counts[0] if counts[1].get(shape, 0) > 1.5 * counts[0][shape]]
