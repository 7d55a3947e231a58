"""recognize-likelihood: log-probabilities of targets in every spelling, and what only looks like one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from example_numerics import after_pass, assert_equal, nodes_of, on_one_device
from torch import Tensor


def picked(x: Tensor, t: Tensor) -> Tensor:
    return x.gather(-1, t.unsqueeze(-1)).squeeze(-1)


def rows(x: Tensor) -> Tensor:
    return torch.arange(x.shape[0])


SPELLINGS = {  # functions of x [3, 4, 5] and targets [3, 4]
    "nll": lambda x, t: F.nll_loss(x.log_softmax(-1).flatten(0, 1), t.flatten()),
    "nll, classes second": lambda x, t: F.nll_loss(x.mT.log_softmax(1), t, ignore_index=3, reduction="sum"),
    "nll, float64": lambda x, t: F.nll_loss(x.float().flatten(0, 1).log_softmax(-1, dtype=x.dtype), t.flatten()),
    "gather": lambda x, t: picked(x.log_softmax(-1), t),
    "gather, dim kept": lambda x, t: x.log_softmax(2).gather(2, t[..., None]),
    "gather, another dim": lambda x, t: x.mT.log_softmax(1).gather(1, t[:, None]),
    "gather from a reshape": lambda x, t: picked(x.log_softmax(-1).flatten(0, 1), t.flatten()),
    "index": lambda x, t: -x.flatten(0, 1).log_softmax(-1)[torch.arange(12), t.flatten()].mean(),
    "index from the end": lambda x, t: x[0].log_softmax(-1)[rows(x[0]), t[0] - 5],
    "difference": lambda x, t: picked(x, t) - x.logsumexp(-1),
    "difference, dim kept": lambda x, t: x.gather(-1, t[..., None]) - x.logsumexp(-1, keepdim=True),
    "other way around": lambda x, t: x.exp().sum(-1).log() - picked(x, t),
    "shifted": lambda x, t: (lambda y: y.exp().sum(-1).log() - picked(y, t))(x - x.amax(-1, True)),
    "difference of an index": lambda x, t: (lambda y: y[rows(y), t[0]] - torch.logsumexp(y, 1))(x[0]),
    "all by hand": lambda x, t: picked(x - x.exp().sum(-1, keepdim=True).log(), t),
}
OTHERS = {
    "several targets": lambda x, t: x.log_softmax(-1).gather(-1, t[..., :2, None].repeat(1, 2, 2)),
    "fewer rows": lambda x, t: x.log_softmax(-1).gather(-1, t[:, :2, None]),
    "another dim": lambda x, t: x.log_softmax(1).gather(-1, t[..., None]),
    "of something else": lambda x, t: picked(x, t) - (x + 1).logsumexp(-1),
    "read elsewhere": lambda x, t: (lambda p: (picked(p, t), (p.exp() * p).sum()))(x.log_softmax(-1)),
    "rows in another order": lambda x, t: x[0].log_softmax(-1)[rows(x[0]).flip(0), t[0]],
    "one row for all": lambda x, t: x[0].log_softmax(-1)[t[0] * 0, t[0]],
    "a reshape of the classes": lambda x, t: x.log_softmax(-1).reshape(3, 20).gather(1, t),
    "dim kept on one side": lambda x, t: x[:, :, None].gather(-1, t[..., None, None])[..., 0] - x.logsumexp(-1, True),
}


def inputs() -> list[Tensor]:
    return [torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True), torch.randint(0, 5, (3, 4))]


@pytest.mark.thinned(8)
@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str) -> None:
    given = inputs()
    program = after_pass("recognize-likelihood", SPELLINGS[name], given)
    assert len(nodes_of(program, "aten.cross_entropy_loss")) == 1
    for op in ("aten.gather", "aten.index", "aten.nll_loss_nd", "aten.log_softmax", "aten.logsumexp"):
        assert not nodes_of(program, op)
    assert_equal(on_one_device(program.gm, program.inputs), on_one_device(SPELLINGS[name], given))


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", OTHERS)
def test_others_stay(name: str) -> None:
    given = inputs()
    program = after_pass("recognize-likelihood", OTHERS[name], given)
    assert not nodes_of(program, "aten.cross_entropy_loss")
    assert_equal(on_one_device(program.gm, program.inputs), on_one_device(OTHERS[name], given))
