"""What a compile leaves out where nobody asks for it, and that its work grows with the layers, not faster."""

from __future__ import annotations

import gc
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensorMode

import spcompile
from spcompile import models
from spcompile.program.collection import YOUNG, rare_collection
from spcompile.program.log_texts import logs_graphs, without_log_texts
from spcompile.torch_private import graph_compile, trace_log


def test_collection_is_rare_inside_and_as_it_was_behind() -> None:
    before = gc.get_threshold()
    with rare_collection():
        with rare_collection():
            assert gc.get_threshold()[0] == YOUNG
        assert gc.get_threshold()[0] == YOUNG
    assert gc.get_threshold() == before


def test_collection_that_was_off_stays_off() -> None:
    before = gc.get_threshold()
    try:
        gc.set_threshold(0)
        with rare_collection():
            assert gc.get_threshold()[0] == 0
    finally:
        gc.set_threshold(*before)


def test_texts_are_written_for_logs_that_are_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_log, "handlers", [])  # pytest puts its own there
    write = graph_compile._log_joint_graph
    assert not logs_graphs()
    with without_log_texts():
        assert graph_compile._log_joint_graph is not write
    assert graph_compile._log_joint_graph is write
    before = graph_compile.aot_joint_log.level
    graph_compile.aot_joint_log.setLevel(logging.INFO)
    try:
        with without_log_texts():
            assert graph_compile._log_joint_graph is write
    finally:
        graph_compile.aot_joint_log.setLevel(before)


@contextmanager
def counted_work() -> Iterator[Counter[str]]:
    """How often ops run on fake tensors, nodes are made, and Python is written for graphs."""
    found: Counter[str] = Counter()
    watched: list[tuple[Any, str]] = [
        (FakeTensorMode, "dispatch"),
        (fx.Graph, "create_node"),
        (fx.Graph, "python_code"),
    ]
    originals = [getattr(owner, name) for owner, name in watched]
    for (owner, name), original in zip(watched, originals, strict=True):

        def counting(*args: Any, _original: Any = original, _name: str = name, **kwargs: Any) -> Any:
            found[_name] += 1
            return _original(*args, **kwargs)

        setattr(owner, name, counting)
    try:
        yield found
    finally:
        for (owner, name), original in zip(watched, originals, strict=True):
            setattr(owner, name, original)


def work_of(layers: int) -> Counter[str]:
    """Of explaining a Llama of so many layers, with a plan of memory."""
    torch._dynamo.reset()
    ids = torch.empty(1, 64, dtype=torch.int64, device="meta")
    with torch.device("meta"):
        model = models.build("llama", layers=layers, dim=32, heads=4)
    with counted_work() as found:
        spcompile.explain(model, [ids, ids], {"cp": 2}, memory="min")
    return found


@pytest.mark.thinned(10)
def test_work_grows_as_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_log, "handlers", [])
    work_of(1)  # what is made once in a process
    two, three, four = (work_of(layers) for layers in (2, 3, 4))
    for kind in ("dispatch", "create_node"):
        assert four[kind] - three[kind] <= 1.02 * (three[kind] - two[kind]), kind
    assert four["python_code"] == three["python_code"] == two["python_code"]
