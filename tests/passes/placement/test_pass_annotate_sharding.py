"""annotate-context-parallel: the sequence is found from attention alone, through views, in both directions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from example_numerics import after_pass, nodes_of, remarks_of
from torch import Tensor

from spcompile.program.build import LocalProgram
from spcompile.sharding.layout import layout_of


def places(program: LocalProgram) -> dict[str, str]:
    """Name of a node -> where cp splits it, "-" where it does not."""
    return {n.name: (n.meta.get("sharding") or {}).get("cp", "-") for n in program.gm.graph.nodes}


def attend(h: Tensor) -> Tensor:
    h = h.unsqueeze(1)
    return F.scaled_dot_product_attention(h, h, h).squeeze(1)


def test_every_value_between_inputs_and_loss_is_placed() -> None:
    def model(x: Tensor, w: Tensor) -> Tensor:
        return attend(x @ w).reshape(-1, 4) @ w

    found = places(after_pass("annotate-context-parallel", model, [torch.randn(2, 7, 4), torch.randn(4, 4)]))
    assert found["l_x_"] == "S(1)"
    assert found["l_w_"] == "-"
    assert found["matmul_1"] == "S(0.1)"  # the second factor of batch * sequence


def test_queries_keys_and_mask_rows() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    inputs = [*(torch.randn(2, 2, 7, 4) for _ in range(3)), torch.randn(1, 1, 7, 7)]
    found = places(after_pass("annotate-context-parallel", model, inputs))
    assert [found[f"l_{name}_"] for name in ("q", "k", "v")] == ["S(2)"] * 3
    assert found["l_bias_"] == "S(2)"  # rows of queries; columns stay whole


def test_cross_attention_splits_both_lengths() -> None:
    def model(q: Tensor, m: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, m, m)

    found = places(after_pass("annotate-context-parallel", model, [torch.randn(2, 2, 7, 4), torch.randn(2, 2, 5, 4)]))
    assert found["l_q_"] == found["l_m_"] == "S(2)"


def test_a_prefix_keeps_the_layout_of_the_whole() -> None:
    program = after_pass("annotate-context-parallel", lambda x: attend(x)[:, :-1] * 2, [torch.randn(2, 7, 4)])
    (product,) = nodes_of(program, "aten.mul")
    layout = layout_of(product)
    assert layout is not None
    assert str(layout.place("cp")) == "S(1)"
    space = layout.dims[0][1][0]
    assert space.find().size == 6
    assert space.family().size == 7


def test_without_attention_nothing_is_placed() -> None:
    program = after_pass("annotate-context-parallel", lambda x: x * 2, [torch.randn(2, 7, 4)])
    assert set(places(program).values()) == {"-"}
    assert remarks_of(program, "SPR101")


def test_one_query_is_decoding_not_a_sequence() -> None:
    def model(q: Tensor, k: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, k)

    program = after_pass(
        "annotate-context-parallel", model, [torch.randn(2, 2, 1, 4), torch.randn(2, 2, 7, 4)], strict=True
    )
    assert set(places(program).values()) == {"-"}
    assert remarks_of(program, "SPR301")


def test_a_value_with_the_sequence_in_two_dims_is_split_once() -> None:
    def model(x: Tensor) -> Tensor:
        h = attend(x)
        return h @ h.mT

    program = after_pass("annotate-context-parallel", model, [torch.randn(2, 7, 4)])
    (product,) = nodes_of(program, "aten.matmul")
    assert places(program)[product.name] == "S(1)"
