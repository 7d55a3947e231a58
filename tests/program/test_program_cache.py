"""The name of a cached program changes with all that the program depends on."""

from __future__ import annotations

import errno
import inspect
import os
import pickle
import resource
import signal
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.fx as fx
from torch import Tensor, nn

import spcompile.passes
from spcompile.options import Options
from spcompile.passes import PIPELINE
from spcompile.passes.schedule.overlap_collectives import OverlapCollectives
from spcompile.program import own_files, program_cache
from spcompile.program.own_files import Damaged, read_own, write_own
from spcompile.program.program_cache import Finished, key_of, load, store
from spcompile.program.trace import through_dynamo

SOONER = OverlapCollectives(ahead=1.0)
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


@pytest.mark.thinned(6)
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
        lambda: key(passes=[SOONER if x.name == SOONER.name else x for x in PIPELINE]),
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


def test_plugins_change_the_key_and_without_their_sources_nothing_is_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = set()
    for sources in ({}, {"a_plugin": "1"}, {"a_plugin": "2"}):
        monkeypatch.setattr(program_cache, "plugin_identities", lambda found=sources: found)
        keys.add(key())
    assert len(keys - {None}) == 3
    monkeypatch.setattr(program_cache, "plugin_identities", lambda: {"a_plugin": ""})
    assert key() is None


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
    content = read_own(tmp_path / "spcompile" / "name")
    assert content is not None
    assert pickle.loads(content).text == ""
    assert load("name", "0") is None
    (tmp_path / "spcompile" / "name").write_bytes(b"cut off")
    assert load("name", "0") is None
    assert load("another", "0") is None


class Runs:
    """Unpickling it leaves a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one program, `name`, which can be loaded."""
    monkeypatch.setattr(program_cache, "load_autograd_result", lambda result: result)
    store("name", "0", Finished([], [], False, [], result="code"))
    assert load("name", "0") is not None
    return tmp_path / "spcompile"


def give_away(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root gives files away")
    os.chown(path, 12345, 12345)


@pytest.mark.parametrize(
    ("change", "mend"),
    [
        (lambda folder: give_away(folder), "another folder"),
        (lambda folder: give_away(folder.parent), "another folder"),
        (lambda folder: give_away(folder / "name"), "remove it"),
        (lambda folder: folder.chmod(0o777), "chmod go-w"),
        (lambda folder: folder.chmod(0o720), "chmod go-w"),
        (lambda folder: folder.parent.chmod(0o777), "chmod go-w"),
        (lambda folder: (folder / "name").chmod(0o666), "chmod go-w"),
        (lambda folder: (folder.rename(folder.parent / "other"), folder.symlink_to("other")), "remove it"),
    ],
)
def test_what_others_may_have_written_is_not_unpickled(
    programs: Path, change: Callable[[Path], None], mend: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_own(programs / "name", pickle.dumps(Runs(programs.parent / "ran")))
    change(programs)
    own_files._warn.cache_clear()
    assert load("name", "0") is None
    assert load("name", "0") is None
    assert not (programs.parent / "ran").exists()
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert mend in warning
    assert str(programs.parent) in warning


def test_nothing_is_stored_where_others_may_write(programs: Path) -> None:
    programs.chmod(0o777)
    store("another", "0", Finished([], [], False, [], result="code"))
    assert [file.name for file in programs.iterdir()] == ["name"]


def test_a_file_of_another_user_is_replaced(programs: Path) -> None:
    give_away(programs / "name")
    assert load("name", "0") is None
    store("name", "0", Finished([], [], False, [], result="code"))
    assert load("name", "0") is not None


def test_only_this_user_may_read_and_write_what_is_stored(programs: Path) -> None:
    assert stat.S_IMODE(programs.stat().st_mode) == 0o700
    assert stat.S_IMODE((programs / "name").stat().st_mode) == 0o600


def test_every_flipped_bit_and_every_cut_is_found(programs: Path) -> None:
    file = programs / "name"
    content = file.read_bytes()
    for place in range(0, len(content), 3):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        for damaged in (bytes(flipped), content[:place]):
            file.write_bytes(damaged)
            with pytest.raises(Damaged):
                read_own(file)
    assert load("name", "0") is None
    store("name", "0", Finished([], [], False, [], result="code"))
    assert load("name", "0") is not None


def test_the_program_of_another_name_is_none(programs: Path) -> None:
    (programs / "name").rename(programs / "another")
    assert load("another", "0") is None
    store("another", "0", Finished([], [], False, [], result="code"))
    assert load("another", "0") is not None


def test_a_damaged_common_program_hides_no_rank_s_own(programs: Path) -> None:
    store("name", "0.1", Finished([], [], False, [], groups={"cp.inner2": "7"}, result="mine"))
    (programs / "name").write_bytes(b"")
    found = load("name", "0.1")
    assert found is not None
    assert found[0].result == "mine"
    assert load("name", "0.0") is None


@pytest.mark.parametrize("kind", ["folder", "pipe", "link"])
def test_what_is_no_plain_file_is_no_program(programs: Path, kind: str) -> None:
    file = programs / "another"
    {"folder": file.mkdir, "pipe": lambda: os.mkfifo(file), "link": lambda: file.symlink_to("name")}[kind]()
    assert load("another", "0") is None


@pytest.mark.parametrize("call", ["mkstemp", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_takes_nothing_leaves_no_half_files(
    programs: Path, call: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(own_files.tempfile if call == "mkstemp" else own_files.os, call, fails)
    store("another", "0", Finished([], [], False, [], result="code"))
    assert [file.name for file in programs.iterdir()] == ["name"]
    assert load("name", "0") is not None


def test_a_full_disk_leaves_no_half_files(programs: Path) -> None:
    """The limit of a file's size stands for a full disk: a part is written, then none."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, limits[1]))
        store("another", "0", Finished([], [], False, ["x" * (1 << 14)], result="code"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert [file.name for file in programs.iterdir()] == ["name"]


def test_two_jobs_at_once(programs: Path) -> None:
    """Writers replace whole files, so a reader never sees a part of one."""
    path, contents = programs / "another", [bytes([number]) * 100_000 for number in range(4)]

    def job(content: bytes) -> bool:
        for _ in range(20):
            write_own(path, content)
            if read_own(path) not in contents:
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(job, contents))
    assert sorted(file.name for file in programs.iterdir()) == ["another", "name"]
