"""`spcompile doctor`: what this machine has, what is missing and how to get it, and whether collectives work."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from packaging.requirements import Requirement

from spcompile.command.doctor_ranks import CollectiveCheck, RanksFound
from spcompile.machine.host import cores, host_memory
from spcompile.plain_text import one_line
from spcompile.program.own_files import are_own
from spcompile.torch_private import inductor_cache_dir

GIB = 2**30
MOST_CLOCK_SECONDS = 1.0  # by which clocks may differ before the times of logs mislead
_WHAT_FOR = {
    "transformers": ("models of transformers", "pip install 'spcompile[hf]'"),
    "triton": ("attention kernels on GPUs", "pip install 'spcompile[triton]'"),
}


@dataclass(frozen=True)
class Finding:
    """One line. ok: None where nothing is wrong and something is missing that not everybody needs. cure: what helps."""

    section: str
    name: str
    found: str
    ok: bool | None = True
    cure: str = ""


def findings() -> Iterator[Finding]:
    """What can be seen without other ranks."""
    yield from _versions()
    yield from _devices()
    yield from _communication()
    yield from _compiling()


def _versions() -> Iterator[Finding]:
    yield Finding("versions", "python", platform.python_version())
    yield Finding("versions", "spcompile", version("spcompile"))
    needed = {r.name: r for r in map(Requirement, requires("spcompile") or []) if r.marker is None}
    for name, requirement in needed.items():
        there = version(name)
        fits = requirement.specifier.contains(there.partition("+")[0], prereleases=True)
        yield Finding("versions", name, there, fits, "" if fits else f"pip install '{requirement}'")
    for name, (purpose, cure) in _WHAT_FOR.items():
        try:
            yield Finding("versions", name, version(name))
        except PackageNotFoundError:
            yield Finding("versions", name, f"not installed: {purpose}", None, cure)


def _devices() -> Iterator[Finding]:
    memory = host_memory()
    yield Finding("devices", "cpu", f"{cores()} cores" + (f", {memory / GIB:.0f} GiB" if memory is not None else ""))
    count = torch.cuda.device_count()
    if not count:
        yield Finding("devices", "gpu", "none that torch sees: everything runs on CPU", None, "a CUDA build of torch")
    for i in range(count):
        properties = torch.cuda.get_device_properties(i)
        found = f"{properties.name}, {properties.total_memory / GIB:.0f} GiB, sm_{properties.major}{properties.minor}"
        fits = properties.major >= 8
        yield Finding("devices", f"gpu {i}", one_line(found), fits, "" if fits else "sm_80 or later for the kernels")
    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    if pairs:
        direct = sum(torch.cuda.can_device_access_peer(a, b) for a, b in pairs)
        cure = "" if direct == len(pairs) else "options={'links': {axis: 'network'}} says that an axis is slower"
        found = f"{direct} of {len(pairs)} pairs of GPUs reach each other directly"
        yield Finding("devices", "links", found, None if cure else True, cure)


def _communication() -> Iterator[Finding]:
    is_there = dist.is_available() and dist.is_gloo_available()
    yield Finding("communication", "gloo", "yes" if is_there else "no", is_there, "" if is_there else "another torch")
    if torch.cuda.is_available():
        nccl = dist.is_available() and dist.is_nccl_available()
        found = ".".join(map(str, torch.cuda.nccl.version())) if nccl else "no"
        yield Finding("communication", "nccl", found, nccl, "" if nccl else "a build of torch with NCCL")
    debug = os.environ.get("TORCH_DISTRIBUTED_DEBUG", "OFF").upper()
    if debug == "DETAIL":
        yield Finding("communication", "TORCH_DISTRIBUTED_DEBUG", "DETAIL: every collective is checked, slowly", None)


def _compiling() -> Iterator[Finding]:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    cure = "" if compiler else "a C++ compiler, as apt install g++; or options={'compiler': 'eager'}"
    yield Finding("compiling", "C++ compiler, for CPUs", compiler or "none", True if compiler else None, cure)
    folder = Path(inductor_cache_dir())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            is_own = are_own(folder)
    except OSError as error:
        yield Finding("compiling", "cache", one_line(f"{folder}: {error}"), None, "TORCHINDUCTOR_CACHE_DIR")
        return
    cure = "" if is_own else f"chmod go-w {folder}: programs are not kept where others may write"
    free = shutil.disk_usage(folder).free / GIB
    yield Finding("compiling", "cache", one_line(f"{folder}, {free:.0f} GiB free"), True if is_own else None, cure)


def findings_of_ranks(found: RanksFound) -> Iterator[Finding]:
    """What ranks found together."""
    names = ", ".join(dict.fromkeys(found.hosts))
    yield Finding(
        "ranks", "processes", one_line(f"{len(found.hosts)} by {found.backend} on {found.device}, at {names}")
    )
    alike = len(set(found.versions)) == 1
    told = found.versions[0] if alike else "; ".join(f"{i}: {text}" for i, text in enumerate(found.versions))
    yield Finding("ranks", "versions", one_line(told), alike, "" if alike else "one environment for all ranks")
    fits = found.clock_seconds <= MOST_CLOCK_SECONDS
    cure = "" if fits else "ntp: times in logs of ranks cannot be compared"
    yield Finding("ranks", "clocks", f"differ by {1e3 * found.clock_seconds:.1f} ms", True if fits else None, cure)
    for check in found.checks:
        yield Finding("collectives", check.name, _told(check), check.wrong is None, _cure(check))


def _told(check: CollectiveCheck) -> str:
    if check.wrong is not None:
        return one_line(check.wrong)
    return f"{check.calls} calls right, {1e3 * check.seconds / check.calls:.2f} ms each"


def _cure(check: CollectiveCheck) -> str:
    return "" if check.wrong is None else "TORCH_DISTRIBUTED_DEBUG=DETAIL and NCCL_DEBUG=INFO tell more"


def lines_of(found: list[Finding]) -> Iterator[str]:
    """For people: a line each."""
    section = ""
    for one in found:
        if one.section != section:
            section = one.section
            yield section
        mark = {True: "ok", None: "note", False: "WRONG"}[one.ok]
        yield f"  {mark:<6} {one.name:<24} {one.found}" + (f"  -> {one.cure}" if one.cure else "")


def as_dicts(found: list[Finding]) -> list[dict[str, Any]]:
    """For programs."""
    return [dict(vars(one)) for one in found]
