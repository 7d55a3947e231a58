"""spx.linear_cross_entropy against the logits, built: results, gradients, chunks, and what stands while it runs."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from made_tensors import MadeTensors
from torch import Tensor

from spcompile.losses.linear_cross_entropy import linear_cross_entropy, wide
from spcompile.losses.linear_loss_call import LinearCrossEntropyCall
from spcompile.losses.logit_steps import LogitSteps
from spcompile.losses.row_chunks import chunks_of_rows, rows_of_chunk, symbolic_rows_of_chunk

N, D, C = 37, 8, 50
SOFTCAP = "div 30.0, tanh, mul 30.0"


def operands(dtype: torch.dtype, rows: tuple[int, ...] = (3, N)) -> dict[str, Any]:
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*shape, dtype=dtype).requires_grad_() for shape in ((*rows, D), (C, D), (C,)))
    labels = torch.randint(0, C, rows)
    labels[0, :5] = -100
    return {"x": x, "weight": weight, "bias": bias, "labels": labels, "classes": C}


def built(call: LinearCrossEntropyCall) -> tuple[Tensor, ...]:
    """The three results from all logits."""
    z = F.linear(call.x, call.weight, call.bias)
    for step in call.logit_steps.steps:
        z = {"to": lambda z: z.to(step.dtype), "tanh": Tensor.tanh}.get(  # noqa: B023
            step.op,
            lambda z: z * step.number if step.op == "mul" else z / step.number,  # noqa: B023
        )(z)
    z = z.to(wide(z.dtype))
    is_class = call.labels != call.ignore_index
    picked = z.gather(-1, call.labels.where(is_class, 0).unsqueeze(-1)).squeeze(-1).where(is_class, 0)
    weights = torch.ones(C, dtype=z.dtype) if call.class_weight is None else call.class_weight.to(z.dtype)
    return z.logsumexp(-1), picked, z @ weights if call.with_total else torch.zeros_like(picked)


def gradients(call: LinearCrossEntropyCall, results: tuple[Tensor, ...]) -> list[Tensor]:
    torch.manual_seed(1)
    pairs = [(result, torch.randn(result.shape, dtype=result.dtype)) for result in results if result.requires_grad]
    leaves = [x for x in (call.x, call.weight, call.bias) if x is not None and x.requires_grad]
    return list(torch.autograd.grad([r for r, _ in pairs], leaves, [g for _, g in pairs]))


def assert_equal(found: Any, wanted: Any, tolerance: float) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        assert float((a - b).detach().abs().max()) <= tolerance * max(1.0, float(b.detach().abs().max()))


@pytest.mark.thinned(3)
@pytest.mark.parametrize("more", [{}, {"bias": None}, {"with_total": True}, {"with_total": True, "class_weight": 1}])
@pytest.mark.parametrize("steps", ["", "to float64", SOFTCAP, "tanh, tanh, mul 2.0", "mul 0.5, tanh"])
def test_results_and_gradients_in_float64(steps: str, more: dict[str, Any]) -> None:
    if "class_weight" in more:
        more = {**more, "class_weight": torch.rand(C, dtype=torch.float64)}
    call = LinearCrossEntropyCall(**{**operands(torch.float64), "steps": steps, **more})
    found, wanted = call.run(), built(call)
    assert_equal([*found, *gradients(call, found)], [*wanted, *gradients(call, wanted)], 1e-12)


@pytest.mark.parametrize("steps", ["", "to float32", f"to float32, {SOFTCAP}", SOFTCAP])
def test_half_precision_rounds_as_the_logits_did(steps: str) -> None:
    call = LinearCrossEntropyCall(**operands(torch.bfloat16), steps=steps)
    found, wanted = call.run(), built(call)
    assert found[0].dtype == torch.float32
    assert_equal(found, wanted, 1e-6)
    assert_equal(gradients(call, found), gradients(call, wanted), 2**-8)


def test_half_precision_is_near_float32() -> None:
    given = operands(torch.bfloat16, (2, 200))
    with torch.no_grad():
        given["x"] /= 8  # logits around 1, of which bfloat16 keeps the digits that the softmax shows
    exact = {name: x.float().detach().requires_grad_() for name, x in given.items() if name in ("x", "weight", "bias")}
    call, reference = LinearCrossEntropyCall(**given), LinearCrossEntropyCall(**{**given, **exact})
    found, wanted = call.run(), built(reference)
    assert_equal(found, wanted, 2**-8)
    of_wanted = [grad.bfloat16() for grad in gradients(reference, wanted)]
    for a, b in zip(gradients(call, found), of_wanted, strict=True):
        assert float((a.float() - b.float()).norm()) <= 2**-8 * float(b.float().norm())


def test_the_gradient_of_the_weight_is_added_up_in_float32() -> None:
    """Of 4096 equal rows in many chunks; sums in bfloat16 would stop growing at 256 times the first."""
    rows = 4096
    x = torch.ones(rows, D, dtype=torch.bfloat16)
    weight = torch.zeros(C, D, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(rows, dtype=torch.int64)
    assert rows // rows_of_chunk(rows, D, C) > 4
    _, picked, _ = LinearCrossEntropyCall(x=x, weight=weight, labels=labels, classes=C).run()
    (found,) = torch.autograd.grad(picked.sum(), weight)
    assert torch.equal(found[0], torch.full((D,), float(rows), dtype=torch.bfloat16))


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_what_is_frozen_has_no_gradient(frozen: str) -> None:
    given = operands(torch.float64)
    given[frozen] = given[frozen].detach()
    call = LinearCrossEntropyCall(**given)
    found, wanted = call.run(), built(call)
    assert_equal(gradients(call, found), gradients(call, wanted), 1e-12)


def test_operands_may_be_strided() -> None:
    given = operands(torch.float64)
    given["x"] = given["x"].transpose(0, 1)
    given["labels"] = given["labels"].t()
    given["weight"] = torch.randn(D, C, dtype=torch.float64).t().requires_grad_()
    call = LinearCrossEntropyCall(**given)
    found, wanted = call.run(), built(call)
    assert_equal([*found, *gradients(call, found)], [*wanted, *gradients(call, wanted)], 1e-12)


def test_a_class_that_is_excluded_everywhere() -> None:
    given = operands(torch.float64)
    with torch.no_grad():
        given["bias"][7] = -torch.inf
    given["labels"] = torch.where(given["labels"] == 7, 8, given["labels"])
    call = LinearCrossEntropyCall(**given)
    found, wanted = call.run(), built(call)
    assert_equal([*found, *gradients(call, found)], [*wanted, *gradients(call, wanted)], 1e-12)


def test_ranks_that_exclude_all_their_classes_and_ranks_with_nothing_but_padding() -> None:
    given = operands(torch.float64)
    for first, classes, bias in ((0, C, torch.full((C,), -torch.inf)), (C, C, torch.zeros(C))):
        call = LinearCrossEntropyCall(
            **{**given, "classes": classes, "bias": bias.double().requires_grad_(), "first": torch.tensor(first)}
        )
        lse, picked, _ = call.run()
        assert not lse.isnan().any()
        assert first == 0 or bool((picked == 0).all())
        assert all(not grad.isnan().any() for grad in gradients(call, (lse, picked)))


@pytest.mark.parametrize("label", [C, -1])
def test_a_label_that_is_no_class_is_the_error_that_torch_has(label: int) -> None:
    given = operands(torch.float64)
    given["labels"][2, 3] = label
    with pytest.raises(IndexError, match=f"Target {label} is out of bounds"):
        LinearCrossEntropyCall(**given).run()


def test_the_op_is_registered_as_torch_wants_it() -> None:
    given = LinearCrossEntropyCall(**operands(torch.float32), with_total=True)
    torch.library.opcheck(linear_cross_entropy, tuple(given.named().values()))


@pytest.mark.parametrize("shape", [(1, N), (3, N - 1), (3 * N,)])
def test_labels_of_other_rows_are_refused(shape: tuple[int, ...]) -> None:
    given = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in operands(torch.float32).items()}
    given["labels"] = torch.zeros(shape, dtype=torch.int64, device="meta")
    with pytest.raises(RuntimeError, match="for rows of"):
        LinearCrossEntropyCall(**given).run()


def test_double_backward_is_refused() -> None:
    call = LinearCrossEntropyCall(**operands(torch.float64))
    lse, *_ = call.run()
    (grad,) = torch.autograd.grad(lse.sum(), call.x, create_graph=True)
    with pytest.raises(NotImplementedError, match="once only"):
        grad.sum().backward()


@pytest.mark.thinned(5)
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 1000, 10**5])
@pytest.mark.parametrize("classes", [1, 7, 130_000])
@pytest.mark.parametrize("width", [1, 64, 8192])
def test_chunks_cover_all_rows_and_none_has_all_of_them(rows: int, classes: int, width: int) -> None:
    chunks = list(chunks_of_rows(rows, width, classes))
    places = [(chunk.start, chunk.stop) for chunk in chunks]
    assert [start for start, _ in places] == [0, *[stop for _, stop in places[:-1]]][: len(places)]
    assert not chunks or places[-1][1] == rows
    assert rows < 2 or len(chunks) >= 2
    elements = rows_of_chunk(rows, width, classes) * classes
    assert elements <= max(classes, (rows + classes) * width / 8)
    N, D, C = sympy.symbols("N D C", integer=True, positive=True)
    if rows:
        at = symbolic_rows_of_chunk(N, D, C).subs({N: rows, D: width, C: classes})
        assert at == rows_of_chunk(rows, width, classes)


def test_steps_are_read_back() -> None:
    text = f"to float32, {SOFTCAP}"
    assert str(LogitSteps.parse(text)) == text
    assert LogitSteps.parse("") == LogitSteps()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", ["", f"to float32, {SOFTCAP}"])
def test_no_tensor_has_as_many_elements_as_the_logits(dtype: torch.dtype, steps: str) -> None:
    call = LinearCrossEntropyCall(**operands(dtype, (2, 30)), steps=steps, with_total=True)
    with MadeTensors() as elements:
        results = call.run()
        gradients(call, results)
    assert C * D <= elements.most < 60 * C


def test_the_logits_are_found_where_they_stand() -> None:
    call = LinearCrossEntropyCall(**operands(torch.float32, (2, 30)))
    with MadeTensors() as elements:
        built(call)
    assert elements.most >= 60 * C
