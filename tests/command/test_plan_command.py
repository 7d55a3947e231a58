"""`spcompile plan`: words are checked before torch is imported, results are a table or JSON on stdout."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

import spcompile
from spcompile.command import arguments, cli
from spcompile.diagnostics import IllegalMesh, IllegalOption, OutOfMemory
from spcompile.report.sweep_table import sweep_dict, sweep_text


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["spcompile", "plan", *words])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return int(exit_.value.code or 0)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--axes", "tp,pp"), "tp,pp"),
        (("--axes", "tp,tp"), "each once"),
        (("--link", "wifi"), "ib"),
        (("--gpu", "h10"), "did you mean 'h100'"),
        (("--world", "0"), "--world 0"),
        (("--memory", "a lot"), "72GiB"),
        (("--optimizer", "sgdd"), "adamw"),
        (("--sweep", "32k,x"), "--sweep 'x'"),
    ],
)
def test_wrong_words_end_before_anything_is_built(
    words: tuple[str, ...], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(spcompile, "plan", None)
    assert call(monkeypatch, "models:llama-tiny", *words) == 2
    assert told in capsys.readouterr().err


def test_words_for_axes_and_links() -> None:
    assert arguments.parse_axes("cp,tp") == ["cp", "tp"]
    assert arguments.parse_link("ib") == {"dp": "network", "tp": "network", "cp": "network"}
    with pytest.raises(IllegalMesh):
        arguments.parse_axes("")
    with pytest.raises(IllegalOption, match="nvlink5"):
        arguments.parse_link("x")


@pytest.mark.slow
@pytest.mark.thinned(19)
def test_a_plan_and_a_sweep(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    small = ("models:llama-tiny", "--world", "2", "--axes", "cp", "--workers", "1", "--json")
    assert call(monkeypatch, *small, "--seq", "64") == 0
    one: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert one["candidates"][one["choice"]]["mesh"] == {"cp": 2}
    assert call(monkeypatch, *small, "--sweep", "64,128") == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["tokens"] for row in found["lengths"]] == [64, 128]
    assert found["lengths"][0] == one


def test_a_length_at_which_nothing_fits_is_a_row() -> None:
    error = OutOfMemory("a step takes 2 TiB", legal="64 ranks would do")
    assert "64 ranks would do" in sweep_text({1024: error})
    assert "does not fit" in sweep_text({1024: error})
    assert "2 TiB" in sweep_dict({1024: error})["lengths"][0]["error"]
