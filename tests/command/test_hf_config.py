"""A folder's config.json may be anything: one error names the file and the field, and nothing of the folder is run."""

from __future__ import annotations

import builtins
import json
import os
from pathlib import Path
from typing import Any

import pytest

from spcompile.command import model_spec
from spcompile.command.arguments import require_model
from spcompile.diagnostics import IllegalModel

pytest.importorskip("transformers")

SMALL = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 100,
    "max_position_embeddings": 64,
}


def folder(tmp_path: Path, **changes: Any) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, **changes}))
    return tmp_path


def refused(path: Path, seq: int = 16, **settings: Any) -> str:
    with pytest.raises(IllegalModel) as error:
        model_spec.build_model(f"hf:{path}", seq=seq, device="meta", settings=settings)
    return str(error.value)


@pytest.fixture(autouse=True)
def asks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*words: object) -> str:
        raise AssertionError("a question was asked")

    monkeypatch.setattr(builtins, "input", asked)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b"null",
        b"3",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
        b" " * (11 << 20),
    ],
    ids=range(10),
)
def test_files_that_are_no_config(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    assert str(tmp_path / "config.json") in refused(tmp_path)


@pytest.mark.parametrize("kind", ["nothing", "folder", "pipe"])
def test_no_file(tmp_path: Path, kind: str) -> None:
    if kind != "nothing":
        {"folder": os.mkdir, "pipe": os.mkfifo}[kind](tmp_path / "config.json")
    assert "no config.json" in refused(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", None),
        ("model_type", "no-such-type"),
        ("model_type", ["llama"]),
        ("hidden_size", "abc"),
        ("hidden_size", -32),
        ("hidden_size", 0),
        ("hidden_size", 10**12),
        ("hidden_size", 32.5),
        ("hidden_size", True),
        ("hidden_size", [32]),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", None),
        ("num_hidden_layers", 10**9),
        ("num_local_experts", 10**9),
        ("bos_token_id", 10**30),
        ("num_attention_heads", 0),
        ("num_attention_heads", {}),
        ("num_key_value_heads", 0),
        ("vocab_size", None),
        ("vocab_size", -1),
        ("max_position_embeddings", "long"),
        ("hidden_act", "no_such_act"),
        ("hidden_act", 3),
        ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", "small"),
        ("attention_dropout", float("inf")),
        ("rope_parameters", "x"),
        ("attention_bias", "yes"),
        ("tie_word_embeddings", [1]),
        ("_attn_implementation", "kernels-community/flash-attn3"),
        ("attn_implementation", "someone/kernel@main:attention"),
        ("_attn_implementation_internal", "someone/kernel"),
        ("attn_implementation", {"": "someone/kernel"}),
        ("attn_implementation", "flash_attention_2"),
        ("experts_implementation", "someone/kernel"),
    ],
)
def test_fields_that_cannot_be(tmp_path: Path, field: str, value: Any) -> None:
    text = refused(folder(tmp_path, **{field: value}))
    assert field in text
    assert str(tmp_path / "config.json") in text


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("trust_remote_code", True),
        ("auto_map", {"AutoConfig": "code.Config"}),
        ("nothing", 1),
        ("to_dict", 1),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", "abc"),
        ("attn_implementation", "someone/kernel"),
    ],
)
@pytest.mark.parametrize("of_folder", [True, False])
def test_settings_that_cannot_be(tmp_path: Path, field: str, value: Any, of_folder: bool) -> None:
    path = folder(tmp_path) if of_folder else Path("llama")
    assert field in refused(path, **{field: value})


@pytest.mark.parametrize("model_type", ["llama", "own-type"])
def test_python_of_a_folder_is_never_run(tmp_path: Path, model_type: str, caplog: pytest.LogCaptureFixture) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "code.py").write_text(f"open({str(ran)!r}, 'w')")
    names = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    path = folder(tmp_path, model_type=model_type, auto_map=names, rope_parameters=None)
    if model_type == "llama":
        built = model_spec.build_model(f"hf:{path}", seq=16, device="meta")
        assert type(built.model).__module__.startswith("transformers.")
        assert "auto_map" in caplog.text
    else:
        assert "never run" in refused(path)
    assert "trust_remote_code" in refused(path, trust_remote_code=True) or model_type != "llama"
    assert not ran.exists()


def test_lengths_beyond_the_table(tmp_path: Path) -> None:
    text = refused(folder(tmp_path), seq=65)
    assert "65 tokens" in text
    assert "at most 64, or --set max_position_embeddings=65" in text
    model_spec.build_model(f"hf:{tmp_path}", seq=65, device="meta", settings={"max_position_embeddings": 65})


def test_a_table_that_begins_behind_padding() -> None:
    assert "at most 510, or --set max_position_embeddings=514" in refused(Path("roberta"), seq=512)
    model_spec.build_model("hf:roberta", seq=512, device="meta", settings={"max_position_embeddings": 514})


def test_a_model_that_fits_no_memory(tmp_path: Path) -> None:
    with pytest.raises(IllegalModel, match="this machine's memory"):
        model_spec.build_model(f"hf:{folder(tmp_path, vocab_size=1 << 30, hidden_size=4096)}", seq=16)
    with pytest.raises(IllegalModel, match="this machine's memory"):
        model_spec.build_model("models:llama3-8b", seq=16, settings={"vocab": 1 << 30})


def test_usual_configs_are_built(tmp_path: Path) -> None:
    usual: dict[str, Any] = {
        "sliding_window": None,
        "eos_token_id": [1, 2],
        "torch_dtype": "bfloat16",
        "own_field": {"a": [1], "num_hash_buckets": 1 << 14, "limit": [0.0, float("inf")]},
        "attn_implementation": "eager",
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }
    built = model_spec.build_model(f"hf:{folder(tmp_path, **usual)}", seq=16, device="meta")
    assert built.model.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["meta-llama/Llama-3.1-8B", "hf:meta-llama/Llama-3.1-8B"])
def test_a_name_of_a_hub_is_told_how_to_get_its_config(name: str) -> None:
    with pytest.raises(IllegalModel) as refusal:
        require_model(name)
    assert "legal: hf:Llama-3.1-8B, after: hf download meta-llama/Llama-3.1-8B config.json" in str(refusal.value)
