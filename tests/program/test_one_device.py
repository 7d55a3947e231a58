"""World size 1: the compiled model is the plain one in numbers, without dense masks; failures change nothing."""

from __future__ import annotations

import copy
import gc
import logging
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from recognition import difference, qkv
from torch import Tensor, nn

import spcompile.program.one_device
from spcompile.diagnostics import ChangedBuffer
from spcompile.program.build import LocalProgram
from spcompile.program.observed import observed

LENGTH = 12


def keep(q: Tensor, k: Tensor, m: Tensor) -> Tensor:
    return torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril() & m[:, None, None, :].bool()


def masked_sdpa(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep(q, k, m))


def causal_by_hand(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    i = torch.arange(q.shape[2])
    scores = torch.tanh(q @ k.mT / 4) * 4
    return scores.masked_fill(i > i[:, None], -math.inf).softmax(-1) @ (v * m.sum())


def dense_causal_sdpa(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    i = torch.arange(q.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=i <= i[:, None]) * m.sum()


def counted(q: Tensor, k: Tensor, v: Tensor, m: Tensor, calls: Tensor) -> tuple[Tensor, Tensor]:
    calls.add_(1)
    return masked_sdpa(q, k, v, m), calls * 2


def compiled(
    function: Callable[..., Any], inputs: tuple[Tensor, ...], **options: Any
) -> tuple[Callable[..., Any], list[LocalProgram]]:
    """The compiled function and what was recognised in it, after a first call."""
    torch._dynamo.reset()
    run = torch.compile(function, backend="spcompile", options={"compiler": "eager", **options})
    with observed() as programs:
        run(*[x.clone() for x in inputs])
    return run, [program for program, _ in programs]


def squares(program: LocalProgram) -> list[str]:
    values = [(n, n.meta.get("val")) for n in program.gm.graph.nodes]
    return [n.name for n, v in values if isinstance(v, Tensor) and tuple(v.shape[-2:]) == (LENGTH, LENGTH)]


def check(function: Callable[..., Any], run: Callable[..., Any], inputs: tuple[Tensor, ...]) -> None:
    results = []
    for each in (function, run):
        given = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
        outputs = each(*given)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = sum(
            (x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)).sum() for x in outputs if x.requires_grad
        )
        grads = torch.autograd.grad(loss, [x for x in given if x.requires_grad])  # type: ignore[arg-type]
        results.append([*outputs, *grads, *given])
    for a, b in zip(*results, strict=True):
        assert difference(a, b) < 1e-12


MASK = (torch.arange(LENGTH) < torch.tensor([[LENGTH], [7]])).long()


@pytest.mark.thinned(4, covers=["compiler"])
@pytest.mark.parametrize("compiler", ["eager", "inductor"])
@pytest.mark.parametrize("function", [masked_sdpa, causal_by_hand, dense_causal_sdpa, counted])
def test_no_dense_mask_is_left(function: Callable[..., Any], compiler: str) -> None:
    inputs = (*qkv(), MASK, *([torch.ones(3)] if function is counted else []))
    run, programs = compiled(function, inputs, compiler=compiler)
    (program,) = programs
    assert not squares(program)
    check(function, run, inputs)


@pytest.mark.thinned(3)
def test_a_program_is_gone_with_the_code_that_was_made_of_it() -> None:
    run, programs = compiled(masked_sdpa, (*qkv(), MASK))
    gone = weakref.ref(programs.pop())
    torch._dynamo.reset()
    del run
    gc.collect()
    assert gone() is None


def test_what_a_plain_kernel_does_goes_back_to_it() -> None:
    _, (program,) = compiled(dense_causal_sdpa, (*qkv(), MASK))
    targets = {node.target for node in program.gm.graph.nodes}
    assert torch.ops.aten.scaled_dot_product_attention.default in targets
    assert torch.ops.spx.attention.default not in targets


def test_a_graph_without_masks_is_compiled_as_it_is() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    run, programs = compiled(model, qkv())
    assert not programs
    check(model, run, qkv())


def test_a_mask_that_cannot_be_read_is_compiled_as_it_is() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=m)

    inputs = (*qkv(), torch.rand(2, 1, LENGTH, LENGTH) < 0.7)
    run, programs = compiled(model, inputs)
    assert not programs
    check(model, run, inputs)


def test_a_failure_of_recognition_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any) -> None:
        raise NotImplementedError("an op nobody knows")

    monkeypatch.setattr(spcompile.program.one_device, "build", fails)
    inputs = (*qkv(), MASK)
    with caplog.at_level(logging.WARNING):
        run, programs = compiled(masked_sdpa, inputs)
    assert not programs
    assert "SPR402" in caplog.text
    check(masked_sdpa, run, inputs)


def test_a_graph_break_is_no_error() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        y = masked_sdpa(q, k, v, m)
        torch._dynamo.graph_break()
        return masked_sdpa(y, k, v, m)

    inputs = (*qkv(), MASK)
    run, programs = compiled(model, inputs)
    assert len(programs) == 2
    check(model, run, inputs)


def test_dropout_follows_the_seed_forward_and_backward() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keep(q, k, m), dropout_p=0.5)

    inputs = (*qkv(), MASK)
    run, _ = compiled(model, inputs)
    direction = torch.randn(2, 4, LENGTH, 6, dtype=torch.float64)

    def loss(step: float) -> Tensor:
        torch.manual_seed(5)
        given = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
        out = run(given[0] + step * direction, *given[1:]).square().sum()
        return out if step else torch.autograd.grad(out, given[0])[0].mul(direction).sum()

    slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    torch.testing.assert_close(loss(0.0), slope.detach(), rtol=1e-7, atol=1e-7)


@pytest.mark.thinned(8)
def test_a_hugging_face_model_with_padding() -> None:
    import transformers as T

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = T.LlamaForCausalLM(T.LlamaConfig(**sizes, vocab_size=60, attn_implementation="eager"))
    other: Any = copy.deepcopy(model)
    other.compile(backend="spcompile", options={"compiler": "eager"})
    ids = torch.randint(1, 60, (2, LENGTH))
    batch = {"input_ids": ids, "attention_mask": MASK, "labels": ids, "use_cache": False}
    with observed() as programs:
        losses = [each(**batch).loss for each in (model, other)]
    for loss in losses:
        loss.backward()
    ((program, _),) = programs
    assert not squares(program)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)
    for a, b in zip(other.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


class Buffered(torch.nn.Module):
    """Keeps its mask, as many older models do."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = torch.nn.Buffer(torch.ones(1, 1, 20, 20, dtype=torch.bool).tril().triu(-3), persistent=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        lowest = torch.tensor(torch.finfo(q.dtype).min, dtype=q.dtype, device=q.device)
        keep = self.mask[:, :, k.shape[2] - q.shape[2] : k.shape[2], : k.shape[2]]
        return torch.where(keep, q @ k.mT, lowest).softmax(-1) @ v


def test_a_mask_in_a_buffer_is_read_and_watched() -> None:
    model = Buffered()
    run, (program,) = compiled(model, qkv())
    assert not squares(program)
    (node,) = program.gm.graph.find_nodes(op="call_function", target=torch.ops.spx.attention.default)
    assert node.args[9] == "causal window=4"
    check(model, run, qkv())
    model.mask.copy_(model.mask.clone())
    check(model, run, qkv())
    model.mask[..., 3, 0] = False
    with pytest.raises(ChangedBuffer, match="SP403"):
        run(*qkv())
    with torch.no_grad():
        model.mask.copy_(torch.ones_like(model.mask).tril().triu(-3))
    check(model, run, qkv())


def test_a_buffer_that_is_no_band_stays_data() -> None:
    model = Buffered()
    model.mask[..., 5, 3] = False
    run, programs = compiled(model, qkv())
    assert not programs
    check(model, run, qkv())


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_a_mode_is_refused_by_name(mode: str) -> None:
    model = torch.compile(nn.Linear(2, 2), backend="spcompile", mode=mode)
    with pytest.raises(Exception, match=f"SP102 .*mode='{mode}': not supported"):
        model(torch.ones(1, 2))


@pytest.mark.thinned(4)
@pytest.mark.parametrize(("dynamic", "compiles"), [(True, 1), (False, 2)])
def test_dynamic_is_obeyed(dynamic: bool, compiles: int) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run = torch.compile(causal_by_hand, backend="spcompile", options={"compiler": "eager"}, dynamic=dynamic)
    for length in (12, 14):
        q = torch.randn(2, 2, length, 4)
        assert difference(run(q, q, q, torch.ones(2)), causal_by_hand(q, q, q, torch.ones(2))) < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiles


def test_fullgraph_is_obeyed() -> None:
    def broken(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x.sin()

    run = torch.compile(broken, backend="spcompile", options={"compiler": "eager"}, fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        run(torch.ones(2))
