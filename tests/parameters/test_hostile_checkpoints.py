"""Checkpoints that are damaged, or of another model, are one error that names the file; nothing of them is loaded."""

from __future__ import annotations

import json
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from spcompile.diagnostics import IllegalModel
from spcompile.parameters import checkpoints
from spcompile.parameters.checkpoints import tensors_of
from spcompile.parameters.dcp_folder import DcpFolder
from spcompile.parameters.safetensors_files import INDEX, SafetensorsFiles, files_of

save_file: Callable[..., None] = pytest.importorskip("safetensors.torch").save_file


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(4, 6, dtype=dtype), nn.Linear(6, 2, dtype=dtype))


def weights(**changes: Tensor) -> dict[str, Tensor]:
    found = {name: torch.ones(x.shape) for name, x in model().named_parameters()}
    return found | {name.replace("_", "."): x for name, x in changes.items()}


def require(place: Path, dtype: torch.dtype = torch.float32) -> set[str]:
    return SafetensorsFiles(place, files_of(place)).require(tensors_of(model(dtype)))


def refused(place: Path, file: Path | None = None) -> str:
    with pytest.raises(IllegalModel) as error:
        require(place)
    assert str(file or place) in str(error.value)
    return str(error.value)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(weights(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def indexed(folder: Path, content: Any) -> Path:
    """A folder with one file for each layer, and an index."""
    for layer in ("0", "1"):
        save_file({k: x for k, x in weights().items() if k[0] == layer}, folder / f"{layer}.safetensors")
    (folder / INDEX).write_text(content if isinstance(content, str) else json.dumps({"weight_map": content}))
    return folder


RIGHT = {"0.weight": "0.safetensors", "0.bias": "0.safetensors", "1.weight": "1.safetensors", "1.bias": "1.safetensors"}


def test_whole_files_are_read(file: Path, tmp_path: Path) -> None:
    assert require(file) == set()
    assert require(tmp_path) == set()
    (tmp_path / "indexed").mkdir()
    assert require(indexed(tmp_path / "indexed", RIGHT)) == set()


@pytest.mark.parametrize("length", [0, 4, 8, 100, -1])
def test_truncated_files(file: Path, length: int) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:length])
    refused(file)


@pytest.mark.parametrize("content", [b"\xff" * 16, b"PK\x03\x04" * 100, b"\x02" + bytes(7) + b"{}"])
def test_other_files(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with pytest.raises(IllegalModel):
        require(file)


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe"])
def test_no_plain_file(file: Path, kind: str) -> None:
    file.unlink()
    folder = indexed(file.parent, RIGHT)
    place = folder / "1.safetensors"
    place.unlink()
    if kind != "missing":
        {"folder": place.mkdir, "pipe": lambda: os.mkfifo(place)}[kind]()
    refused(folder, place)


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [
        (torch.int64, torch.float32),
        (torch.bool, torch.float32),
        (torch.complex64, torch.float32),
        (torch.float8_e4m3fn, torch.float32),
        (torch.float32, torch.complex64),
    ],
)
def test_what_would_lose_its_meaning_is_not_converted(file: Path, stored: torch.dtype, dtype: torch.dtype) -> None:
    save_file({name: x.to(stored) for name, x in weights().items()}, file)
    with pytest.raises(IllegalModel) as error:
        require(file, dtype)
    assert str(stored).removeprefix("torch.") in str(error.value)
    assert str(file) in str(error.value)


def test_floats_are_rounded(file: Path) -> None:
    assert require(file, torch.bfloat16) == set()


def test_other_shapes_and_missing_tensors(file: Path) -> None:
    save_file(weights(**{"0_bias": torch.ones(7)}), file)
    assert "'0.bias' has shape (7,)" in refused(file)
    save_file({"0.weight": torch.ones(6, 4)}, file)
    assert "has no '0.bias'" in refused(file)


def test_tensors_that_nobody_asked_for_are_named(file: Path) -> None:
    save_file(weights(**{"2_bias": torch.ones(7)}), file)
    assert require(file) == {"2.bias"}


def test_one_tensor_in_two_files(file: Path) -> None:
    save_file({"0.bias": torch.zeros(6)}, file.parent / "other.safetensors")
    text = refused(file.parent)
    assert "'0.bias' is in" in text
    assert str(file) in text


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": {"0.bias": 3}}',
        "[" * 100_000,
    ],
    ids=range(9),
)
def test_broken_indexes(tmp_path: Path, content: str) -> None:
    refused(indexed(tmp_path, content), tmp_path / INDEX)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "a/../../b.safetensors", "", "a\0b"])
def test_an_index_that_points_out_of_its_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "in").mkdir()
    save_file(weights(), tmp_path / "other.safetensors")
    folder = indexed(tmp_path / "in", {**RIGHT, "1.bias": name})
    assert f"legal: files in {str(folder)!r}" in refused(folder, folder / INDEX)


def test_an_index_that_names_the_wrong_file(tmp_path: Path) -> None:
    indexed(tmp_path, {**RIGHT, "1.bias": "0.safetensors"})
    assert "has no '1.bias'" in refused(tmp_path, tmp_path / "0.safetensors")


def saved(folder: Path, **changes: Tensor) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        dcp.save(weights(**changes), checkpoint_id=folder / "saved", no_dist=True)
    return folder / "saved"


def refused_dcp(folder: Path, file: str) -> str:
    with pytest.raises(IllegalModel) as error:
        DcpFolder(folder).require(tensors_of(model()))
    assert str(folder / file) in str(error.value)
    return str(error.value)


def change_metadata(folder: Path, change: Callable[[Any], None]) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def test_whole_folders_are_read(tmp_path: Path) -> None:
    folder = saved(tmp_path, **{"2_bias": torch.ones(2), "optim_step": torch.ones(1)})
    assert DcpFolder(folder).require(tensors_of(model())) == {"2.bias"}


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps(3), pickle.dumps({"a": 1})], ids=range(4))
def test_broken_metadata(tmp_path: Path, content: bytes) -> None:
    folder = saved(tmp_path)
    (folder / ".metadata").write_bytes(content)
    refused_dcp(folder, ".metadata")


def test_truncated_and_missing_data(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    (data,) = folder.glob("*.distcp")
    data.write_bytes(data.read_bytes()[:-1])
    assert "bytes" in refused_dcp(folder, data.name)
    data.unlink()
    assert "does not exist" in refused_dcp(folder, data.name)


def test_other_shapes_and_dtypes_of_dcp(tmp_path: Path) -> None:
    assert "has shape (7,)" in refused_dcp(saved(tmp_path, **{"0_bias": torch.ones(7)}), ".metadata")
    assert "int64" in refused_dcp(saved(tmp_path, **{"0_bias": torch.ones(6).long()}), ".metadata")


def test_metadata_that_points_out_of_its_folder(tmp_path: Path) -> None:
    folder = saved(tmp_path)

    def outside(metadata: Any) -> None:
        for place in metadata.storage_data.values():
            place.relative_path = "../data.distcp"

    change_metadata(folder, outside)
    assert "'../data.distcp'" in refused_dcp(folder, ".metadata")


def test_metadata_with_parts_missing(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    change_metadata(folder, lambda metadata: metadata.state_dict_metadata["0.bias"].chunks.clear())
    assert "has 0 of 6 numbers of '0.bias'" in refused_dcp(folder, ".metadata")
    folder = saved(tmp_path)
    change_metadata(folder, lambda metadata: metadata.storage_data.clear())
    assert "does not say where" in refused_dcp(folder, ".metadata")
    folder = saved(tmp_path)
    change_metadata(folder, lambda metadata: metadata.state_dict_metadata.pop("0.bias"))
    with pytest.raises(IllegalModel, match=r"has no '0\.bias'"):
        DcpFolder(folder).require(tensors_of(model()))


@pytest.mark.parametrize(
    ("value", "is_parameter", "word"),
    [
        (torch.tensor([1.0, float("nan")]), True, "NaN"),
        (torch.tensor([1.0, float("nan")]), False, "NaN"),
        (torch.tensor([1e30]).half(), True, "infinite as float16"),
        (torch.tensor([complex(0, float("nan"))]), False, "NaN"),
        (torch.tensor([-float("inf")]), False, None),
        (torch.tensor([1]), False, None),
        (torch.empty(0), True, None),
    ],
)
def test_values_that_are_no_numbers(file: Path, value: Tensor, is_parameter: bool, word: str | None) -> None:
    checkpoint = SafetensorsFiles(file, [file])
    checkpoint.require(tensors_of(model()))
    value = nn.Parameter(value, requires_grad=False) if is_parameter else value
    if word is None:
        checkpoints._require_numbers(["0.bias"], value, checkpoint)
    else:
        with pytest.raises(IllegalModel, match=word) as error:
            checkpoints._require_numbers(["0.bias"], value, checkpoint)
        assert str(file) in str(error.value)
