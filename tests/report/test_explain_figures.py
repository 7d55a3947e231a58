"""`explain`: bytes and sizes that are exactly those of the graphs."""

from __future__ import annotations

import json

import explained
import pytest
import sympy
import torch
from explained import VOCAB, WIDTH, Model, plan_of
from torch import Tensor, nn

from spcompile import explain
from spcompile.report.plan import Plan


def total(plan: Plan, **wanted: str) -> sympy.Expr:
    rows = [row for row in plan.collectives if all(getattr(row, key) == value for key, value in wanted.items())]
    return sum((row.bytes for row in rows), sympy.Integer(0))


@pytest.mark.thinned(6)
@pytest.mark.parametrize("degree", [2, 4])
def test_bytes_of_a_causal_ring(degree: int) -> None:
    """Keys and values go once round the ring forward; backward they go again, and float32 gradients once more."""
    length, layers, rows = 64, 2, 3
    plan = plan_of(degree, length, layers, rows, attention="ring")
    message = rows * (length // degree) * 2 * WIDTH * 4
    assert total(plan, op="ring_attention") == layers * (degree - 1) * message
    assert total(plan, op="ring_attention_backward") == layers * (2 * (degree - 1) + 1) * message
    ring = next(row for row in plan.collectives if row.op == "ring_attention")
    assert (ring.axis, ring.phase, ring.count, ring.origin) == ("cp", "forward", layers, "attention")
    assert ring.layer == "layers.*"
    assert ring.source is not None
    assert "scaled_dot_product_attention" in ring.source.text


@pytest.mark.thinned(8)
@pytest.mark.parametrize("degree", [2, 4])
def test_bytes_of_ulysses(degree: int) -> None:
    """q, k, v in one message and the result in another, of each of which 1/degree stays; backward the result again."""
    length, layers = 64, 2
    plan = plan_of(degree, length, layers, attention="ulysses")
    one = layers * (length // degree) * WIDTH * 4 * (degree - 1) // degree
    for phase, tensors, messages in (("forward", 4, 2), ("backward", 4 + 1, 2 + 1)):
        assert total(plan, op="all_to_all", phase=phase) == tensors * one
        rows = [row for row in plan.collectives if (row.op, row.phase) == ("all_to_all", phase)]
        assert sum(row.count for row in rows) == messages * layers
    assert total(plan, origin="activation again") == one


@pytest.mark.thinned(4)
def test_every_parameter_gradient_is_summed_once() -> None:
    plan = plan_of(4)
    size = sum(p.numel() * p.element_size() for p in Model().parameters())
    assert total(plan, origin="parameter gradient", op="all_reduce") == sympy.Rational(2 * 3, 4) * size
    assert plan.memory.parameter_bytes == plan.memory.gradient_bytes == size
    assert plan.memory.peak_bytes > size + plan.memory.saved_activation_bytes


@pytest.mark.thinned(2)
def test_one_rank_sends_nothing_and_saves_what_one_device_saves() -> None:
    plan = plan_of(1)
    assert plan.collectives == []
    assert plan.memory.saved_activation_bytes == plan.memory.saved_activation_bytes_one_device > 0
    assert "SPR401" in {remark.code for remark in plan.remarks}
    assert [row.strategy for row in plan.attention] == ["one device"]
    assert "not sharded" in str(plan)


@pytest.mark.thinned(9)
@pytest.mark.parametrize("attention", ["ring", "ulysses"])
def test_saved_activations_are_divided_by_the_mesh(attention: str) -> None:
    memory = plan_of(4, 256, attention=attention).memory
    ratio = float(memory.saved_activation_bytes_one_device / memory.saved_activation_bytes)
    assert ratio == pytest.approx(4, rel=0.02)


def test_saved_bytes_of_one_device_are_those_that_autograd_saves() -> None:
    """Counted by hand for one linear layer: its input, behind a gelu, and the gelu's input."""

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 24, bias=False), nn.Linear(24, 8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).relu())

    plan = explain(Small(), (torch.randn(2, 5, 8),), mesh={"cp": 2})
    assert plan.memory.saved_activation_bytes == 2 * 5 * 24 * 4
    assert "SPR101" in {remark.code for remark in plan.remarks}
    assert plan.sharding.sharded_ops == 0


@pytest.mark.thinned(5)
def test_no_tensor_is_larger_than_a_shard() -> None:
    plan = plan_of(8, 4096, outputs="loss")
    assert plan.largest_tensors[0].numel == 4096 // 8 * max(3 * WIDTH, VOCAB)
    source = plan.largest_tensors[0].source
    assert source is not None
    assert source.file == explained.__file__


@pytest.mark.thinned(10)
def test_a_llama_at_128k_in_a_minute() -> None:
    """On meta, as large as it is: nothing is computed, and no tensor is larger than 1/8 of the largest activation."""
    transformers = pytest.importorskip("transformers")
    length, hidden, ffn, vocab = 131072, 1024, 2816, 32000
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=4,
        intermediate_size=ffn,
        vocab_size=vocab,
        max_position_embeddings=length,
        use_cache=False,
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        ids = torch.zeros(1, length, dtype=torch.int64)
    plan = explain(model, {"input_ids": ids, "labels": ids}, mesh={"cp": 8}, outputs="loss", attention="ring")
    assert plan.largest_tensors[0].numel <= length // 8 * max(hidden, ffn, vocab)
    assert [row.mask for row in plan.attention] == ["causal"]
    assert sum(row.milliseconds for row in plan.passes) < 60_000


@pytest.mark.slow
@pytest.mark.thinned(3)
def test_figures_of_a_dynamic_length_are_expressions_of_it() -> None:
    with torch.device("meta"):
        model, ids = Model(), torch.zeros(1, 64, dtype=torch.int64)
    static = explain(model, (ids,), mesh={"cp": 2}, attention="ring")
    torch._dynamo.mark_dynamic(ids, 1)
    plan = explain(model, (ids,), mesh={"cp": 2}, attention="ring")
    (symbol,) = plan.symbols
    assert plan.symbols[symbol] == "size 1 of input 0"

    def at_64(size: sympy.Expr) -> int:
        return int(size.subs(dict.fromkeys(size.free_symbols, 64)).doit())

    assert {str(x) for x in plan.memory.saved_activation_bytes.free_symbols} == {symbol}
    kept = ("saved_activation_bytes", "saved_activation_bytes_one_device", "parameter_bytes", "gradient_bytes")
    for name in kept:  # masked copies of padding, which 64 does not have, are not saved
        assert at_64(getattr(plan.memory, name)) == getattr(static.memory, name)
    assert at_64(plan.memory.peak_bytes) > sum(at_64(getattr(plan.memory, name)) for name in (kept[0], *kept[2:]))
    ring = {row.phase: row.bytes for row in plan.collectives if row.origin == "attention"}
    for row in static.collectives:
        if row.origin == "attention":
            assert at_64(ring[row.phase]) == row.bytes
    assert isinstance(json.loads(json.dumps(plan.to_dict()))["memory"]["saved_activation_bytes"], str)


@pytest.mark.thinned(5)
def test_weight_memory_of_drop_in_tp_is_remarked() -> None:
    with torch.device("meta"):
        model = Model(layers=1)
    plan = explain(model, {"ids_BS": torch.zeros(1, 64, dtype=torch.int64, device="meta")}, mesh={"tp": 2})
    (remark,) = [r for r in plan.remarks if r.code == "SPR505"]
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    held = int(remark.text.rsplit(" ", 1)[1].replace(",", ""))
    assert f"{whole:,}" in remark.text
    assert whole / 2 < held < 0.75 * whole
    assert not [r for r in plan_of(2, layers=1).remarks if r.code == "SPR505"]
