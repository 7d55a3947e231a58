"""The name of a cached program changes with all that the program depends on."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.fx as fx
from torch import Tensor, nn

import spcompile.passes
from spcompile.options import Options
from spcompile.passes import PIPELINE
from spcompile.program import program_cache
from spcompile.program.program_cache import Finished, key_of, load, store
from spcompile.program.trace import through_dynamo

MACHINE = {"mesh": "cp=2", "device": "cpu", "groups": "{'cp': '0'}"}


@pytest.fixture(autouse=True)
def enabled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with torch._functorch.config.patch(enable_autograd_cache=True):
        yield


class Masked(nn.Module):
    """Attention under a mask that is a buffer."""

    def __init__(self, window: int = 2, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.project = nn.Linear(4, 4)
        self.register_buffer("mask", torch.ones(6, 6, dtype=torch.bool).tril().triu(-window))

    def forward(self, x_BSD: Tensor) -> Tensor:
        h_B1SD = self.project(x_BSD)[:, None] * self.scale
        return nn.functional.scaled_dot_product_attention(h_B1SD, h_B1SD, h_B1SD, attn_mask=self.mask)


def key(
    model: nn.Module | None = None,
    x_BSD: Tensor | None = None,
    machine: dict[str, str] = MACHINE,
    passes: Sequence[Any] = PIPELINE,
    **options: Any,
) -> str | None:
    torch._dynamo.reset()
    found: list[str | None] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> None:
        found.append(key_of(gm, inputs, Options(**options), machine, passes))

    through_dynamo(model or Masked(), {"x_BSD": torch.ones(2, 6, 4) if x_BSD is None else x_BSD}, backend)
    return found[0]


def test_equal_compiles_have_equal_keys() -> None:
    assert key() == key()
    assert key() is not None


@pytest.mark.parametrize(
    "other",
    [
        lambda: key(attention="ring"),
        lambda: key(regather=False),
        lambda: key(outputs="loss"),
        lambda: key(links={"cp": "network"}),
        lambda: key(machine={**MACHINE, "mesh": "cp=4"}),
        lambda: key(machine={**MACHINE, "groups": "{'cp': '7'}"}),
        lambda: key(passes=PIPELINE[:-1]),
        lambda: key(passes=(*PIPELINE[:-1], dataclasses.replace(PIPELINE[-1], ahead=1.0))),
        lambda: key(Masked(window=3)),
        lambda: key(Masked(scale=2.0)),
        lambda: key(Masked().requires_grad_(False)),
        lambda: key(Masked().double(), torch.ones(2, 6, 4, dtype=torch.float64)),
        lambda: key(x_BSD=torch.ones(3, 6, 4)),
    ],
)
def test_what_changes_the_key(other: Callable[[], str | None]) -> None:
    assert other() not in (None, key())


def test_options_of_passes_change_the_key() -> None:
    assert Options(passes={"overlap-collectives": False}).fingerprint() != Options().fingerprint()


def test_sources_change_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key()
    monkeypatch.setattr(program_cache, "_file_hash", lambda file: "edited")
    program_cache.sources.cache_clear()
    try:
        assert key() != before
    finally:
        program_cache.sources.cache_clear()


def test_all_sources_are_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's and, in a source tree where they lie elsewhere, those of the passes, in whatever folder."""
    seen: set[Path] = set()
    monkeypatch.setattr(program_cache, "_file_hash", lambda file: seen.add(Path(file)) or "")
    program_cache.sources.cache_clear()
    try:
        key()
    finally:
        program_cache.sources.cache_clear()
    for package in (spcompile, spcompile.passes):
        files = set(Path(inspect.getfile(package)).parent.rglob("*.py"))
        assert len(files) > 20
        assert files <= seen


def test_symbols_are_not_cached() -> None:
    x_BSD = torch.ones(3, 6, 4)
    torch._dynamo.mark_dynamic(x_BSD, 0)
    assert key(x_BSD=x_BSD) is None


def test_where_there_is_no_cache() -> None:
    assert key(compiler="eager") is None
    assert key(dump="somewhere") is None
    with torch._inductor.config.patch(fx_graph_cache=False):
        assert key() is None
    with torch._functorch.config.patch(enable_autograd_cache=False):
        assert key() is None
    with torch.compiler.config.patch(force_disable_caches=True):
        assert key() is None


def test_a_damaged_file_is_no_program(tmp_path: Path) -> None:
    store("name", "0", Finished([], [], False, [], result="not what autograd made"))
    assert pickle.loads((tmp_path / "spcompile" / "name").read_bytes()).text == ""
    assert load("name", "0") is None
    (tmp_path / "spcompile" / "name").write_bytes(b"cut off")
    assert load("name", "0") is None
    assert load("another", "0") is None
