"""Draws that the backward of a checkpointed region repeats, from the generator's state of before.

torch's partitioner (torch 2.13: torch/_functorch/partitioners.py, `functionalize_rng_ops`) wraps such draws: the
forward keeps the state, the backward draws with it. Its wrappers come without the example values that all else has, and
the state with a size that is a symbol.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.fx as fx

from spcompile.graph.edit import is_getitem, operand, result_number

_SAVES = torch.ops.higher_order.run_and_save_rng_state
_REPEATS = torch.ops.higher_order.run_with_rng_state


def partitioned(
    base: Callable[..., tuple[fx.GraphModule, fx.GraphModule]],
    joint: fx.GraphModule,
    inputs: Any,
    arguments: Mapping[str, Any],
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """What a partitioner makes of a joint graph, all draws of it with example values.

    States are values of the graphs: not generators that the caller of the graphs would have to pass, as torch has it on
    CUDA.
    """
    with torch._functorch.config.patch(graphsafe_rng_functionalization=False):
        forward, backward = base(joint, inputs, **arguments)
    for gm in (forward, backward):
        for node in gm.graph.nodes:
            if node.target is _SAVES:
                _describe_saving(node)
            elif node.target is _REPEATS:
                _describe_repeating(node)
    return forward, backward


def is_kept_state(node: fx.Node) -> bool:
    """Whether a value of a forward graph is the state that a draw of the backward begins with."""
    return is_getitem(node) and operand(node, 0).target is _SAVES and result_number(node) == 0


def _describe_saving(node: fx.Node) -> None:
    parts = {user.args[1]: user for user in node.users if is_getitem(user)}
    parts[0].meta["val"] = _of_known_size(parts[0].meta["val"])
    node.meta["val"] = tuple(parts[place].meta["val"] for place in (0, 1))


def _describe_repeating(node: fx.Node) -> None:
    state, op, *args = node.args
    assert isinstance(state, fx.Node), state
    state.meta["val"] = _of_known_size(state.meta["val"])
    with state.meta["val"].fake_mode:
        given, named = fx.node.map_arg((args, node.kwargs), lambda read: read.meta["val"])
        assert callable(op), op
        node.meta["val"] = op(*given, **named)


def _of_known_size(state: Any) -> Any:
    return state.fake_mode.from_tensor(torch.get_rng_state(), static_shapes=True)
