"""`spcompile.full_state_dict`: the weights of a sharded model, whole. Imports nothing until it is called."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model that `parallelize` has sharded, as the plain model has it: whole tensors, on CPU.

    Called by all ranks of the mesh. The first one gets it, the others an empty dict. Tied weights stay tied. A plain
    model loads it with `load_state_dict`.
    """
    from spcompile.parameters.whole_weights import gathered_state

    return gathered_state(model)
