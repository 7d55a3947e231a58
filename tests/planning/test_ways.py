"""`compare`: which ways there are, which is marked, and that figures are those of the programs themselves."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from explained import Model

import spcompile
from spcompile.command import cli
from spcompile.diagnostics import IllegalMesh, IllegalOption
from spcompile.planning.candidates import Heads
from spcompile.planning.search import Result
from spcompile.planning.ways import NAMES, ways
from spcompile.report.ways_table import WaysTable


def compared(world: int, length: int = 64, layers: int = 2, **options: object) -> WaysTable:
    with torch.device("meta"):
        model, ids = Model(layers), torch.zeros(1, length, dtype=torch.int64)
    return spcompile.compare(model, {"ids_BS": ids}, world, workers=1, **options)


@pytest.mark.thinned(3)
def test_figures_are_those_of_the_programs() -> None:
    table = compared(4)
    rows = {way.name: way.result for way in table.lengths[64]}
    assert list(rows) == list(NAMES)
    with torch.device("meta"):
        model, ids = Model(2), torch.zeros(1, 64, dtype=torch.int64)
    for name, mesh, options in (
        ("tp", {"tp": 4}, {"shard_parameters": ()}),
        ("cp ring", {"cp": 4}, {"attention": "ring", "shard_parameters": "cp"}),
        ("cp hybrid", {"cp": 4}, {"attention": {"ulysses": 2, "ring": 2}, "shard_parameters": "cp"}),
    ):
        plan = spcompile.explain(model, {"ids_BS": ids}, mesh=mesh, outputs="loss", **options)
        result = rows[name]
        assert result is not None
        assert result.figures is not None
        assert result.figures.total == int(plan.memory.total_bytes)
        assert result.figures.sent_bytes == sum(int(row.bytes) for row in plan.collectives)
        assert result.figures.seconds == pytest.approx(plan.predicted.total("seconds"))


@pytest.mark.thinned(8)
def test_the_table_of_two_lengths() -> None:
    table = compared(2) + compared(2, length=128)
    found = json.loads(json.dumps(table.to_dict()))
    assert [row["tokens"] for row in found["lengths"]] == [64, 128]
    assert all(row["best"] in NAMES for row in found["lengths"])
    text = str(table)
    assert "64 tokens" in text
    assert "128 tokens" in text
    assert text.count(" *") >= 2
    assert "Left out   cp hybrid: cp = 2 is no product" in text
    assert max(map(len, text.splitlines())) < 140


@pytest.mark.thinned(3)
def test_what_does_not_fit_is_told_so() -> None:
    table = compared(2, memory="20KiB")
    assert table.best(64) == ""
    assert "does not fit" in str(table)


def test_ways_that_there_are_not_say_why() -> None:
    found = ways(3, Heads((4,), 2, 1), lambda wanted: [Result(one, None, error="no") for one in wanted])
    assert [way.result for way in found] == [None] * 4
    assert found[0].why_not == "tp divides 4 heads and stays in a node of 8 ranks"
    assert found[1].why_not == "cp is at most 2, one token a rank"
    found = ways(3, Heads((4,), 9, 1), lambda wanted: [Result(one, None, error="no") for one in wanted])
    assert [way.why_not for way in found[1:3]] == ["no", "3 ranks do not divide 4 heads"]


def test_wrong_arguments() -> None:
    with pytest.raises(IllegalMesh, match="2 to"):
        compared(1)
    with pytest.raises(IllegalOption):
        compared(2, attention="ring")


@pytest.mark.thinned(3)
def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", "models:llama-tiny", "--world", "2", "--seq", "64", "--workers", "1", "--json"]
    monkeypatch.setattr(sys, "argv", ["spcompile", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert [way["name"] for way in found["lengths"][0]["ways"]] == list(NAMES)


@pytest.mark.parametrize(
    ("words", "told"), [(("--seq", "32k,x"), "--seq 'x'"), (("--world", "1"), "--world 1"), (("--gpu", "h10"), "h100")]
)
def test_wrong_words(
    words: tuple[str, ...], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(spcompile, "compare", None)
    monkeypatch.setattr(sys, "argv", ["spcompile", "compare", "models:llama-tiny", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert told in capsys.readouterr().err
