"""The options of the backend: one frozen dataclass, checked before anything else happens."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from spcompile.diagnostics import IllegalOption, UnknownOption
from spcompile.machine.accelerators import ACCELERATORS
from spcompile.machine.byte_sizes import parse_bytes
from spcompile.machine.links import LINKS
from spcompile.machine.measured import load_measured
from spcompile.machine.mesh import AXES
from spcompile.machine.optimizers import OPTIMIZERS, optimizer_of, text_of_states
from spcompile.machine.optimizers import Optimizer as States

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.optim import Optimizer

ATTENTION = ("auto", "ring", "ulysses", "hybrid")
BALANCE = ("zigzag", "contiguous")
OUTPUTS = ("full", "sharded", "loss")
COMPILER = ("inductor", "eager")
ON_GRAPH_BREAK = ("error", "gather")
MEMORY = ("auto", "speed", "min")
COMPARE = ("auto", "call", "later", "compile")


@dataclass(frozen=True)
class Options:
    """What `torch.compile(model, backend="spcompile", options={...})` accepts.

    mesh: a DeviceMesh with named axes, or their sizes, {"dp": 2, "cp": 4}, the first axis outermost; default: one `cp`
        axis over the whole world.
    attention: how attention is parallelised: "auto" (by predicted time), "ring", "ulysses", "hybrid" (Ulysses among
        neighbours, a ring between groups of them), or a hybrid's factors, as {"ulysses": 4, "ring": 2} on cp = 8.
    balance: order of the sequence in causal rings: "zigzag" or "contiguous".
    outputs: "full" (as the plain module), "sharded" (DTensor), "loss" (scalars only).
    compiler: what runs the local graph: "inductor" or "eager".
    regather: gather activations again in the backward instead of saving them whole: less memory, more communication.
    links: what ranks of an axis talk over, {axis: "nvlink" | "network" | "loopback" | ...}; default: NVLink inside a
        node of eight ranks, the network beyond, of the generation that goes with the accelerator. Decides what is
        chosen and predicted, never what is right.
    accelerator: what computes: "h100", "h200", "b200", "a100", "cpu", or a file that `spcompile calibrate` has written,
        as "machine.json", which also says how fast links are. Decides what hides behind what, predicted times, memory.
    memory: what a step may take on one rank. "auto": what the accelerator has, less a tenth, where one computes; beyond
        that, values are made again instead of saved, the cheapest first. "speed": as fast as can be. "min": as small as
        can be, with the host's memory. Or a budget: bytes, or text as "72GiB".
    host_memory: what the ranks of a node may keep of a step in the memory of their host, all together: bytes, or text
        as "1TiB". "auto": what machines with the accelerator have, less a tenth. 0: nothing. Only what a budget needs
        goes there.
    optimizer: whose states count as memory: "adamw" (two as the parameter), "adamw-float32" (two in float32),
        "adamw-master" (these and a float32 copy of the parameter), "momentum" (one), "none". Or an optimizer of torch,
        whose states count as they are, or before its first step as they will be; it becomes text, "8 bytes an element".
    passes: {pass name: False} switches a pass off, {pass name: {field: value}} sets its options.
    plugins: modules with passes and sharding rules from outside the package, by name: a list, or text, "a,b.c". Those
        that installed packages name as entry points `spcompile.plugins` are there without it.
    dump: a folder for numbered text of the graph after every pass.
    compare: when ranks compare what they do, besides at every compile: "call": before every call and backward, which
        wait for it; "later": a thread compares, and the next call learns what it found; "compile": not at calls. "auto"
        is "call" on CPU meshes and "later" on accelerators.
    compare_inputs: compare the values of inputs, too, on ranks of cp and tp.
    on_graph_break: what to do with a model that Dynamo makes several graphs of: "error", or "gather": each graph is
        sharded on its own, what crosses between two is whole on every rank of cp and tp, and remarks say what that is.
        Not over dp.
    strict: turn every remark about lost parallelism into an error.
    """

    mesh: DeviceMesh | Mapping[str, int] | None = None
    attention: str | Mapping[str, int] = "auto"
    balance: str = "zigzag"
    outputs: str = "full"
    compiler: str = "inductor"
    regather: bool = True
    links: Mapping[str, str] = field(default_factory=dict)
    accelerator: str = "h100"
    memory: str | int = "auto"
    host_memory: str | int = "auto"
    optimizer: str | Optimizer = "adamw"
    passes: Mapping[str, Any] = field(default_factory=dict)
    plugins: Sequence[str] | str = ()
    dump: str | None = None
    compare: str = "auto"
    compare_inputs: bool = True
    on_graph_break: str = "error"
    strict: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.attention, Mapping):
            _factors(self.attention)
        else:
            _one_of("attention", self.attention, ATTENTION)
        _one_of("balance", self.balance, BALANCE)
        _one_of("outputs", self.outputs, OUTPUTS)
        _one_of("compiler", self.compiler, COMPILER)
        _one_of("compare", self.compare, COMPARE)
        _one_of("on_graph_break", self.on_graph_break, ON_GRAPH_BREAK)
        if isinstance(self.accelerator, str) and self.accelerator.endswith(".json"):
            load_measured(self.accelerator)
        _one_of("accelerator", self.accelerator, tuple(ACCELERATORS))
        if not isinstance(self.optimizer, str) and hasattr(self.optimizer, "param_groups"):
            object.__setattr__(self, "optimizer", text_of_states(self.optimizer))
        elif not (isinstance(self.optimizer, str) and optimizer_of(self.optimizer) is not None):
            _one_of("optimizer", self.optimizer, tuple(OPTIMIZERS))
        if self.memory not in MEMORY:
            bytes_of_option(self.memory)
        host_bytes_of_option(self.host_memory)
        for name in ("regather", "compare_inputs", "strict"):
            if not isinstance(getattr(self, name), bool):
                raise IllegalOption(f"{name}={getattr(self, name)!r}", legal="True, False")
        if not isinstance(self.links, Mapping):
            raise IllegalOption(f"links={self.links!r}", legal="a dict from mesh axes to names of links")
        for axis, name in self.links.items():
            _one_of("links: axis", axis, AXES)
            _one_of(f"links: {axis}", name, tuple(LINKS))
        if self.dump is not None and not (isinstance(self.dump, str) and self.dump):
            raise IllegalOption(f"dump={self.dump!r}", legal="a folder's path")
        if not isinstance(self.passes, Mapping):
            raise IllegalOption(f"passes={self.passes!r}", legal="a dict from pass names to False or options")
        object.__setattr__(self, "plugins", _module_names(self.plugins))

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None) -> Options:
        """From the dict a user gave.

        Raises:
            UnknownOption: a key that does not exist; the nearest legal one is named.
            IllegalOption: a value that is not legal.
        """
        given = dict(options or {})
        legal = [f.name for f in fields(cls)]
        for key in given:
            if key not in legal:
                raise UnknownOption(f"{key!r}{_did_you_mean(key, legal)}", legal=", ".join(legal))
        return cls(**given)

    @property
    def states(self) -> States:
        """What the optimizer keeps."""
        found = optimizer_of(str(self.optimizer))
        assert found is not None
        return found

    def require_factors(self, degree: int) -> None:
        """Raises IllegalOption where the factors of a hybrid do not make up the axis `cp`."""
        asked = self.attention
        if isinstance(asked, Mapping) and asked["ulysses"] * asked["ring"] != degree:
            pairs = [(n, degree // n) for n in range(1, degree + 1) if degree % n == 0]
            legal = ", ".join(f"{{'ulysses': {u}, 'ring': {r}}}" for u, r in pairs)
            raise IllegalOption(f"attention={dict(asked)!r} on cp = {degree}", legal=legal)

    def fingerprint(self) -> str:
        """Text that must be equal on all ranks (the mesh is compared on its own)."""
        return " ".join(f"{name}={value}" for name, value in self.compared().items())

    def compared(self) -> dict[str, str]:
        """The options that must be equal on all ranks, as text."""
        found = {f.name: repr(getattr(self, f.name)) for f in fields(self) if f.name not in ("mesh", "dump")}
        if self.accelerator.endswith(".json"):  # equal names are not enough
            link = ACCELERATORS[self.accelerator].links["network"]
            figures = repr((ACCELERATORS[self.accelerator], LINKS[link])).encode()
            found["accelerator"] += f" {hashlib.sha256(figures).hexdigest()[:16]}"
        return found


def bytes_of_option(memory: Any) -> int:
    """The budget of option `memory`.

    Raises:
        IllegalOption: it is no positive number of bytes.
    """
    found = parse_bytes(memory) if isinstance(memory, str) else memory
    if not isinstance(found, int) or isinstance(found, bool) or found <= 0:
        close = _did_you_mean(memory, MEMORY) if isinstance(memory, str) else ""
        legal = ", ".join(map(repr, MEMORY)) + ', or a budget of one rank: bytes, or text as "72GiB"'
        raise IllegalOption(f"memory={memory!r}{close}", legal=legal)
    return found


def _module_names(plugins: Any) -> tuple[str, ...]:
    given = plugins.split(",") if isinstance(plugins, str) else plugins
    names = tuple(given) if isinstance(given, (list, tuple)) else (None,)
    if not all(isinstance(name, str) and all(map(str.isidentifier, name.split("."))) for name in names):
        raise IllegalOption(f"plugins={plugins!r}", legal="names of modules: a list, or text, as 'a,package.b'")
    return tuple(dict.fromkeys(names))


def host_bytes_of_option(host_memory: Any) -> int | None:
    """The bytes of a node of option `host_memory`; None for "auto".

    Raises:
        IllegalOption: it is no number of bytes.
    """
    if host_memory == "auto":
        return None
    found = parse_bytes(host_memory) if isinstance(host_memory, str) else host_memory
    if not isinstance(found, int) or isinstance(found, bool) or found < 0:
        legal = "'auto', 0 for none, or what the ranks of a node may keep there: bytes, or text as \"1TiB\""
        raise IllegalOption(f"host_memory={host_memory!r}", legal=legal)
    return found


def _factors(attention: Mapping[str, int]) -> None:
    sizes = attention.values()
    are_counts = all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes)
    if set(attention) != {"ulysses", "ring"} or not are_counts:
        legal = "{'ulysses': U, 'ring': R}, positive ints whose product is the size of axis cp"
        raise IllegalOption(f"attention={dict(attention)!r}", legal=legal)


def _one_of(name: str, value: Any, legal: tuple[str, ...]) -> None:
    if value not in legal:
        raise IllegalOption(f"{name}={value!r}{_did_you_mean(value, legal)}", legal=", ".join(map(repr, legal)))


def _did_you_mean(value: Any, legal: Any) -> str:
    close = difflib.get_close_matches(str(value), list(legal), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
