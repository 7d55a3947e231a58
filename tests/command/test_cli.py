"""The command line: MODEL and --mesh are understood, errors name what is legal, results are JSON on stdout."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import spcompile
from spcompile.command import arguments, cli, model_spec
from spcompile.diagnostics import IllegalMesh, IllegalModel, IllegalOption


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The exit status of `spcompile WORDS`."""
    monkeypatch.setattr(sys, "argv", ["spcompile", *words])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return int(exit_.value.code or 0)


def test_factors_of_a_hybrid() -> None:
    assert arguments.parse_attention("ulysses=4,ring=2") == {"ulysses": 4, "ring": 2}
    assert arguments.parse_attention("hybrid") == "hybrid"
    for text in ("ulysses=4,ring", "ulysses=4,ulysses=2", "ulysses=-1,ring=2"):
        with pytest.raises(IllegalOption, match="ulysses=4,ring=2"):
            arguments.parse_attention(text)


def test_mesh_sizes() -> None:
    assert arguments.parse_mesh(["tp=2,cp=4"]) == arguments.parse_mesh(["tp=2", "cp=4"]) == {"tp": 2, "cp": 4}
    for wrong in ("cp", "cp=", "cp=x", "cp=2,cp=4", "cp=-1"):
        with pytest.raises(IllegalMesh):
            arguments.parse_mesh([wrong])


def test_lengths_as_contexts_are_written() -> None:
    found = [arguments.parse_tokens("--seq", text) for text in ("4096", "128k", "128K", "1m")]
    assert found == [4096, 131072, 131072, 1048576]
    for wrong in ("", "k", "1.5k", "-1k", "2g", "1mk", "2000m"):
        with pytest.raises(IllegalOption, match="--seq"):
            arguments.parse_tokens("--seq", wrong)


def test_short_names_of_dtypes() -> None:
    for name, short in (("bfloat16", "bf16"), ("float32", "fp32"), ("float16", "fp16"), ("float64", "fp64")):
        assert arguments.parse_dtype(name) == arguments.parse_dtype(short) == name
    with pytest.raises(IllegalModel, match="bf16"):
        arguments.parse_dtype("int8")


def test_a_graph_that_no_pass_leaves_is_refused_before_one_is_made(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(spcompile, "explain", None)
    assert call(monkeypatch, "explain", "models:llama-tiny", "--graph", "nothing") == 2
    assert "insert-reshards" in capsys.readouterr().err


def test_settings_are_literals_or_text() -> None:
    lines = ["layers=2", "theta=1e4", "hidden_act=relu", "tie_word_embeddings=False", "sizes=[1, 2]"]
    assert arguments.parse_settings(lines) == {
        "layers": 2,
        "theta": 1e4,
        "hidden_act": "relu",
        "tie_word_embeddings": False,
        "sizes": [1, 2],
    }
    with pytest.raises(IllegalModel):
        arguments.parse_settings(["layers"])


@pytest.mark.thinned(4)
@pytest.mark.parametrize("spec", ["models:llama-tiny", "models:gpt-tiny", "models:bert-tiny", "hf:llama", "hf:bert"])
def test_a_built_model_runs_on_its_example_inputs(spec: str) -> None:
    built = model_spec.build_model(spec, seq=16, dtype="float64")
    inputs = built.example_inputs(2, 16, "cpu")
    output: Any = built.model(**inputs)
    loss = output if isinstance(output, torch.Tensor) else output.loss
    assert loss.isfinite()
    loss.backward()
    assert {p.grad.dtype for p in built.model.parameters() if p.grad is not None} == {torch.float64}


def test_a_model_on_meta_has_sizes_but_no_values() -> None:
    built = model_spec.build_model("models:llama3-8b", seq=131072, device="meta", dtype="bfloat16")
    parameters = list(built.model.parameters())
    assert sum(p.numel() for p in parameters) == 8_030_261_248
    assert {(p.device.type, p.dtype) for p in parameters} == {("meta", torch.bfloat16)}
    assert {tuple(x.shape) for x in built.example_inputs(1, 131072, "meta").values()} == {(1, 131072)}


def test_a_folder_with_a_config_is_built_without_weights(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
    transformers.LlamaConfig(**sizes, intermediate_size=48).save_pretrained(tmp_path)
    built = model_spec.build_model(f"hf:{tmp_path}", seq=16, settings={"num_hidden_layers": 1})
    assert built.vocab == 100
    assert len(built.model.get_submodule("model.layers")._modules) == 1


@pytest.mark.parametrize(
    ("spec", "settings"),
    [
        ("llama", {}),
        ("models:", {}),
        ("models:nothing", {}),
        ("models:llama", {"nothing": 1}),
        ("hf:nothing", {}),
        ("hf:llama", {"nothing": 1}),
        ("hf:vit", {}),
    ],
)
def test_a_model_that_does_not_exist_is_an_error(spec: str, settings: dict[str, Any]) -> None:
    with pytest.raises(IllegalModel, match="legal:"):
        model_spec.build_model(spec, seq=16, settings=settings)


def test_a_users_error_has_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "train", "models:nothing") == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("SP105")
    assert "models:llama" in shown.err
    assert call(monkeypatch, "train", "models:llama", "--mesh", "cp=2", "--nproc", "3") == 2


@pytest.mark.slow
@pytest.mark.thinned(8)
def test_train_prints_json(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = "train models:gpt-tiny --set vocab=256 --set layers=1 --steps 2 --seq 16 --backend aot_eager --json"
    assert call(monkeypatch, *words.split(), "--dump", str(tmp_path)) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["failures"] == []
    assert len(result["parallel"]["losses"]) == len(result["single"]["losses"]) == 2
    assert result["job"]["mesh"] == {"cp": 2}
    assert result["job"]["dump"] == str(tmp_path)


@pytest.mark.slow
@pytest.mark.thinned(8)
def test_a_rank_that_fails_ends_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    words = "train models:gpt-tiny --set vocab=256 --set layers=1 --steps 2 --seq 16 --backend no-such-backend"
    assert call(monkeypatch, *words.split()) == 1
    assert "InvalidBackend" in caplog.text
    assert capsys.readouterr().err.rstrip().endswith("ended with exit code 1, see above")


@pytest.mark.parametrize(("command", "device"), [("explain", "meta"), ("verify", "cpu")])
@pytest.mark.parametrize("ok", [True, False])
def test_explain_and_verify_hand_over_model_mesh_and_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, device: str, ok: bool
) -> None:
    seen: dict[str, Any] = {}

    def stand_in(model: torch.nn.Module, inputs: dict[str, torch.Tensor], **options: Any) -> SimpleNamespace:
        seen.update(options, device=next(model.parameters()).device.type, shape=tuple(inputs["ids_BS"].shape))
        return SimpleNamespace(ok=ok, to_dict=lambda: {"schema": 1})

    monkeypatch.setattr(spcompile, command, stand_in, raising=False)
    words = f"{command} models:llama-tiny --mesh tp=2,cp=4 --seq 64 --option attention=ring --json"
    assert call(monkeypatch, *words.split()) == (1 if command == "verify" and not ok else 0)
    folds = {"fold_layers": True} if command == "explain" else {}
    assert seen == {"mesh": {"tp": 2, "cp": 4}, "attention": "ring", "device": device, "shape": (1, 64), **folds}
    assert json.loads(capsys.readouterr().out) == {"schema": 1}


def test_passes_lists_the_pipeline(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    passes = pytest.importorskip("spcompile.passes")
    if not hasattr(passes, "PIPELINE"):
        pytest.skip("no pipeline yet")
    assert call(monkeypatch, "passes", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == [p.name for p in passes.PIPELINE]


def test_the_package_is_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["spcompile", "--version"])
    with pytest.raises(SystemExit):
        runpy.run_module("spcompile", run_name="__main__")
    assert capsys.readouterr().out.strip() == spcompile.__version__


def test_flags_that_commands_share_keep_the_defaults_of_each() -> None:
    """Also where some of the shared flags are given."""
    defaults = {"explain": ("4096", "bfloat16"), "verify": ("64", "float64")}
    for command, (seq, dtype) in defaults.items():
        _, words, _ = cli.app.parse_args([command, "models:llama-tiny", "--batch", "2"], exit_on_error=False)
        step = words.arguments["step"]
        assert (step.seq, step.dtype, step.batch) == (seq, dtype, 2)
