"""The oracle: the plain model in the same process and run. One function builds it, compiles a copy and compares both.

Compared are the loss, every tensor among the outputs, the gradient of every parameter, and every parameter after one
step of AdamW. An error is the largest absolute difference, relative to the largest value of the plain model's tensor;
for gradients also where that is below 1, so that a small gradient cannot hide a wrong one.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from worker_pool import HANG_SECONDS, WorkerPool

EXACT = 1e-10  # float64 throughout
FLOAT32_INSIDE = 1e-6  # a float64 model that computes some values in float32: rotary angles, RMSNorm, the loss
FLOAT32 = 1e-5

# AdamW's first step is nearly the sign of the gradient. Where the exact gradient is zero (the bias of keys) that is the
# sign of a rounding error, unless eps is far above rounding.
ADAMW = {"lr": 1e-3, "eps": 1e-4}
# Gradients below this part of the model's largest one are compared with it: rounding in the others reaches them.
SMALLEST_GRADIENT = 1e-3


@dataclass(frozen=True)
class Case:
    """A model, its inputs and how it is trained. Functions are top-level or partials, so that the case can be pickled.

    build: makes the model, on torch's default dtype. inputs: makes one micro-batch's keyword arguments; called once for
    each number in `micro_batches`. loss: from the outputs and the inputs; by default the model's own.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[..., dict[str, Any]]
    loss: Callable[[Any, dict[str, Any]], Tensor] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    micro_batches: tuple[int, ...] = (0,)
    wrap: bool = False  # torch.compile(model) instead of model.compile()


@dataclass
class Outcome:
    """What one rank found. errors: by tensor. graphs: a hash of every final graph's text. remarks: their codes."""

    errors: dict[str, float]
    graphs: list[str]
    remarks: list[str]

    def worst(self, count: int = 5) -> str:
        """The largest errors, one line each."""
        rows = sorted(self.errors.items(), key=lambda row: -row[1] if row[1] == row[1] else float("-inf"))
        return "\n".join(f"  {error:.1e}  {name}" for name, error in rows[:count])


def assert_same(pool: WorkerPool, case: Case, tolerance: float = EXACT, timeout: float = HANG_SECONDS) -> list[Outcome]:
    """Run `case` on every rank of the pool; on each, nothing may differ from the plain model by more than `tolerance`.

    All ranks must also have compiled the same graphs, and at least one.
    """
    outcomes = pool.run(compare, case, timeout=timeout)
    for rank, outcome in enumerate(outcomes):
        bad = [name for name, error in outcome.errors.items() if not error <= tolerance]
        assert not bad, f"rank {rank}: {len(bad)} tensors differ by more than {tolerance:g}\n{outcome.worst()}"
    assert outcomes[0].graphs, "nothing was compiled for several ranks"
    assert all(outcome.graphs == outcomes[0].graphs for outcome in outcomes), "the ranks' graphs differ"
    return outcomes


def compare(case: Case) -> Outcome:
    """One rank's work: the plain model and its compiled copy, on the same inputs."""
    with default_dtype(case.dtype), recorded() as record:
        plain, compiled = build_both(case)
        batches = [case.inputs(number) for number in case.micro_batches]
        errors: dict[str, float] = {}
        expected = [step(plain, batch, case) for batch in batches]
        found = [step(compiled, batch, case) for batch in batches]
        for number, (want, have) in enumerate(zip(expected, found, strict=True)):
            prefix = f"batch {number}: " if len(batches) > 1 else ""
            errors |= {prefix + name: error for name, error in compare_tensors(want, have).items()}
        errors |= compare_parameters(plain, compiled)
    return Outcome(errors, record.graphs, record.remarks)


def build_both(case: Case) -> tuple[nn.Module, nn.Module]:
    """The plain model and a compiled copy of it."""
    plain = case.build()
    compiled: Any = copy.deepcopy(plain)
    options = {"compiler": "eager", **case.options}
    if case.wrap:
        compiled = torch.compile(compiled, backend="spcompile", options=options)
    else:
        compiled.compile(backend="spcompile", options=options)
    return plain, compiled


def step(model: nn.Module, batch: dict[str, Any], case: Case) -> dict[str, Tensor]:
    """Forward and backward; the loss and all outputs by name."""
    out = model(**batch)
    loss = case.loss(out, batch) if case.loss is not None else own_loss(out)
    loss.backward()
    return {"loss": loss.detach(), **{f"output{name}": x.detach() for name, x in tensors_of(out)}}


def own_loss(out: Any) -> Tensor:
    """The loss that the model returned, alone or beside other outputs."""
    return out if isinstance(out, Tensor) else out["loss"]


def tensors_of(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in a model's outputs: dicts, sequences and caches of keys and values."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors_of(item, f"{name}.{key}")
    elif isinstance(value, (tuple, list)):
        for number, item in enumerate(value):
            yield from tensors_of(item, f"{name}[{number}]")
    elif hasattr(value, "layers"):
        for number, layer in enumerate(value.layers):
            yield from tensors_of([layer.keys, layer.values], f"{name}[{number}]")


def error(want: Tensor, have: Tensor, floor: float = 1.0) -> float:
    """The largest difference, relative to the largest wanted value or to `floor`; inf where shape or dtype differ."""
    if want.shape != have.shape or want.dtype != have.dtype:
        return float("inf")
    if want.numel() == 0:
        return 0.0
    scale = max(floor, want.abs().max().item())
    return (want.double() - have.double()).abs().max().item() / scale


def compare_tensors(want: Mapping[str, Tensor], have: Mapping[str, Tensor]) -> dict[str, float]:
    """Errors by name; a tensor that only one of them has is infinitely wrong."""
    names = want.keys() | have.keys()
    return {n: error(want[n], have[n]) if n in want and n in have else float("inf") for n in sorted(names)}


def compare_parameters(plain: nn.Module, compiled: nn.Module) -> dict[str, float]:
    """Errors of all gradients, then of all parameters after a step of AdamW."""
    named = dict(compiled.named_parameters())
    pairs = {n: (p, named[n if n in named else f"_orig_mod.{n}"]) for n, p in plain.named_parameters()}
    given = {n: (want.grad, have.grad) for n, (want, have) in pairs.items()}
    largest = max((g.abs().max().item() for g, _ in given.values() if g is not None), default=0.0)
    floor = max(SMALLEST_GRADIENT * largest, 1e-30)
    errors = {}
    for name, (want, have) in given.items():
        if want is None or have is None:
            errors[f"gradient of {name}"] = 0.0 if want is have else float("inf")
        else:
            errors[f"gradient of {name}"] = error(want, have, floor)
    for model in (plain, compiled):
        torch.optim.AdamW(model.parameters(), **ADAMW).step()
    return errors | {f"{n} after a step": error(want.detach(), have.detach()) for n, (want, have) in pairs.items()}


@dataclass
class Record:
    """What was compiled inside `recorded`."""

    graphs: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


@contextlib.contextmanager
def recorded() -> Iterator[Record]:
    """Collects the final graphs and the remarks of all compiles inside."""
    from spcompile.graph.printer import format_graph
    from spcompile.program.observed import observed

    record = Record()
    with observed() as programs:
        yield record
    for program, emission in programs:
        record.remarks += [remark.code for remark in program.ctx.remarks.rows]
        for phase, gm in emission.graphs.items():
            record.graphs.append(f"{phase} {hashlib.sha256(format_graph(gm).encode()).hexdigest()}")


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Models and random numbers are of `dtype` inside; workers serve tests of other dtypes afterwards."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
