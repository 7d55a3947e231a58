"""Global views: a graph over parts of weights means what the graph over whole weights means, on every mesh.

B batch, S sequence, D width, F hidden features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import Tensor, nn

import spcompile.check.attention_specs  # noqa: F401  (the simulator learns ring attention)
from spcompile.check.simulate import Simulator
from spcompile.graph.edit import argument
from spcompile.machine.mesh import MeshShape
from spcompile.options import Options
from spcompile.passes import PIPELINE
from spcompile.program.build import LocalProgram, build
from spcompile.program.trace import through_dynamo
from spcompile.sharding.global_view import Part, global_view, nested

S, D, HIDDEN = 16, 8, 24
SHAPES = {
    "table_SD": (S, D),
    "q_DD": (D, D),
    "k_DD": (D, D),
    "out_DD": (D, D),
    "up_FD": (HIDDEN, D),
    "down_DF": (D, HIDDEN),
}
TP = {"q_DD": 0, "k_DD": 0, "out_DD": 1, "up_FD": 0, "down_DF": 1}  # Megatron's split
Parts = Mapping[str, tuple[Part, ...]]


def block(x_BSD: Tensor, w: Mapping[str, Tensor]) -> Tensor:
    """Positions are added, so that their table is wanted split as the sequence is: zigzag, where a view is not."""
    x_BSD = x_BSD + w["table_SD"]
    q_BNSH, k_BNSH = (F.linear(x_BSD, w[n]).unflatten(-1, (4, 2)).transpose(1, 2) for n in ("q_DD", "k_DD"))
    y_BNSH = F.scaled_dot_product_attention(q_BNSH, k_BNSH, k_BNSH, is_causal=True)
    x_BSD = x_BSD + F.linear(y_BNSH.transpose(1, 2).flatten(2), w["out_DD"])
    return (x_BSD + F.linear(F.gelu(F.linear(x_BSD, w["up_FD"])), w["down_DF"])).square().mean()


class OverParts(nn.Module):
    """The block over one rank's parts."""

    def __init__(self, whole: Mapping[str, Tensor], parts: Parts) -> None:
        super().__init__()
        self.parts = parts
        for name, x in whole.items():
            self.register_parameter(name, nn.Parameter(cut(x, parts[name], dict.fromkeys(("tp", "cp"), 0)).clone()))

    def forward(self, x_BSD: Tensor) -> Tensor:
        return block(x_BSD, {name: global_view(getattr(self, name), parts) for name, parts in self.parts.items()})


def cut(x: Tensor, parts: Sequence[Part], place: Mapping[str, int]) -> Tensor:
    for part in parts:
        x = x.chunk(part.degree, part.dim)[place[part.axis]]
    return x


def parts_on(mesh: Mapping[str, int], shard_cp: bool) -> dict[str, tuple[Part, ...]]:
    found = {}
    for name in SHAPES:
        parts = [Part(TP[name], "tp", mesh["tp"])] if name in TP and "tp" in mesh else []
        free = next(dim for dim in (0, 1) if dim not in {part.dim for part in parts})
        parts += [Part(free, "cp", mesh["cp"])] if shard_cp and "cp" in mesh else []
        found[name] = nested(parts)
    return found


def program_of(
    model: nn.Module, x_BSD: Tensor, mesh: Mapping[str, int], balance: str
) -> tuple[LocalProgram, list[str]]:
    """One rank's program, and which parameter each of its inputs is; "" for x."""
    names = {id(p): name for name, p in model.named_parameters()}
    found: list[Any] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
        options = Options(attention="ring", balance=balance)
        passes = [p for p in PIPELINE if p.stage.value != "schedule"]
        program = build(gm, inputs, MeshShape.of(mesh), options, passes)
        found.extend((program, [names.get(id(value), "") for value in inputs]))

    through_dynamo(model, (x_BSD,), backend)
    return found[0], found[1]


@pytest.mark.thinned(30)
@pytest.mark.parametrize("shard_cp", [True, False])
@pytest.mark.parametrize("balance", ["zigzag", "contiguous"])
@pytest.mark.parametrize(
    "mesh", [{"tp": 2}, {"cp": 2}, {"cp": 4}, {"tp": 2, "cp": 2}, {"cp": 2, "tp": 4}, {"tp": 2, "cp": 4}]
)
def test_parts_on_all_ranks_give_the_loss_and_parts_of_the_gradients(
    mesh: dict[str, int], balance: str, shard_cp: bool
) -> None:
    whole = {name: (torch.randn(shape, dtype=torch.float64) / 3).requires_grad_() for name, shape in SHAPES.items()}
    x_BSD = torch.randn(2, S, D, dtype=torch.float64)
    loss = block(x_BSD, whole)
    loss.backward()
    parts = parts_on(mesh, shard_cp)
    program, inputs = program_of(OverParts(whole, parts), x_BSD, mesh, balance)

    shape = MeshShape.of(mesh)
    places = [
        dict(zip(mesh, at, strict=True))
        for at in torch.cartesian_prod(*map(torch.arange, mesh.values())).view(-1, len(mesh)).tolist()
    ]
    given = [
        [cut(whole[name].detach(), parts[name], at).clone().requires_grad_() if name else x_BSD for name in inputs]
        for at in places
    ]
    losses = [outputs[0] for outputs in Simulator(shape).run(program.gm, given)]
    torch.autograd.backward(losses)
    for at, found, rank_inputs in zip(places, losses, given, strict=True):
        torch.testing.assert_close(found, loss, rtol=1e-12, atol=1e-12)
        for name, x in zip(inputs, rank_inputs, strict=True):
            if name:
                gradient = whole[name].grad
                assert gradient is not None
                torch.testing.assert_close(x.grad, cut(gradient, parts[name], at), rtol=1e-10, atol=1e-12, msg=name)


def gathers(program: LocalProgram, axis: str) -> list[str]:
    """To which state each parameter that is split over `axis` is gathered before anything is computed."""
    found = program.gm.graph.find_nodes(op="call_function", target=torch.ops.spx.all_gather.default)
    weights = [n for n in found if n.args[0].op == "placeholder" and argument(n, 3, "axis") == axis]
    return [str(argument(n, 6, "to")) for n in weights]


@pytest.mark.thinned(2)
def test_what_is_sent_for_parameters() -> None:
    """Over tp nothing: each rank computes with its part. Over cp one gather a use, its dual a reduce-scatter (R)."""
    mesh = {"tp": 2, "cp": 2}
    whole = {name: torch.randn(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    x_BSD = torch.randn(2, S, D, dtype=torch.float64)
    program, _ = program_of(OverParts(whole, parts_on(mesh, True)), x_BSD, mesh, "zigzag")
    assert gathers(program, "tp") == []
    assert sorted(gathers(program, "cp")) == ["I"] + ["R"] * len(TP)  # I: the table, which is then cut as the sequence
    assert not [r for r in program.ctx.remarks.rows if r.code == "SPR504"]


def test_another_split_than_the_graph_wants_is_gathered_and_remarked() -> None:
    mesh = {"tp": 2}
    whole = {name: torch.randn(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    wrong = parts_on(mesh, False) | {"up_FD": (Part(1, "tp", 2),)}
    program, _ = program_of(OverParts(whole, wrong), torch.randn(2, S, D, dtype=torch.float64), mesh, "zigzag")
    assert gathers(program, "tp") == ["I"]
    assert [r.code for r in program.ctx.remarks.rows if r.code == "SPR504"] == ["SPR504"]
