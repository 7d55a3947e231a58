"""Calls of a compiled model that run as plain code, whatever the reason: each is an error over dp, else a remark.

Dynamo runs plain code where its limit of recompilations is reached, where it is told to (`set_stance`, `disable`,
`suppress_errors`), and where it cannot trace. It says little about that, and a backend is not asked. Over `dp` plain
code is wrong: it takes one rank's part of the batch for the whole. Over `cp` and `tp` it is right but whole, if all
ranks do the same with the same.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from spcompile.capture.call_frames import runs_whole_call
from spcompile.diagnostics import Remark, RunsUncompiled, SpcompileError, StrictRemark
from spcompile.machine.mesh import MeshShape
from spcompile.options import Options
from spcompile.program.agreement import Agreement
from spcompile.program.checked_calls import random_fact
from spcompile.program.facts import STOPPED, Fact, Record, comparable_text
from spcompile.program.same_inputs import facts_of_inputs
from spcompile.torch_private import CompiledCall, RestartAnalysis, compiler_stance

log = logging.getLogger("spcompile.backend")  # as all remarks


class Target(NamedTuple):
    """What calls are compiled for."""

    shape: MeshShape
    agreement: Agreement
    options: Options


@dataclass
class _Running:
    """A call that runs.

    ran: a program that is all of it has run, or one graph of a model that breaks, where the options allow that; parts:
    how many programs of other parts of it; stopped: a compile has failed; told: that it is plain code.
    """

    call: CompiledCall
    random: list[torch.Tensor]
    ran: bool = False
    parts: int = 0
    stopped: bool = False
    told: bool = False


class PlainCalls:
    """Watches the calls of everything that is compiled for a backend."""

    def __init__(self, target_of: Callable[[Mapping[str, Any] | None, str], Target | None]) -> None:
        """target_of: from options and the type of a device; None where there is one rank."""
        self._target_of = target_of
        self._of_thread = threading.local()
        self._swallowed: dict[str, str] = {}  # name -> the error of its compile, which Dynamo tries once

    def counted(self, program: Callable[..., Any], *, is_part: bool) -> Callable[..., Any]:
        """A program whose runs are known. is_part: of a model that breaks, each of whose graphs is sharded on its own.

        A break is refused over dp, so a part is never taken for all of a call there.
        """

        def run(*args: Any) -> Any:
            running = self._innermost()
            if running is not None:
                is_whole = is_part or runs_whole_call()
                running.ran |= is_whole
                running.parts += not is_whole
            return program(*args)

        return run

    @contextlib.contextmanager
    def noting_errors(self) -> Iterator[None]:
        """Around a compile, whose error Dynamo may swallow."""
        try:
            yield
        except RestartAnalysis:
            raise
        except Exception as error:
            running = self._innermost()
            if running is not None:
                running.stopped = True
                self._swallowed[running.call.name] = comparable_text(error).partition("\n")[0]
            raise

    def _stack(self) -> list[_Running]:
        if not hasattr(self._of_thread, "stack"):
            self._of_thread.stack = []
        return self._of_thread.stack

    def _innermost(self) -> _Running | None:
        stack = self._stack()
        return stack[-1] if stack else None

    def begins(self, call: CompiledCall) -> None:
        """A call begins."""
        running = _Running(call, _random_states())
        if compiler_stance() == "force_eager":
            self._tell(running)
        self._stack().append(running)

    def ends(self, call: CompiledCall, error: BaseException | None) -> None:
        """A call ends."""
        stack = self._stack()
        running = stack.pop()
        while running.call.function is not call.function:
            running = stack.pop()
        if error is None and not running.ran and not running.told:
            self._tell(running)
        elif isinstance(error, Exception) and not (running.ran or running.parts or running.stopped):
            self._share(running, error)

    def _share(self, running: _Running, error: Exception) -> None:
        """Ranks on which a call ends before there is anything to compare tell the others, which may go on.

        Raises:
            RanksDisagree: on all ranks, if not all of them failed with the same text.
        """
        found: BaseException | None = error
        while found is not None:
            if isinstance(found, SpcompileError):
                return
            found = getattr(found, "inner_exception", None) or found.__cause__
        try:
            target = self._target(running)
        except SpcompileError:  # of the options or the mesh, which nobody has come to yet
            return
        if target is not None and target.options.compare != "compile":
            with target.agreement.caller.inside(f"ends a call of {running.call.name}"):
                target.agreement.require(Record(f"{STOPPED}{type(error).__name__} {comparable_text(error)}"))

    def _target(self, running: _Running) -> Target | None:
        return self._target_of(running.call.options, _device_of_call(running.call))

    def _tell(self, running: _Running) -> None:
        """Of a call that runs, or ran, as plain code.

        Raises:
            RunsUncompiled: over dp.
            StrictRemark: over other axes, under `strict=True`.
            RanksDisagree: not all ranks do the same, with the same inputs; the same error on all.
        """
        running.told = True
        target = self._target(running)
        if target is None:
            return
        agreement, shape, name = target.agreement, target.shape, running.call.name
        why, legal = _reason(running.call, self._swallowed.get(name))
        but_for = f", but for {running.parts} of its parts," if running.parts else ""
        with agreement.caller.inside(f"runs {name} uncompiled") as refused, agreement.shared_errors():
            if refused is not None:
                raise refused
            if shape.size("dp") > 1:
                found = f"{name}{but_for} on {shape}, as if a rank's part of the batch were all of it: {why}"
                raise RunsUncompiled(found, legal=legal)
            if target.options.compare != "compile":
                agreement.require(Record(f"runs {name} uncompiled", _facts(running, target.options)))
            ranks = shape.size("cp") * shape.size("tp")
            cost = f"each rank of {shape} computes all of it and keeps {ranks} times the activations"
            remark = Remark("SPR403", f"{name} ran uncompiled{but_for} so {cost}: {why}\n  instead: {legal}")
            if target.options.strict:
                raise StrictRemark(str(remark))
        log.warning("%s", remark)


def _reason(call: CompiledCall, swallowed: str | None) -> tuple[str, str]:
    """(why a call ran as plain code, what to do)."""
    stance, limit, programs = compiler_stance(), torch._dynamo.config.recompile_limit, call.programs()
    if stance != "default":
        return f"torch.compiler.set_stance({stance})", "torch.compiler.set_stance('default')"
    if swallowed is not None:
        return f"Dynamo was told to swallow an error, {swallowed}", "torch._dynamo.config.suppress_errors = False"
    if programs >= limit:
        why = f"Dynamo has made {programs} programs of it, and torch._dynamo.config.recompile_limit allows no more"
        return why, "a greater limit, or fewer kinds of inputs: padded lengths, dynamic=True, tensors for numbers"
    why = "Dynamo does not compile it, as with torch.compiler.disable, or code that it cannot trace"
    return why, "a model that traces with fullgraph=True; TORCH_LOGS=graph_breaks,recompiles tells more"


def _facts(running: _Running, options: Options) -> tuple[Fact, ...]:
    call = running.call
    given = {f"{i}": x for i, x in enumerate(call.args)} | dict(call.kwargs)
    leaves = pytree.tree_flatten_with_path(given)[0]
    named = {".".join(str(getattr(step, "key", getattr(step, "idx", step))) for step in path): x for path, x in leaves}
    tensors = {name: x for name, x in named.items() if isinstance(x, torch.Tensor)}
    facts = facts_of_inputs(list(tensors), list(tensors.values()), with_values=options.compare_inputs)()
    drew = any(not torch.equal(a, b) for a, b in zip(running.random, _random_states(), strict=True))
    return (*facts, *([random_fact(_device_of_call(call))] if drew else []))


def _device_of_call(call: CompiledCall) -> str:
    owner = getattr(call.function, "__self__", None)
    own = [*owner.parameters()] if isinstance(owner, torch.nn.Module) else []
    values = [*own, *pytree.tree_leaves((call.args, dict(call.kwargs)))]
    return next((x.device.type for x in values if isinstance(x, torch.Tensor)), "cpu")


def _random_states() -> list[torch.Tensor]:
    states = [torch.get_rng_state()]
    if torch.accelerator.is_available():
        states.append(torch.get_device_module(torch.accelerator.current_accelerator()).get_rng_state())
    return states
