"""capture: a pure graph of pre-dispatch ATen, with the meaning of the Dynamo graph."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from example_numerics import assert_equal, captured, on_one_device
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

from spcompile.capture.retrace import capture
from spcompile.diagnostics import source_of
from spcompile.graph.printer import op_name
from spcompile.report.example_runs import with_dynamo_graph


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def ops(gm: fx.GraphModule) -> list[str]:
    return [op_name(n) for n in gm.graph.nodes if n.op == "call_function"]


def captures(function: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
    """The captured graph; its numbers are checked."""

    def work(gm: fx.GraphModule, given: Any) -> fx.GraphModule:
        found = capture(gm, given)
        assert_equal(on_one_device(found, given), on_one_device(gm.forward, given))
        return found

    return with_dynamo_graph(function, inputs, work)


def test_composite_ops_stay_one_node() -> None:
    def model(h: Tensor, w: Tensor, labels: Tensor) -> Tensor:
        h = F.layer_norm(F.linear(h, w), (4,)).unsqueeze(1)
        y = F.scaled_dot_product_attention(h, h, h)
        return F.cross_entropy(y.flatten(0, 2), labels)

    found = ops(captures(model, x(2, 3, 4), x(4, 4), torch.randint(0, 4, (6,))))
    assert [name.split(".")[1] for name in found if "unsqueeze" not in name and "reshape" not in name] == [
        "linear",
        "layer_norm",
        "scaled_dot_product_attention",
        "cross_entropy_loss",
    ]


def test_nodes_know_the_line_that_made_them() -> None:
    gm = captures(lambda h: h.sin(), x(3))  # this line
    (node,) = [n for n in gm.graph.nodes if n.op == "call_function"]
    source = source_of(node)
    assert source is not None
    assert source.text.endswith("# this line")


def test_mutations_are_functionalised() -> None:
    def model(h: Tensor) -> Tensor:
        y = h * 2
        y.add_(1.0)
        y[:, 0] = 0.0
        y.masked_fill_(y > 2, 2.0)
        return y

    gm = captures(model, x(3, 4))
    assert not [n for n in gm.graph.nodes if n.op == "call_function" and n.target._schema.is_mutable]


def test_a_mutated_input_is_written_back() -> None:
    def model(h: Tensor, count: Tensor) -> Tensor:
        count.add_(1)
        return h * count

    def work(gm: fx.GraphModule, given: Any) -> list[Tensor]:
        found = capture(gm, given)
        copies = [value.detach().clone() for value in given]
        found(*copies)
        return copies

    counts = with_dynamo_graph(model, [x(3), torch.tensor(4.0)], work)
    assert 5.0 in [float(value) for value in counts if value.ndim == 0]


def test_no_grad_becomes_detach_on_what_leaves_the_region() -> None:
    def model(h: Tensor) -> Tensor:
        with torch.no_grad():
            inner = (h * 3).sin()
        return h * inner

    gm = captures(model, x(3, 4))
    assert ops(gm) == ["aten.mul", "aten.sin", "aten.detach", "aten.mul"]


def test_views_become_reshapes_and_nothing_is_left_without_meaning() -> None:
    gm = captures(lambda h: h.view(12).clone().contiguous().view(4, 3).sin(), x(3, 4))
    assert ops(gm) == ["aten.reshape", "aten.reshape", "aten.sin"]


def test_copies_are_what_was_copied_in_dtype_and_shape_of_the_target() -> None:
    """`copy` has no derivative as it stands; what it means has one."""

    def model(h: Tensor, row: Tensor) -> Tensor:
        whole = torch.zeros(3, 4, dtype=torch.float32)
        whole.copy_(row)
        same = torch.empty_like(h)
        same.copy_(h.sin())
        return whole.double() + same

    gm = captures(model, x(3, 4), x(4))
    found = ops(gm)
    assert not [name for name in found if "copy" in name and "_to_copy" not in name]
    assert "aten.expand_as" in found
    assert "aten.to" in found


def test_operands_of_losses_are_broadcast_one_by_one() -> None:
    gm = captures(lambda h, y: torch.nn.functional.mse_loss(h, y), x(3, 4), x(3, 4))
    assert ops(gm) == ["aten.mse_loss"]
    gm = captures(lambda h, row: sum(torch.broadcast_tensors(h, row)), x(3, 4), x(4))
    assert "aten.broadcast_tensors" not in ops(gm)
    assert "aten.expand_as" in ops(gm)


def test_type_as_is_a_cast_to_a_known_dtype() -> None:
    gm = captures(lambda h, like: h.type_as(like).double(), x(3), torch.zeros(2, dtype=torch.float32))
    cast = next(n for n in gm.graph.nodes if n.target is torch.ops.aten.to.dtype)
    assert cast.args[1] is torch.float32
    assert "aten.type_as" not in ops(gm)


def test_an_output_that_is_a_clone_stays_its_own_tensor() -> None:
    assert ops(captures(lambda h: h.sin().clone(), x(3))) == ["aten.sin", "aten.clone"]


def test_constants_are_folded() -> None:
    gm = captures(lambda h: h * torch.tensor(8.0, dtype=torch.float64), x(3))
    assert ops(gm)[0] == "aten.full"
    assert not [n for n in gm.graph.nodes if n.op == "get_attr"]


def test_checkpointed_regions_are_opened_with_their_tags() -> None:
    def block(h: Tensor, w: Tensor) -> Tensor:
        return (h @ w).sin()

    def model(h: Tensor, w: Tensor) -> Tensor:
        h = checkpoint(block, h, w, use_reentrant=False)
        return checkpoint(block, h, w, use_reentrant=False).cos()

    gm = captures(model, x(3, 4), x(4, 4))
    tags = {n.name: n.meta.get("recompute") for n in gm.graph.nodes if n.op == "call_function"}
    assert tags == {
        "matmul": CheckpointPolicy.PREFER_RECOMPUTE,
        "sin": CheckpointPolicy.PREFER_RECOMPUTE,
        "matmul_1": CheckpointPolicy.PREFER_RECOMPUTE,
        "sin_1": CheckpointPolicy.PREFER_RECOMPUTE,
        "cos": None,
    }
    regions = [n.meta.get("ac_graph_id") for n in gm.graph.nodes if n.op == "call_function"]
    assert len(set(regions)) == 3  # two regions and outside


def test_placeholders_keep_the_names_of_dynamo() -> None:
    def work(gm: fx.GraphModule, given: Any) -> tuple[list[str], list[str]]:
        graphs = gm, capture(gm, given)
        first, second = ([n.name for n in g.graph.nodes if n.op == "placeholder"] for g in graphs)
        return first, second

    first, second = with_dynamo_graph(lambda h, w: h @ w, [x(3, 4), x(4, 4)], work)
    assert first == second


def test_a_marked_length_stays_a_symbol() -> None:
    h = x(2, 7, 4)
    torch._dynamo.mark_dynamic(h, 1)
    found: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, given: Any) -> Any:
        found.append(capture(gm, given))
        return gm.forward

    torch.compile(lambda h: h.reshape(-1, 4) * 2, backend=backend, fullgraph=True)(h)
    (gm,) = found
    symbols = [n for n in gm.graph.nodes if n.op == "placeholder" and isinstance(n.meta["val"], torch.SymInt)]
    assert len(symbols) == 1
    assert all("val" in n.meta for n in gm.graph.nodes if n.op != "output")


def test_several_results() -> None:
    gm = captures(lambda h: h.split(2, 1)[0] * h.aminmax(dim=1)[1][:, None], x(3, 4))
    assert [n.target for n in gm.graph.nodes if n.op == "call_function"].count(operator.getitem) >= 1


def test_code_without_lines_is_captured() -> None:
    space: dict[str, Any] = {}
    exec("def model(h):\n    return h.sin()", space)
    gm = captured(space["model"], x(3))
    assert all(n.meta.get("stack_trace") or n.meta.get("spx_origin") for n in gm.graph.nodes if n.op == "call_function")


@pytest.mark.thinned(2)
def test_vmap_is_written_out() -> None:
    """Its batching levels are gone, nested ones too, and what encloses the region stays."""

    def scan_step(a: Tensor, b: Tensor) -> Tensor:
        return a * b.sin() + a.sum(0) + torch.tensor([1.0, 2.0], dtype=torch.float64).sum()

    def model(a: Tensor, b: Tensor) -> Tensor:
        once = torch.vmap(scan_step, in_dims=1, out_dims=1)(a.exp(), b)
        return torch.vmap(torch.vmap(scan_step))(once.unsqueeze(0), b.unsqueeze(0)).cos()

    found = captures(model, x(3, 4, 2), x(3, 4, 2))
    assert not [name for name in ops(found) if "vmap" in name or "batch_dim" in name]
    assert source_of(next(n for n in found.graph.nodes if op_name(n) == "aten.sin")) is not None


def test_an_input_that_is_written_to_is_read_from_a_copy() -> None:
    def model(h: Tensor, scale: Tensor) -> Tensor:
        y = h + scale
        with torch.no_grad():
            scale.mul_(0.5)
        return y + h * scale

    found = captures(model, x(3), torch.rand(3, dtype=torch.float64))
    (scale,) = [n for n in found.graph.find_nodes(op="placeholder") if not n.meta["trainable"]]
    assert sorted(op_name(user) for user in scale.users) == ["aten.clone", "aten.copy_"]


def test_writes_by_a_mask_of_bools_have_no_index_put() -> None:
    def model(h: Tensor, marked: Tensor, rows: Tensor) -> Tensor:
        h = h.sin()
        h[marked] = rows
        h[~marked] = 2.0
        return h.index_put((marked,), rows, accumulate=True)

    marked = torch.tensor([True, False, True, True])
    gm = captures(model, x(4, 3), marked, x(3, 3))
    assert "aten.index_put" not in ops(gm)
    counts_of_others = gm(x(4, 3), torch.tensor([True, False, False, True]), x(3, 3))
    assert bool(torch.stack(list(counts_of_others)).isnan().any()), "the plain model fails: numbers would be made up"


def test_what_dropout_gives_may_be_written_to() -> None:
    def model(h: Tensor, r: Tensor, training: bool) -> Tensor:
        h = F.dropout(h.sin(), 0.5, training)
        h += r
        return h

    assert ops(captured(lambda h, r: model(h, r, True), x(3), x(3))) == ["aten.sin", "aten.dropout", "aten.add"]
    assert ops(captures(lambda h, r: model(h, r, False), x(3), x(3))) == ["aten.sin", "aten.add"]
