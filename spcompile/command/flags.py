"""Flags that several commands have, and what they mean once they are checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from cyclopts import Parameter

from spcompile.command.arguments import (
    MOST_TOKENS,
    backend_options,
    parse_attention,
    parse_dtype,
    parse_link,
    parse_mesh,
    parse_options,
    parse_settings,
    parse_tokens,
    require_between,
    require_model,
)
from spcompile.options import Options as BackendOptions

Sizes = Annotated[list[str] | None, Parameter(name="--mesh", help="Axis sizes, as cp=8 or tp=2,cp=4.", negative="")]
Settings = Annotated[
    list[str] | None, Parameter(name="--set", help="A setting of the model, as layers=2; may be repeated.", negative="")
]
Options = Annotated[
    list[str] | None,
    Parameter(name="--option", help="Another backend option, as strict=True; may be repeated.", negative=""),
]
Json = Annotated[bool, Parameter(name="--json", help="Print JSON for programs.", negative="")]
Length = Annotated[str, Parameter(help="Tokens in a row: 4096, 128k.")]
Rows = Annotated[int, Parameter(help="Rows in the whole batch.")]
Dtype = Annotated[
    str, Parameter(help="Of weights and activations: bfloat16, float32, float16, float64, or short, as bf16.")
]
Attention = Annotated[
    str | None,
    Parameter(help="The backend's option: auto, ring, ulysses, hybrid, or factors as ulysses=4,ring=2."),
]


@dataclass(frozen=True)
class Asked:
    """What a command is asked about, checked. settings: of the model; options: of the backend."""

    batch: int
    dtype: str
    settings: Mapping[str, Any]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class AskedOnMesh(Asked):
    """And for one length and mesh. sizes: of the mesh."""

    tokens: int
    sizes: Mapping[str, int]


@Parameter(name="*")
@dataclass(frozen=True)
class OnMesh:
    """A step of a model on a mesh."""

    mesh: Sizes = None
    seq: Length = "4096"
    batch: Rows = 1
    dtype: Dtype = "bfloat16"
    attention: Attention = None
    outputs: Annotated[str | None, Parameter(help="The backend's option: full, sharded or loss.")] = None
    settings: Settings = None
    option: Options = None

    def asked(self, model: str, also: Sequence[str], **others: Any) -> AskedOnMesh:
        """The flags checked. also: options of the command's own function. others: options that have other flags.

        Raises:
            SpcompileError: an illegal word.
        """
        sizes = parse_mesh(self.mesh or ["cp=2"])
        tokens, dtype = parse_tokens("--seq", self.seq), parse_dtype(self.dtype)
        require_between("--batch", self.batch, 1, MOST_TOKENS)
        require_model(model)
        settings = parse_settings(self.settings or [])
        options = {"attention": parse_attention(self.attention), "outputs": self.outputs}
        options |= others | parse_options(self.option or [])
        options = backend_options(options, sizes, also=also)
        return AskedOnMesh(self.batch, dtype, settings, options, tokens, sizes)


@Parameter(name="*")
@dataclass(frozen=True)
class InOneProcess(OnMesh):
    """A step small and exact enough for all ranks of a mesh to be run in one process."""

    seq: Length = "64"
    dtype: Dtype = "float64"


@Parameter(name="*")
@dataclass(frozen=True)
class OnMachine:
    """What a step runs on."""

    gpu: Annotated[
        str | None,
        Parameter(
            help="The backend's option accelerator: h100, h200, b200, a100, cpu, or a file of calibrate, as "
            "machine.json."
        ),
    ] = None
    link: Annotated[
        str | None,
        Parameter(
            help="What all ranks talk over: nvlink or ib. Default: NVLink inside a node of 8 ranks, the network beyond."
        ),
    ] = None

    def options(self) -> dict[str, Any]:
        """As options of the backend; None where nothing was said.

        Raises:
            IllegalOption: no such link.
        """
        return {"accelerator": self.gpu, "links": parse_link(self.link) if self.link is not None else None}


@Parameter(name="*")
@dataclass(frozen=True)
class OnAnyMesh(OnMachine):
    """A step of a model on so many ranks, of which it is to be found how they are used best."""

    batch: Rows = 1
    dtype: Dtype = "bfloat16"
    memory: Annotated[
        str | None,
        Parameter(help="What a step may take on one rank, as 80GiB. Default: what the accelerator has, less a tenth."),
    ] = None
    optimizer: Annotated[
        str | None, Parameter(help="The backend's option: adamw, adamw-float32, adamw-master, momentum, none.")
    ] = None
    workers: Annotated[int | None, Parameter(help="Processes that compile; default: one for each core.")] = None
    settings: Settings = None
    option: Options = None

    def asked(self, model: str) -> Asked:
        """The flags checked, without a mesh.

        Raises:
            SpcompileError: an illegal word.
        """
        dtype = parse_dtype(self.dtype)
        require_between("--batch", self.batch, 1, MOST_TOKENS)
        require_between("--workers", self.workers, 1, 1 << 10)
        require_model(model)
        settings = parse_settings(self.settings or [])
        given = {**self.options(), "memory": self.memory, "optimizer": self.optimizer}
        options = {name: value for name, value in given.items() if value is not None} | parse_options(self.option or [])
        BackendOptions.parse({name: value for name, value in options.items() if name != "attention"})
        return Asked(self.batch, dtype, settings, options)
