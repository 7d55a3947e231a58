"""insert-reshards: which values change their state, where, and what the user is told."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from example_numerics import after_pass, nodes_of, remarks_of
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

from spcompile.program.build import LocalProgram


def attend(h: Tensor) -> Tensor:
    h = h.unsqueeze(1)
    return F.scaled_dot_product_attention(h, h, h, is_causal=True).squeeze(1)


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def changes(program: LocalProgram) -> list[tuple[str, str, str]]:
    """(value, from, to) of every reshard."""
    found = nodes_of(program, "reshard")
    return [(str(n.args[0]), str(n.args[2]), str(n.args[3])) for n in found]


def reshards(function: object, *inputs: Tensor, **options: object) -> LocalProgram:
    return after_pass("insert-reshards", function, inputs, **options)  # type: ignore[arg-type]


def test_inputs_are_sliced_and_parameters_vary() -> None:
    program = reshards(lambda x, w: attend(x @ w).sum(), x(2, 7, 4), x(4, 4))
    assert changes(program) == [("l_x_", "I", "S(1)"), ("l_w_", "I", "R"), ("sum_1", "P", "I")]


def test_one_reshard_per_value_and_state() -> None:
    program = reshards(lambda x, w: attend(x @ w + x @ w) @ w, x(2, 7, 4), x(4, 4))
    assert changes(program).count(("l_w_", "I", "R")) == 1


def test_integers_need_no_vary() -> None:
    """A value without gradient knows no difference between invariant and replicated."""

    def model(x: Tensor, table: Tensor) -> Tensor:
        return (attend(x) * table[0].unsqueeze(-1)).sum()

    program = reshards(model, x(2, 7, 4), torch.randint(0, 9, (1, 2, 1)))
    assert not [change for change in changes(program) if change[2] == "R"]


def test_shifted_labels_are_shifted_whole_and_then_sliced() -> None:
    def model(x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(attend(x)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    found = changes(reshards(model, x(2, 7, 4), torch.randint(0, 4, (2, 7))))
    assert ("slice_2", "I", "S(1)") in found
    assert not [change for change in found if change[0] == "l_labels_"]


def test_positions_are_made_whole_and_then_sliced() -> None:
    def model(x: Tensor, table: Tensor) -> Tensor:
        return attend(x + table[torch.arange(x.shape[1])])

    assert ("arange", "I", "S(0)") in changes(reshards(model, x(2, 7, 4), x(16, 4)))


@pytest.mark.thinned(2)
def test_outputs_are_gathered_or_left_split() -> None:
    assert changes(reshards(attend, x(2, 7, 4)))[-1][1:] == ("S(1)", "I")
    assert changes(reshards(attend, x(2, 7, 4), outputs="sharded"))[-1][1:] == ("I", "S(1)")


def test_partial_sums_are_completed_before_anyone_reads_them() -> None:
    program = reshards(lambda x: attend(x).sum() * attend(x).sum(1).mean(), x(2, 7, 4))
    for node in nodes_of(program, "reshard"):
        if node.args[2] == "P":
            assert [user.target for user in node.args[0].users] == [node.target]


def mixes_positions(x: Tensor) -> Tensor:
    return F.layer_norm(attend(x), x.shape[1:])  # the line of the remark


def drops(x: Tensor) -> Tensor:
    return torch.bernoulli(attend(x).sigmoid())


def has_no_rule(x: Tensor) -> Tensor:
    return torch.special.bessel_j0(attend(x))


GATHERS = [(mixes_positions, "SPR103"), (drops, "SPR302"), (has_no_rule, "SPR102")]


@pytest.mark.parametrize(("function", "code"), GATHERS)
def test_a_gather_is_remarked_with_the_line(function: object, code: str) -> None:
    inputs = (x(2, 7, 4),) if code != "SPR102" else (x(2, 7, 4).detach(),)
    program = reshards(function, *inputs)
    (remark,) = remarks_of(program, code)
    assert "(2, 7, 4) is gathered" in remark.text
    assert remark.where is not None
    assert remark.where.file.endswith("test_pass_insert_reshards.py")
    assert remark.where.function == function.__name__  # type: ignore[attr-defined]


def test_strict_makes_it_an_error() -> None:
    with pytest.raises(BackendCompilerFailed, match=r"(?s)SP401 not allowed under strict: SPR103 .*layer_norm"):
        reshards(mixes_positions, x(2, 7, 4), strict=True)


def test_a_gather_of_what_every_rank_could_compute_is_avoided() -> None:
    """The mask is needed whole by logcumsumexp and sharded by the product: it is computed whole, then sliced."""

    def model(x: Tensor, keep: Tensor) -> Tensor:
        mask = keep * 2.0
        return attend(x) * mask.unsqueeze(-1) + mask.logcumsumexp(1).unsqueeze(-1)

    program = reshards(model, x(2, 7, 4), torch.rand(2, 7, dtype=torch.float64))
    assert not [c for c in changes(program) if c[1].startswith("S") and c[0] == "mul"]
    assert not program.ctx.remarks.rows[1:]  # only the choice of strategy
