"""What `spcompile.plan` returns: the candidates in order, the choice, why, and what to paste."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from spcompile.machine.accelerators import ACCELERATORS
from spcompile.machine.byte_sizes import bytes_text
from spcompile.machine.links import link_of
from spcompile.machine.mesh import MeshShape
from spcompile.memory.planner import Wish
from spcompile.options import Options
from spcompile.plain_text import one_line
from spcompile.planning.candidates import Candidate
from spcompile.planning.ranking import Ranked, candidate_name, chosen, ranked, what_it_would_take, why
from spcompile.planning.search import Depths, Result

PLANS_SCHEMA_VERSION = 1
SHOWN = 24  # rows of the table
_WIDTH = 150


@dataclass
class RankedPlans:
    """rows: those that fit first, the fastest first. choice: index of the one to take. refused: could not be compiled.

    limit: bytes that a step may take on one rank; None: no limit. notes: what the figures assume.
    """

    model: str
    world: int
    tokens: int
    entries: int
    options: Options
    limit: int | None
    rows: list[Ranked]
    refused: list[Result] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def choice(self) -> int:
        """Which row to take."""
        return chosen(self.rows)

    @property
    def reason(self) -> str:
        """Why that one."""
        return why(self.rows, self.choice)

    @property
    def runner_up(self) -> str:
        """The best on another mesh or with another attention, and what it would take to prefer it; "" without one."""
        return what_it_would_take(self.rows, self.choice)

    def options_of(self, row: Ranked) -> dict[str, Any]:
        """The options of the backend, but the mesh, with which a program is the one of this row."""
        one, plain = row.result, Options()
        given = {name: getattr(self.options, name) for name in vars(plain)}
        found = {name: value for name, value in given.items() if value != getattr(plain, name)} | one.candidate.options
        if "passes" in found:
            found["passes"] = {**self.options.passes, **found["passes"]}
        return found | ({"memory": one.budget} if one.budget is not None else {})

    def call(self, row: Ranked) -> str:
        """The lines of Python that run a model so."""
        one = row.result.candidate
        if not one.mesh:
            return 'model.compile(backend="spcompile")'
        sizes = ", ".join(str(size) for _, size in one.mesh) + ("," if len(one.mesh) == 1 else "")
        names = ", ".join(f'"{axis}"' for axis, _ in one.mesh) + ("," if len(one.mesh) == 1 else "")
        given = {"shard_parameters": one.shard or None, **self.options_of(row)}
        words = ", ".join(f"{name}={value!r}" for name, value in given.items() if value is not None)
        return (
            f'mesh = init_device_mesh("cuda", ({sizes}), mesh_dim_names=({names}))\n'
            f"model = spcompile.parallelize(model, mesh, inputs{', ' if words else ''}{words})"
        )

    def flags(self, row: Ranked) -> str:
        """The same for the command line: `--mesh ... --option ...`."""
        one = row.result.candidate
        words = ["--mesh " + ",".join(f"{axis}={size}" for axis, size in one.mesh)] if one.mesh else []
        for name, value in self.options_of(row).items():
            if name in ("attention", "outputs"):
                text = ",".join(f"{k}={n}" for k, n in value.items()) if isinstance(value, dict) else value
                words.append(f"--{name} {text}")
            else:
                words.append(
                    f'--option "{name}={value!r}"' if not isinstance(value, str) else f"--option {name}={value}"
                )
        words.append(f'--option "shard_parameters={one.shard!r}"')
        return " ".join(words)

    def too_large(self) -> str:
        """What is found where nothing fits."""
        least = min(self.rows, key=lambda row: row.figures.total)
        assert self.limit is not None
        return (
            f"on {self.world} ranks a step takes at least {bytes_text(least.figures.total)} on one rank "
            f"({candidate_name(least)}); the limit is {bytes_text(self.limit)}"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "schema_version": PLANS_SCHEMA_VERSION,
            "model": self.model,
            "world": self.world,
            "tokens": self.tokens,
            "assumptions": self.notes,
            "candidates": [self._candidate(row) for row in self.rows],
            "refused": [
                {"mesh": dict(r.candidate.mesh), "options": r.candidate.options, "error": r.error} for r in self.refused
            ],
            "choice": self.choice,
            "reason": self.reason,
            "runner_up": self.runner_up,
        }

    def _candidate(self, row: Ranked) -> dict[str, Any]:
        found = row.figures
        return {
            "mesh": dict(row.result.candidate.mesh),
            "options": self.options_of(row),
            "shard_parameters": list(row.result.candidate.shard),
            "memory": {
                "activation_bytes": round(found.saved),
                "parameter_bytes": round(found.parameters),
                "gradient_bytes": round(found.gradients),
                "optimizer_bytes": round(found.states),
                "total_bytes": round(found.total),
                "host_bytes": round(found.host),
                "limit_bytes": self.limit,
                "again": list(row.result.again),
                "again_seconds": found.again,
            },
            "fits": row.fits,
            "seconds": row.seconds,
            "tokens_per_second_per_gpu": row.tokens_per_second_per_gpu,
            "mfu_causal": row.mfu_causal,
            "mfu_full": row.mfu_full,
            "communication_bytes": round(found.sent_bytes),
            "communication_share": row.communication_share,
            "exposed_share": row.exposed_share,
        }

    def __str__(self) -> str:
        out = io.StringIO()
        console = Console(file=out, width=_WIDTH, highlight=False, color_system=None, markup=False, emoji=False)
        console.print(self._table())
        best = self.rows[self.choice]
        lines = [f"\nTake       {self.reason}"]
        lines += [f"Next       {self.runner_up}"] if self.runner_up else []
        lines += [f"Assumed    {note}" for note in self.notes]
        lines += [
            f"Left out   {name}: {one_line(row.error.splitlines()[0])}"
            for row in self.refused
            for name in [_refused_name(row)]
        ]
        lines += ["", "Paste      " + self.call(best).replace("\n", "\n           "), f"           {self.flags(best)}"]
        for line in lines:
            console.print(line, soft_wrap=True)
        return out.getvalue()

    def _table(self) -> Table:
        title = one_line(f"{self.model}, {self.tokens} tokens a row, batch {self.entries}, {self.world} ranks")
        limit = "" if self.limit is None else f", {bytes_text(self.limit)} on each"
        table = Table(title=title + limit, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for name in ("", "mesh", "attention", "Megatron", "ZeRO-3"):
            table.add_column(name)
        for name in ("activations", "total", "host", "sent", "comm", "exposed", "seconds", "tokens/s", "MFU", "full"):
            table.add_column(name, justify="right")
        table.add_column("")
        for number, row in enumerate(self.rows[:SHOWN]):
            table.add_row(*self._cells(number, row))
        if len(self.rows) > SHOWN:
            table.add_row("", f"and {len(self.rows) - SHOWN} more")
        return table

    def _cells(self, number: int, row: Ranked) -> list[str]:
        one, found = row.result.candidate, row.figures
        remade = f"makes again {1e3 * found.again:.3g} ms" if found.again > 0 else ""
        return [
            "*" if number == self.choice else "",
            " ".join(f"{axis}={size}" for axis, size in one.mesh) or "one rank",
            one.attention_text,
            ("SP" if one.megatron_sp else "plain") if one.size("tp") > 1 else "",
            ",".join(one.shard),
            bytes_text(found.saved),
            bytes_text(found.total),
            bytes_text(found.host),
            bytes_text(found.sent_bytes),
            f"{row.communication_share:.1%}",
            f"{row.exposed_share:.1%}",
            f"{row.seconds:.4g}",
            f"{row.tokens_per_second_per_gpu:,.0f}",
            f"{row.mfu_causal:.0%}",
            f"{row.mfu_full:.0%}",
            remade if row.fits else "does not fit",
        ]


def _refused_name(result: Result) -> str:
    one = result.candidate
    return " ".join([*(f"{axis}={size}" for axis, size in one.mesh), one.attention_text]).strip()


def ranked_plans(
    model: nn.Module,
    results: Sequence[Result],
    depths: Depths,
    world: int,
    options: Options,
    others: Mapping[Candidate, float] = MappingProxyType({}),
) -> RankedPlans:
    """From the results of all candidates. depths: of the model with the whole batch. others: what those that were
    not compiled take at least, in seconds.
    """
    heads = depths.heads
    accelerator = ACCELERATORS[options.accelerator]
    rows = ranked(results, world, heads.tokens * heads.entries, accelerator, itemsize_of(model))
    return RankedPlans(
        type(model).__name__,
        world,
        heads.tokens,
        heads.entries,
        options,
        Wish.of(options, world).bytes,
        rows,
        [result for result in results if result.figures is None],
        [str(accelerator), *_links(rows, options), *_notes(depths), *_not_compiled(others)],
    )


def itemsize_of(model: nn.Module) -> int:
    """Bytes of an element of the model's products."""
    return min((p.element_size() for p in model.parameters() if p.is_floating_point()), default=4)


def _not_compiled(others: Mapping[Candidate, float]) -> list[str]:
    if not others:
        return []
    best = min(others, key=lambda one: others[one])
    return [
        f"{len(others)} more ways were not compiled: with products at full speed and what attention sends they take at "
        f"least {others[best]:.4g} s ({best.name})"
    ]


def _links(rows: Sequence[Ranked], options: Options) -> list[str]:
    meshes = {row.result.candidate.mesh for row in rows}
    own = ACCELERATORS[options.accelerator].links
    used = {link_of(MeshShape(mesh), axis, options.links, own=own) for mesh in meshes for axis, _ in mesh}
    return [
        f"{link.name}, {link.bytes_per_second / 1e9:g} GB/s each way" for link in sorted(used, key=lambda x: x.name)
    ]


def _notes(depths: Depths) -> list[str]:
    notes = ["the step is without the optimizer; MFU counts attention as the mask leaves it, full without the mask"]
    if depths.is_extrapolated:
        few, more = (short.blocks for short in depths.shorts)
        notes.append(
            f"the graph has {depths.count} equal blocks; programs with {few} and {more} of them were compiled, and the "
            "difference continued: exact for what is saved and sent, to a few percent for peaks and seconds"
        )
    return notes
