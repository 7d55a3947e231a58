"""A plugin for Axolotl: its Trainers over a mesh, switched on in the YAML file.

    plugins:
      - spcompile.integrations.axolotl.SequenceParallelPlugin
    context_parallel_size: 2 # or tensor_parallel_size, or spcompile: {mesh: {cp: 2, tp: 2}}
    spcompile:
      attention: ring # options of the backend

Axolotl's own sharding stays off: the plugin takes its keys out of the configuration. Written by the hooks that Axolotl
0.18 documents; Axolotl need not be installed to import this.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any

from spcompile.diagnostics import IllegalMesh, IllegalOption
from spcompile.integrations.transformers import over_mesh
from spcompile.options import Options

if TYPE_CHECKING:
    from torch import nn
    from transformers import Trainer

try:
    from axolotl.integrations.base import BasePlugin as _found
except ModuleNotFoundError:
    _found = object
_Plugin: Any = _found

SECTION = "spcompile"
AXES_OF_KEYS = {"sequence_parallel_degree": "cp", "context_parallel_size": "cp", "tensor_parallel_size": "tp"}


class SequenceParallelPlugin(_Plugin):
    """Axolotl's plugin. The processes of one `tp` x `cp` group train as one process does."""

    def get_input_args(self) -> str:
        """Where the model of the key `spcompile` is."""
        return "spcompile.integrations.axolotl_arguments.SequenceParallelArguments"

    def register(self, cfg: Any) -> None:
        """Sizes under Axolotl's keys become the mesh, with `dp` over what is left of the processes.

        Raises:
            IllegalOption: sizes under Axolotl's keys, and a mesh as well.
            IllegalMesh: the processes cannot be divided so.
        """
        settings = dict(cfg.get(SECTION) or {})
        asked = {key: int(cfg.pop(key) or 1) for key in AXES_OF_KEYS if key in cfg}
        sizes = {AXES_OF_KEYS[key]: size for key, size in asked.items() if size > 1}
        if sizes and settings.get("mesh") is not None:
            keys = ", ".join(key for key, size in asked.items() if size > 1)
            raise IllegalOption(f"{keys}, and {SECTION}: mesh:", legal="one of them")
        if sizes:
            settings["mesh"] = _over_processes(sizes)
        cfg[SECTION] = settings

    def post_model_load(self, cfg: Any, model: nn.Module) -> None:
        """Settings are read before anything long begins.

        Raises:
            IllegalOption: one that the backend does not have.
        """
        Options.parse(_settings(cfg)[1])

    def post_trainer_create(self, cfg: Any, trainer: Trainer) -> None:
        """The Trainer becomes one over the mesh.

        Raises:
            IllegalMesh, IllegalOption: as SequenceParallelAccelerator does.
        """
        if cfg.get("rl"):
            importlib.import_module("spcompile.integrations.trl")  # writes out the fused head of TRL's Trainers
        mesh, options = _settings(cfg)
        over_mesh(trainer, mesh=mesh, spcompile_options=options)


def _settings(cfg: Any) -> tuple[Mapping[str, int] | None, dict[str, Any]]:
    options = dict(cfg.get(SECTION) or {})
    return options.pop("mesh", None), options


def _over_processes(sizes: Mapping[str, int]) -> dict[str, int]:
    processes = int(os.environ.get("WORLD_SIZE", 1))
    together = prod(sizes.values())
    if processes == 1 or processes == together:  # one process is that which launches the others
        return dict(sizes)
    if processes % together:
        raise IllegalMesh(f"{dict(sizes)} over {processes} processes", legal=f"a multiple of {together} processes")
    return {"dp": processes // together, **sizes}
