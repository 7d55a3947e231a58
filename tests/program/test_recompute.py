"""What is communicated again is not saved: read off the forward and backward graphs, then off real saved tensors.

B batch, S sequence, D width, N heads, H head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from worker_pool import WorkerPool

from spcompile.graph.storage import root_of, saved_values
from spcompile.options import Options
from spcompile.passes import PIPELINE
from spcompile.program.emit import Emission
from spcompile.program.trace import compile_for, mesh_shape, through_dynamo

c10d = torch.ops._c10d_functional
Mix = Callable[[Tensor, Tensor], Tensor]
LENGTH, WIDTH, HEADS = 16, 16, 4


class Mixed(nn.Module):
    """Causal attention with `kv_heads`, then `mix`, an op over the sequence that is gathered and saves its input."""

    def __init__(self, kv_heads: int, mix: Mix | None, again: bool = False) -> None:
        super().__init__()
        self.mix, self.again = mix, again
        self.kernel = nn.Parameter(torch.randn(WIDTH, 1, 3))
        self.q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.kv = nn.Linear(WIDTH, 2 * kv_heads * (WIDTH // HEADS), bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)

    def layer(self, x_BSD: Tensor) -> Tensor:
        B, S, _ = x_BSD.shape
        q, k, v = (
            t.view(B, S, -1, WIDTH // HEADS).transpose(1, 2) for t in (self.q(x_BSD), *self.kv(x_BSD).chunk(2, -1))
        )
        y_BNSH = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        y_BSD = y_BNSH.transpose(1, 2).reshape(B, S, -1)
        return self.out(y_BSD if self.mix is None else self.mix(y_BSD, self.kernel))

    def forward(self, x_BSD: Tensor) -> Tensor:
        y_BSD = checkpoint(self.layer, x_BSD, use_reentrant=False) if self.again else self.layer(x_BSD)
        return y_BSD.square().mean()


def beginning(y_BSD: Tensor, kernel: Tensor) -> Tensor:
    """Attention over a prefix of the sequence keeps keys and values gathered: in state R."""
    part_B1SD = y_BSD[:, None, : LENGTH - 4].sigmoid()
    return F.scaled_dot_product_attention(part_B1SD, part_B1SD, part_B1SD)[:, 0]


def running_sums(x_BSD: Tensor, kernel: Tensor) -> Tensor:
    """Over all dims, so that from here on all ranks compute the same: the gathered activation is in state I."""
    return x_BSD.sigmoid().flatten(1).logcumsumexp(-1).view_as(x_BSD)


def weights_of_places(y_BSD: Tensor, kernel: Tensor) -> Tensor:
    """A softmax along the sequence that no other dim can stand in for: all ranks compute all of it."""
    p_BF = (0.5 * y_BSD.sigmoid().flatten(1)).softmax(-1)
    return (p_BF.square() * p_BF.exp()).view_as(y_BSD)


def parts_of_places(y_BSD: Tensor, kernel: Tensor) -> Tensor:
    """Rows in an order that is computed, as an expert's, cut into parts that products read: views of a copy."""
    order_F = torch.arange(y_BSD[0].numel()) * 7 % y_BSD[0].numel()
    parts = y_BSD.sigmoid().flatten(1)[:, order_F].view_as(y_BSD).split([LENGTH - 3, 3], 1)
    return F.pad(torch.cat([part @ kernel[:, 0] for part in parts], 1), (0, WIDTH - 3))


def graphs_of(model: nn.Module, degree: int, length: int = LENGTH, **options: Any) -> Emission:
    """The final graphs of one rank."""
    found: list[Emission] = []

    def compiled(gm: fx.GraphModule, inputs: Any) -> None:
        found.append(compile_for(gm, inputs, mesh_shape({"cp": degree}), Options.parse(options), PIPELINE).sharded)

    through_dynamo(model, (torch.randn(1, length, WIDTH, requires_grad=True),), compiled)
    return found[0]


def saved_numels(emission: Emission) -> list[int]:
    """Elements of every storage that is saved, inputs and parameters aside."""
    forward, backward = (emission.graphs[phase].graph for phase in ("forward", "backward"))
    roots = {root_of(node) for node in saved_values(forward, backward)}
    return sorted(sum(_numels(node.meta["val"])) for node in roots if node.op == "call_function")


def _numels(value: Any) -> list[int]:
    return [x.numel() for x in torch.utils._pytree.tree_leaves(value) if isinstance(x, Tensor)]


def count(emission: Emission, phase: str, op: Any) -> int:
    return len(emission.graphs[phase].graph.find_nodes(op="call_function", target=op))


@pytest.mark.thinned(10)
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize(("mix", "whole"), [(beginning, 0), (running_sums, 2)])
def test_a_gathered_activation_is_gathered_again(mix: Mix, whole: int, again: bool) -> None:
    """Also inside a checkpointed region. whole: saved tensors that are whole because all ranks computed the same."""
    with_it, without = (graphs_of(Mixed(HEADS, chosen, again), 4, attention="ring") for chosen in (mix, None))
    forward, backward = (
        count(with_it, phase, c10d.all_gather_into_tensor.default)
        - count(without, phase, c10d.all_gather_into_tensor.default)
        for phase in ("forward", "backward")
    )
    assert forward == backward > 0
    assert saved_numels(with_it).count(LENGTH * WIDTH) <= whole
    assert max(saved_numels(with_it), default=0) <= LENGTH * WIDTH


def test_what_is_made_of_a_gathered_activation_is_made_again() -> None:
    """A softmax, a square and an exponential: every rank has them whole, and saves what the last product gives only."""
    emission = graphs_of(Mixed(HEADS, weights_of_places), 4, attention="ring")
    assert saved_numels(emission).count(LENGTH * WIDTH) == 1
    assert count(emission, "backward", c10d.all_gather_into_tensor.default) == 2  # the other one: of the result


def test_parts_of_a_gathered_activation_are_cut_out_again() -> None:
    """Of whole size is only what the last product gives."""
    emission = graphs_of(Mixed(HEADS, parts_of_places), 4, attention="ring")
    assert saved_numels(emission).count(LENGTH * WIDTH) == 1


@pytest.mark.thinned(29)
@pytest.mark.parametrize("length", [LENGTH, LENGTH - 3])
@pytest.mark.parametrize(("kv_heads", "all_to_alls"), [(4, (2, 2, 1)), (2, (3, 3, 2)), (1, (3, 3, 2))])
def test_ulysses_saves_its_result_and_its_keys_once(
    kv_heads: int, all_to_alls: tuple[int, int, int], length: int
) -> None:
    """(all-to-alls of the forward, their duals, those made again). Nothing of repeated keys is saved."""
    forward, duals, again = all_to_alls
    emission = graphs_of(Mixed(kv_heads, None), 4, length, attention="ulysses")
    assert count(emission, "forward", c10d.all_to_all_single.default) == forward
    assert count(emission, "backward", c10d.all_to_all_single.default) == duals + again
    ring = graphs_of(Mixed(kv_heads, None), 4, length, attention="ring")
    padding = (4 * -(-length // 4) - length) * WIDTH * 8
    assert sum(saved_numels(emission)) <= sum(saved_numels(ring)) + padding


@pytest.mark.thinned(30)
@pytest.mark.parametrize("way", ["together", "apart", "first apart"])
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_heads_in_groups_save_no_more(kv_heads: int, way: str) -> None:
    """Results of both groups are sent again, and where two ranks read a key head, keys are."""
    passes = {"split-all-to-alls": {"groups": 2, "way": way}}
    emission = graphs_of(Mixed(kv_heads, None), 2, attention="ulysses", passes=passes)
    there = {"together": 2 if kv_heads == 4 else 3, "apart": 3, "first apart": 4}[way]
    keys_again = 0 if kv_heads == 4 else 1 if way == "together" else 2
    assert count(emission, "forward", c10d.all_to_all_single.default) == there + 2
    assert count(emission, "backward", c10d.all_to_all_single.default) == there + 2 + 2 + keys_again
    whole = graphs_of(Mixed(kv_heads, None), 2, attention="ulysses")
    assert sum(saved_numels(emission)) <= sum(saved_numels(whole))


def saved_shapes(compiler: str) -> list[tuple[int, ...]]:
    """On one rank: the shapes of what autograd really saves."""
    torch.manual_seed(0)
    model, x_BSD = Mixed(HEADS, beginning), torch.randn(1, LENGTH, WIDTH)
    model.compile(backend="spcompile", options={"compiler": compiler, "balance": "contiguous"}, dynamic=False)
    model(x_BSD)  # compiles, on fake tensors
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x_BSD).backward()
    torch._dynamo.reset()
    return [tuple(x.shape) for x in saved]


@pytest.mark.thinned(8)
@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_no_gathered_keys_are_among_the_saved_tensors(worker_pool: Callable[[int], WorkerPool], compiler: str) -> None:
    for shapes in worker_pool(2).run(saved_shapes, compiler):
        assert (1, 1, LENGTH // 2, WIDTH) in shapes  # the shard, from which they are gathered again
        assert not any(LENGTH - 4 in shape for shape in shapes), shapes
