"""Finished programs on disk, beside Inductor's cache: a new process that finds its own does not compile it again.

A file holds what AOTAutograd made of one Dynamo graph, which names entries of Inductor's cache, and what is needed to
call it. Its name is a hash of all that the program depends on: the graph with its source lines, the inputs, options,
mesh, the names of the process groups, the passes, the sources of this package, and whatever torch's own key for such a
graph holds (its version, its settings, the machine). A part that cannot be named means no caching. Ranks share a file,
unless the code names groups of parts of axes, which it alone knows: then each has its own.

Reading a program runs what its file says. So one is used only where nobody but this user can have written it
(`own_files`); Inductor's entries lie in the same folder, which must be this user's too.

The cache is on where Inductor's and autograd's own are: `torch._inductor.config.fx_graph_cache`,
`torch._functorch.config.enable_autograd_cache`, `torch.compiler.config.force_disable_caches`.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import logging
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.fx as fx

from spcompile.capture.autocast import autocast_off
from spcompile.capture.graph_breaks import model_part_of
from spcompile.capture.module_buffer import Relied, contents_of
from spcompile.capture.retrace import OWN, is_state
from spcompile.graph.printer import format_graph
from spcompile.machine.mesh import is_whole_axis
from spcompile.options import Options
from spcompile.passes_api import Pass
from spcompile.plain_text import one_line
from spcompile.program.build import Output
from spcompile.program.own_files import are_own, read_own, write_own
from spcompile.program.plugins import plugin_identities
from spcompile.torch_private import autograd_cache_key, disable_modes, load_autograd_result
from spcompile.torch_private import inductor_cache_dir as cache_dir

log = logging.getLogger(__name__)
_PACKAGES = ("spcompile", "spcompile.passes")


@dataclass
class Finished:
    """What one compile left for its caller, and for later processes.

    outputs, relied, draws_random_numbers: as LocalProgram and `module_buffer` have them.
    remarks: as text.
    text: of the final graphs, which ranks compare.
    groups: axis, or part of one -> the process group that the code names, in the order in which they were asked for.
    result: of AOTAutograd, where the program can be stored.
    """

    outputs: list[Output]
    relied: list[Relied]
    draws_random_numbers: bool
    remarks: list[str]
    text: str = ""
    groups: dict[str, str] = field(default_factory=dict)
    result: Any = None


def key_of(
    gm: fx.GraphModule, inputs: Sequence[Any], options: Options, machine: Mapping[str, str], passes: Sequence[Pass]
) -> str | None:
    """The name of a graph's program; None where it must not be cached.

    machine: what the emitted code names of the mesh: its shape, its device type and the groups of its axes.
    """
    if not _enabled() or options.compiler != "inductor" or options.dump is not None:
        return None
    if any(isinstance(x, (torch.SymInt, torch.SymFloat, torch.SymBool)) for x in inputs):
        return None
    if any(n.op == "get_attr" and isinstance(getattr(gm, str(n.target), None), torch.Tensor) for n in gm.graph.nodes):
        return None  # its values may decide
    try:
        theirs = autograd_cache_key(gm, inputs)
    except Exception as reason:
        log.info("not cached: %s", one_line(str(reason)))
        return None
    facts = [
        theirs,
        format_graph(gm),
        options.fingerprint(),
        str(model_part_of(gm)),
        *(f"{k}={v}" for k, v in sorted(machine.items())),
    ]
    facts += [_input_facts(n, x) for n, x in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True)]
    outside = plugin_identities()
    if not all(outside.values()):
        log.info("not cached: a plugin or a sharding rule has no source file")
        return None
    facts += [sources(), *(f"{name} {hashed}" for name, hashed in outside.items())]
    facts += [f"{p!r} {_file_hash(inspect.getfile(type(p)))}" for p in passes]
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()


def load(key: str, coordinate: str) -> tuple[Finished, Callable[..., Any]] | None:
    """A stored program and its code as a callable over the local graph's inputs; None where a part of it is missing.

    coordinate: this rank's place on the mesh.
    """
    for name in (key, f"{key}-{coordinate}"):
        try:
            folder = _folder_of_programs()
            content = read_own(folder / name) if are_own(folder.parent) else None
            if content is None:
                continue
            found: Finished = pickle.loads(content)
            with autocast_off():
                return found, load_autograd_result(found.result)
        except Exception as reason:  # the program is compiled again, and its file replaced
            log.info("a cached program cannot be used: %s", one_line(str(reason)))
    return None


def store(key: str, coordinate: str, finished: Finished) -> None:
    """Leave a program for later processes. Ranks may write the same file at once: it appears as a whole."""
    if finished.result is None:
        return
    try:
        with disable_modes():
            content = pickle.dumps(finished)
        folder = _folder_of_programs()
        if are_own(folder.parent):
            write_own(folder / (key if all(map(is_whole_axis, finished.groups)) else f"{key}-{coordinate}"), content)
    except Exception as reason:
        log.info("not cached: %s", one_line(str(reason)))


def _enabled() -> bool:
    return bool(
        os.name == "posix"  # elsewhere nothing tells who may write a file
        and torch._inductor.config.fx_graph_cache
        and torch._functorch.config.enable_autograd_cache
        and not torch.compiler.config.force_disable_caches
    )


def _folder_of_programs() -> Path:
    return Path(cache_dir()).resolve() / "spcompile"


def _input_facts(placeholder: fx.Node, value: Any) -> str:
    """What the compiler reads of an input besides what torch's key holds: one rank's entries, and which mask it is."""
    state = is_state(placeholder)
    trainable = isinstance(value, torch.Tensor) and value.requires_grad
    own = tuple(placeholder.meta[OWN].shape) if OWN in placeholder.meta else None
    return f"{placeholder.name} {state} {trainable} {own} {contents_of(value) if state else None}"


@functools.cache
def sources() -> str:
    """A hash of every source and data file of this package: what caches below, which see graphs alone, must be told."""
    found = [
        (root, file) for root in map(_folder, _PACKAGES) for kind in ("*.py", "*.json") for file in root.rglob(kind)
    ]
    files = sorted((file.relative_to(root), file) for root, file in found)
    names = "\0".join(f"{name} {_file_hash(str(file))}" for name, file in files)
    return hashlib.sha256(names.encode()).hexdigest()


def _folder(package: str) -> Path:
    spec = find_spec(package)
    assert spec is not None, package
    assert spec.origin is not None, package
    return Path(spec.origin).parent


@functools.cache
def _file_hash(file: str) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()
