"""The plugin for Axolotl against its documented hooks, on a stand-in of the interface: Axolotl is not installed."""

from __future__ import annotations

import copy
import importlib
import os
import sys
import tempfile
import types
from collections.abc import Callable
from typing import Any
from unittest import mock

import hf_models
import pytest
import torch
from oracle import FLOAT32
from trainer_runs import Rows, arguments, launched, left_behind, padded, worst
from worker_pool import WorkerPool

from spcompile.diagnostics import SpcompileError

PoolOf = Callable[[int], WorkerPool]


class BasePlugin:
    """Hooks of `axolotl.integrations.base.BasePlugin`, in the order in which Axolotl calls them."""

    def register(self, cfg: Any) -> None: ...

    def get_input_args(self) -> str | None: ...

    def post_model_load(self, cfg: Any, model: Any) -> None: ...

    def get_trainer_cls(self, cfg: Any) -> Any: ...

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None: ...


class Configuration(dict[str, Any]):
    """As Axolotl's DictDefault: keys are attributes, and those that are missing are None."""

    def __getattr__(self, key: str) -> Any:
        return self.get(key)


def plugin_in_axolotl() -> Any:
    """Loaded by its dotted path, as Axolotl does."""
    base = types.ModuleType("axolotl.integrations.base")
    vars(base)["BasePlugin"] = BasePlugin
    importlib.import_module("spcompile.integrations.transformers")  # patch.dict takes out what is first loaded inside
    names = {name: types.ModuleType(name) for name in ("axolotl", "axolotl.integrations")}
    sys.modules.pop("spcompile.integrations.axolotl", None)
    with mock.patch.dict(sys.modules, {**names, "axolotl.integrations.base": base}):
        made = importlib.import_module("spcompile.integrations.axolotl").SequenceParallelPlugin()
    assert isinstance(made, BasePlugin)
    return made


def validated(plugin: Any, cfg: dict[str, Any]) -> Configuration:
    """By the model that the plugin adds to Axolotl's own."""
    module, _, name = plugin.get_input_args().rpartition(".")
    model = getattr(importlib.import_module(module), name)
    return Configuration(cfg | model(spcompile=cfg.get("spcompile")).model_dump(exclude_none=True))


def trained(model: torch.nn.Module, cfg: dict[str, Any] | None) -> dict[str, Any]:
    """What Axolotl does with a file, and without the plugin."""
    import transformers

    plugin = plugin_in_axolotl() if cfg is not None else None
    found = Configuration(cfg or {})
    if plugin is not None:
        plugin.register(found)
        found = validated(plugin, found)
    if plugin is not None:
        plugin.post_model_load(found, model)
    trainer = transformers.Trainer(model, arguments(tempfile.mkdtemp(), {}), padded, Rows(40), Rows(4))
    if plugin is not None:
        assert plugin.get_trainer_cls(found) is None
        plugin.post_trainer_create(found, trainer)
        assert not (found.context_parallel_size or 1) > 1  # else Axolotl starts its own ring
    trainer.train()
    trainer.evaluate()
    return left_behind(trainer)


def compare(cfg: dict[str, Any]) -> dict[str, float]:
    model = hf_models.build("llama", layers=1)
    with launched(1):
        want = trained(copy.deepcopy(model), None)
    with launched(2):
        return worst(want, trained(model, cfg))


@pytest.mark.slow
@pytest.mark.thinned(8)
@pytest.mark.parametrize(
    "cfg",
    [
        {"context_parallel_size": 2, "spcompile": {"compiler": "eager"}},
        {"spcompile": {"mesh": {"tp": 2}, "compiler": "eager"}},
    ],
    ids=["its own key", "a mesh"],
)
def test_as_in_one_process(worker_pool: PoolOf, cfg: dict[str, Any]) -> None:
    pytest.importorskip("pydantic")
    for errors in worker_pool(2).run(compare, cfg):
        bad = {name: error for name, error in errors.items() if not error <= FLOAT32}
        assert not bad, bad
        assert len(errors) > 15


@pytest.mark.parametrize(
    ("cfg", "world", "mesh"),
    [
        ({"context_parallel_size": 2}, 8, {"dp": 4, "cp": 2}),
        ({"sequence_parallel_degree": 2, "tensor_parallel_size": 2}, 4, {"cp": 2, "tp": 2}),
        ({"context_parallel_size": 4}, 1, {"cp": 4}),
        ({"context_parallel_size": 1}, 2, None),
        ({"spcompile": {"mesh": {"tp": 2}}}, 2, {"tp": 2}),
    ],
)
def test_keys_of_axolotl_become_the_mesh(cfg: dict[str, Any], world: int, mesh: dict[str, int] | None) -> None:
    pytest.importorskip("transformers")
    given = Configuration(cfg)
    with mock.patch.dict(os.environ, WORLD_SIZE=str(world)):
        plugin_in_axolotl().register(given)
    assert given.spcompile.get("mesh") == mesh
    assert set(given) == {"spcompile"}


@pytest.mark.parametrize(
    ("cfg", "words"),
    [
        ({"context_parallel_size": 2, "spcompile": {"mesh": {"cp": 2}}}, "context_parallel_size, and spcompile: mesh"),
        ({"context_parallel_size": 2}, "a multiple of 2 processes"),
        ({"spcompile": {"atention": "ring"}}, "did you mean 'attention'"),
    ],
)
def test_what_is_refused(cfg: dict[str, Any], words: str) -> None:
    pytest.importorskip("transformers")
    plugin, given = plugin_in_axolotl(), Configuration(cfg)

    def loaded() -> None:
        plugin.register(given)
        plugin.post_model_load(given, torch.nn.Linear(2, 2))

    with mock.patch.dict(os.environ, WORLD_SIZE="3"), pytest.raises(SpcompileError, match=words):
        loaded()


def test_without_axolotl() -> None:
    pytest.importorskip("transformers")
    assert importlib.import_module("spcompile.integrations.axolotl").SequenceParallelPlugin().get_input_args()
