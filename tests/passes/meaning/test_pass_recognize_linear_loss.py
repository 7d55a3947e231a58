"""recognize-linear-loss: which heads and losses become one op, which stay, and what is said about them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from example_numerics import after_pass, check_pipeline, nodes_of, on_one_device, remarks_of
from torch import Tensor

from spcompile.losses.linear_loss_call import LinearCrossEntropyCall

B, S, D, C = 2, 7, 4, 11
PASS, OP = "recognize-linear-loss", "spx.linear_cross_entropy"


def inputs() -> list[Any]:
    """Rows [B, S, D], weight of the head [C, D], its bias [C], labels [B, S], some ignored."""
    torch.manual_seed(0)
    x, head, bias = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((B, S, D), (C, D), (C,)))
    labels = torch.randint(0, C, (B, S))
    return [x, head, bias, torch.where(torch.rand(B, S) < 0.3, -100, labels)]


def flat(logits: Tensor, t: Tensor, **more: Any) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), t.flatten(), **more)


def class_weights(like: Tensor) -> Tensor:
    return torch.linspace(0.1, 1.0, C, dtype=like.dtype)


LOSSES: dict[str, Callable[..., Any]] = {
    "mean": lambda x, w, b, t: flat(F.linear(x, w, b), t),
    "sum over a count": lambda x, w, b, t: flat(F.linear(x, w, b), t, reduction="sum") / 5,
    "one for each row": lambda x, w, b, t: flat(F.linear(x, w, b), t, reduction="none").square().sum(),
    "no bias": lambda x, w, b, t: flat(F.linear(x, w), t) + b.sum(),
    "bias by hand": lambda x, w, b, t: flat(x @ w.T + b, t),
    "rows first": lambda x, w, b, t: flat(x @ w.reshape(D, C), t) + b.sum(),
    "addmm": lambda x, w, b, t: F.cross_entropy(torch.addmm(b, x.flatten(0, 1), w.t()), t.flatten()),
    "classes second": lambda x, w, b, t: F.cross_entropy(F.linear(x, w, b).transpose(1, 2), t),
    "other rows": lambda x, w, b, t: F.cross_entropy(F.linear(x, w, b).view(S, B, C).transpose(1, 2), t.reshape(S, B)),
    "permuted": lambda x, w, b, t: F.cross_entropy(F.linear(x, w, b).permute(0, 2, 1), t),
    "shifted": lambda x, w, b, t: flat(F.linear(x, w, b)[:, :-1].contiguous(), t[:, 1:]),
    "sequence first": lambda x, w, b, t: flat(F.linear(x, w, b).transpose(0, 1), t.t()),
    "one position": lambda x, w, b, t: F.cross_entropy(F.linear(x, w, b)[:, -1], t[:, 5]),
    "cast": lambda x, w, b, t: flat(F.linear(x.float(), w.float(), b.float()).double(), t),
    "softcap": lambda x, w, b, t: flat(30 * torch.tanh(F.linear(x, w, b) / 30), t),
    "scale": lambda x, w, b, t: flat(F.linear(x, w, b) * 0.3 / 2, t),
    "smoothing": lambda x, w, b, t: flat(F.linear(x, w, b), t, label_smoothing=0.2),
    "weights": lambda x, w, b, t: flat(F.linear(x, w, b), t, weight=class_weights(x)),
    "both": lambda x, w, b, t: flat(F.linear(x, w, b), t, weight=class_weights(x), label_smoothing=0.2),
    "both, each row": lambda x, w, b, t: flat(
        F.linear(x, w, b), t, weight=class_weights(x), label_smoothing=0.2, reduction="none"
    ).sum(),
    "ignore_index": lambda x, w, b, t: flat(F.linear(x, w, b), t.clamp(min=0), ignore_index=3),
    "nll": lambda x, w, b, t: F.nll_loss(F.log_softmax(F.linear(x, w, b), -1).flatten(0, 1), t.flatten()),
    "gathered": lambda x, w, b, t: (
        -(F.linear(x, w, b).log_softmax(-1).gather(-1, t.clamp(min=0).unsqueeze(-1)).squeeze(-1) * (t != -100)).sum()
    ),
    "torch's own": lambda x, w, b, t: F.linear_cross_entropy(x.flatten(0, 1), w, t.flatten(), linear_bias=b),
}


@pytest.mark.thinned(10)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_become_the_op(name: str) -> None:
    if name == "torch's own" and not hasattr(F, "linear_cross_entropy"):
        pytest.skip("this torch has none")
    program = after_pass(PASS, LOSSES[name], inputs())
    assert len(nodes_of(program, OP)) == 1
    assert not nodes_of(program, "aten.cross_entropy_loss")
    assert not [n for n in program.gm.graph.nodes if isinstance(n.meta.get("val"), Tensor) and is_of_logits(n)]
    assert not remarks_of(program, "SPR208")
    tolerance = 1e-6 if name == "cast" else 1e-10
    assert_same(on_one_device(program.gm, program.inputs), on_one_device(LOSSES[name], inputs()), tolerance)


def is_of_logits(node: Any) -> bool:
    return node.meta["val"].numel() >= B * (S - 1) * C


def assert_same(found: Any, wanted: Any, tolerance: float = 1e-10) -> None:
    """Losses, and gradients in whatever order the graph takes its inputs."""
    torch.testing.assert_close(found[0], wanted[0], rtol=tolerance, atol=tolerance)
    by_shape = {grad.shape: grad for grad in wanted[1]}
    for grad in found[1]:
        torch.testing.assert_close(grad, by_shape[grad.shape], rtol=tolerance, atol=tolerance)


def with_z_loss(x: Tensor, w: Tensor, b: Tensor, t: Tensor) -> Tensor:
    logits = F.linear(x, w, b)
    return 0.1 * logits.logsumexp(-1).square().mean() + flat(logits, t.clone())


def test_a_z_loss_reads_the_op_of_the_loss() -> None:
    program = after_pass(PASS, with_z_loss, inputs())
    assert len(nodes_of(program, OP)) == 1
    assert not nodes_of(program, "aten.logsumexp")
    assert_same(on_one_device(program.gm, program.inputs), on_one_device(with_z_loss, inputs()))


def test_a_z_loss_of_other_rows_has_an_op_of_its_own() -> None:
    def loss(x: Tensor, w: Tensor, b: Tensor, t: Tensor) -> Tensor:
        logits = F.linear(x, w, b)
        return flat(logits[:, :-1], t[:, 1:]) + 0.1 * logits.logsumexp(-1, keepdim=True).square().mean()

    program = after_pass(PASS, loss, inputs())
    assert len(nodes_of(program, OP)) == 2
    assert_same(on_one_device(program.gm, program.inputs), on_one_device(loss, inputs()))


def test_two_losses_of_one_head() -> None:
    def loss(x: Tensor, w: Tensor, b: Tensor, t: Tensor) -> Tensor:
        logits = F.linear(x, w, b)
        return flat(logits[:, :-1], t[:, 1:]) + flat(logits[:, :-2], t[:, 2:])

    program = after_pass(PASS, loss, inputs())
    assert len(nodes_of(program, OP)) == 2
    assert_same(on_one_device(program.gm, program.inputs), on_one_device(loss, inputs()))


BUILT: dict[str, tuple[Callable[..., Any], str]] = {
    "an output": (lambda x, w, b, t: (flat(z := F.linear(x, w, b), t), z), 'outputs="loss"'),
    "a metric": (
        lambda x, w, b, t: (flat(z := F.linear(x, w, b), t), (z.argmax(-1) == t).sum().double() + 0 * x.sum()),
        "argmax reads them",
    ),
    "a step that is none": (lambda x, w, b, t: flat(F.linear(x, w, b) * x[..., :1], t), "mul reads them"),
    "probabilities": (
        lambda x, w, b, t: F.cross_entropy(F.linear(x, w, b).transpose(1, 2), x.new_ones(B, C, S)),
        "probabilities as targets",
    ),
}


@pytest.mark.thinned(2)
@pytest.mark.parametrize("name", BUILT)
def test_logits_that_somebody_else_reads_are_built_and_a_remark_says_so(name: str) -> None:
    function, why = BUILT[name]
    program = after_pass(PASS, function, inputs())
    assert not nodes_of(program, OP)
    (remark,) = remarks_of(program, "SPR208")
    assert why in remark.text
    assert f"[{B}, {S}, {C}]" in remark.text


@pytest.mark.thinned(4)
def test_the_caller_may_do_without_the_logits() -> None:
    program = after_pass(PASS, BUILT["an output"][0], inputs(), outputs="loss")
    assert len(nodes_of(program, OP)) == 1
    assert not remarks_of(program, "SPR208")


NOT_TAKEN: dict[str, Callable[..., Any]] = {
    "no wider than a row": lambda x, w, b, t: F.cross_entropy(F.linear(x, w[:D]).flatten(0, 1), t.flatten() % D),
    "logits of the user": lambda x, w, b, t: flat(torch.cat([x, x, x[..., :3]], -1), t),
    "features as weights": lambda x, w, b, t: F.cross_entropy(
        x.flatten(0, 1) @ torch.cat([t, t]).double(), t.flatten() % S
    ),
}


@pytest.mark.thinned(2)
@pytest.mark.parametrize("name", NOT_TAKEN)
def test_others_stay_and_nothing_is_said(name: str) -> None:
    program = after_pass(PASS, NOT_TAKEN[name], inputs())
    assert not nodes_of(program, OP)
    assert not remarks_of(program, "SPR208")


def test_a_field_says_how_wide_a_head_must_be() -> None:
    for wider_than, ops in ((C / D, 0), (C / D - 0.01, 1)):
        program = after_pass(PASS, LOSSES["mean"], inputs(), passes={PASS: {"wider_than": wider_than}})
        assert len(nodes_of(program, OP)) == ops


def test_steps_keep_the_order_and_the_dtypes_of_the_model() -> None:
    def loss(x: Tensor, w: Tensor, b: Tensor, t: Tensor) -> Tensor:
        half = F.linear(x.bfloat16(), w.bfloat16(), b.bfloat16())
        return flat((torch.tanh(half / 30) * 30).float(), t)

    (node,) = nodes_of(after_pass(PASS, loss, inputs()), OP)
    assert LinearCrossEntropyCall.of(node).steps == "div 30.0, tanh, mul 30.0, to float32"


@pytest.mark.thinned(9)
@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="this torch has none")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_torchs_own_op_in_chunks(reduction: str) -> None:
    def loss(x: Tensor, w: Tensor, b: Tensor, t: Tensor) -> Tensor:
        in_chunks = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=4, allow_retain_graph=True)
        args = (x.flatten(0, 1), w, t.flatten())
        return F.linear_cross_entropy(*args, linear_bias=b, reduction=reduction, options=in_chunks).square().sum()

    program = after_pass(PASS, loss, inputs())
    assert len(nodes_of(program, OP)) == 1
    assert not [node for node in program.gm.graph.nodes if "chunked" in str(node.target)]
    assert_same(on_one_device(program.gm, program.inputs), on_one_device(loss, inputs()))


def model(loss: Callable[..., Any]) -> Callable[..., Any]:
    def with_attention(x: Tensor, w: Tensor, b: Tensor, t: Tensor) -> Any:
        h = x.unsqueeze(1)
        return loss(F.scaled_dot_product_attention(h, h, h, is_causal=True).squeeze(1), w, b, t)

    return with_attention


MESHES = [{"cp": 2}, {"cp": 3}, {"tp": 2}, {"tp": 3}, {"dp": 2}, {"tp": 2, "cp": 2}]


@pytest.mark.thinned(10, covers=["mesh"])
@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize(
    "name", [name for name in LOSSES if name not in ("cast", "one position", "rows first", "other rows")]
)
def test_every_rank_has_the_loss_and_the_gradients(name: str, mesh: dict[str, int]) -> None:
    program = check_pipeline(model(LOSSES[name]), inputs(), mesh, attention="ring" if "cp" in mesh else "auto")
    (node,) = nodes_of(program, OP)
    call = LinearCrossEntropyCall.of(node)
    rows, _, classes = call.sizes
    length = S - (name == "shifted")
    assert classes == -(-C // mesh.get("tp", 1))
    chunks = 2 * mesh.get("cp", 1)  # zigzag
    assert rows <= B // mesh.get("dp", 1) * (2 * -(-S // chunks) if chunks > 2 else length)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_a_z_loss_on_all_ranks(mesh: dict[str, int]) -> None:
    check_pipeline(model(with_z_loss), inputs(), mesh, attention="ring" if "cp" in mesh else "auto")
