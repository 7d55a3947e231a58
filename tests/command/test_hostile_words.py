"""Words that mean nothing end in one line and exit status 2; Ctrl-C in one line and 130, with no process left."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spcompile.command import cli, flags
from spcompile.command.arguments import parse_options, parse_settings
from spcompile.diagnostics import IllegalModel, IllegalOption

ESC = "\x1b]0;title\x07"
MAIN = [sys.executable, "-c", "from spcompile.command.cli import main; main()"]


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["spcompile", *words])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return int(exit_.value.code or 0)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("command", ["train", "explain", "verify"])
@pytest.mark.parametrize(
    "words",
    [
        "--seq 0",
        "--seq -5",
        "--seq abc",
        "--seq 12kk",
        "--seq k",
        "--dtype bf17",
        "--attention rign",
        "--attention ulysses=3,ring=2",
        "--option nothing=1",
        "--option strict=3",
        "--seq 99999999999999999999",
        "--batch -1",
        "--batch 0",
        "--mesh cp=1000000007",
        "--mesh cp=65536,tp=65536",
        "--mesh cp=0",
        "--mesh cp=\u00b2",
        "--mesh cp=" + "9" * 5000,
        "--mesh cq=2",
        "--set layers",
        "--option mesh=3",
        "--option dump=x",
        "--attention ulysses=" + "9" * 5000,
        "--nothing 1",
        "more words",
    ],
)
def test_one_line_before_torch_is_imported(
    command: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "spcompile.command.model_spec", None)
    assert call(monkeypatch, command, "models:llama-tiny", *words.split()) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert "Traceback" not in shown.err


@pytest.mark.parametrize(
    "words",
    [
        "--lr nan",
        "--lr inf",
        "--lr 0",
        "--lr -1",
        "--steps 1",
        "--nproc 0",
        "--nproc -2",
        "--seed -1",
        "--text /",
        "--text /dev/zero",
    ],
)
def test_words_of_train(words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "spcompile.command.model_spec", None)
    assert call(monkeypatch, "train", "models:llama-tiny", *words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("SP10")
    assert words.split()[0].removeprefix("--") in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["missing", "no/such/folder/text", "x" * 300, "pipe", "fo\x1blder"])
def test_a_text_that_is_no_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "fo\x1blder").mkdir()
    assert call(monkeypatch, "train", "models:llama-tiny", "--text", str(tmp_path / name)) == 2
    error = capsys.readouterr().err
    assert error.startswith("SP102 illegal option value: --text '")
    assert "\x1b" not in error
    assert error.count("\n") == 1


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    "setting",
    ["layers=abc", "layers=0", "layers=-1", "layers=True", "layers=1.5", "layers=10**9", "layers=999999999",
     "nothing=1", "theta=nan", "theta=0", "theta=1e999", "heads=3", "kv_heads=3", "heads=32", "vocab=None", "dim=[1]"],
)  # fmt: skip
@pytest.mark.parametrize("command", ["train", "explain"])
def test_settings_of_a_plain_model(
    command: str, setting: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, command, "models:llama-tiny", "--set", setting) == 2
    error = capsys.readouterr().err
    assert error.startswith("SP105 illegal model: ")
    assert "legal: " in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("tolerance", ["abc", "-1", "1e999"])
def test_a_tolerance_that_is_no_number(
    tolerance: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "verify", "models:llama-tiny", "--option", f"tolerance={tolerance}") == 2
    assert capsys.readouterr().err.startswith("SP102 illegal option value: tolerance=")


def test_a_reader_that_has_seen_enough() -> None:
    reads, writes = os.pipe()
    os.close(reads)
    ended = subprocess.run([*MAIN, "--help"], stdout=writes, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writes)
    assert ended.returncode in (1, 141)  # 1 where rich has noticed it
    assert ended.stderr == ""


def test_values_that_are_no_literals_are_text() -> None:
    deep = "(" * 10_000
    assert parse_settings([f"a={deep}", "b={[]:1}", "c=" + "9" * 5000]) == {"a": deep, "b": "{[]:1}", "c": "9" * 5000}
    with pytest.raises(IllegalModel):
        parse_settings(["a=1", "a=2"])
    with pytest.raises(IllegalOption, match="--dump"):
        parse_options(["dump=folder"])


@pytest.mark.parametrize("where", ["", "missing/plan.html"])
def test_a_page_that_cannot_be_written(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "explain", "models:llama-tiny", "--html", str(tmp_path / where)) == 2
    assert capsys.readouterr().err.startswith("SP102 illegal option value: --html")


def test_a_dump_that_cannot_be_written_starts_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    words = ["--set", "vocab=256", "--seq", "16", "--dump", str(tmp_path / "file")]
    assert call(monkeypatch, "train", "models:llama-tiny", *words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"SP102 illegal option value: dump='{tmp_path / 'file'}': ")
    assert error.count("\n") == 1


def test_a_mesh_that_nobody_has_says_what_is_legal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "explain", "models:llama-tiny", "--mesh", "cp=1000000007") == 2
    assert "at most 131072 ranks" in capsys.readouterr().err


def test_too_many_processes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "train", "models:llama-tiny", "--nproc", "5000") == 2
    assert "5000 processes" in capsys.readouterr().err


@pytest.mark.parametrize("word", [f"models:{ESC}\n", f"hf:{ESC}\n", f"{ESC}\n:"])
def test_escapes_in_words_are_shown(
    word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "explain", word) == 2
    error = capsys.readouterr().err
    assert error.startswith("SP105")
    assert r"\x1b]0;title\x07\n" in error
    assert not {"\x1b", "\x07"} & set(error)
    assert call(monkeypatch, f"--{ESC}") == 2
    assert not {"\x1b", "\x07"} & set(capsys.readouterr().err)


def test_ctrl_c_in_this_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*words: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(flags, "parse_mesh", interrupted)
    assert call(monkeypatch, "explain", "models:llama-tiny") == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.slow
@pytest.mark.thinned(30)
@pytest.mark.parametrize("moment", ["starting", "training"])
def test_ctrl_c_ends_every_process_with_one_line(moment: str) -> None:
    """On a terminal of its own, whose Ctrl-C reaches the command and all that it has started."""
    mine, its = pty.openpty()
    words = "models:gpt-tiny --set vocab=256 --steps 100000 --seq 16 --backend aot_eager".split()  # noqa: SIM905
    command = subprocess.Popen(
        [*MAIN, "train", *words], stderr=subprocess.PIPE, text=True, start_new_session=True, stdin=its
    )
    assert command.stderr is not None
    before = ""
    if moment == "training":
        while "2 ranks" not in before and "one device" not in before:
            before = command.stderr.readline()
    else:
        deadline = time.monotonic() + 60
        while len(in_session(command.pid)) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
    os.killpg(command.pid, signal.SIGINT)
    rest = [line for line in command.stderr.read().splitlines() if "step" not in line]
    assert command.wait(60) == 130
    assert rest == ["interrupted"]
    deadline = time.monotonic() + 20  # multiprocessing's own tracker ends when it sees that the command has
    while in_session(command.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert in_session(command.pid) == []
    os.close(mine)
    os.close(its)


def in_session(leader: int) -> list[int]:
    """The processes of a session."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (
                os.getsid(int(folder.name)) == leader
                and "Z" not in (folder / "stat").read_text().rpartition(")")[2][:3]
            ):
                found.append(int(folder.name))
        except OSError:
            continue
    return found
