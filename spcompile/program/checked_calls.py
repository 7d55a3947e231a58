"""Calls of a finished program, and backwards of them: every one is compared between the ranks before it runs.

On CPU meshes a call waits for the comparison. On accelerators a thread compares, and the next call learns what it
found.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from spcompile.diagnostics import SpcompileError
from spcompile.options import Options
from spcompile.program.agreement import Agreement
from spcompile.program.facts import Fact, Record
from spcompile.program.outputs import NotComputedTensor
from spcompile.program.same_inputs import facts_of_inputs, names_of, places_of_state
from spcompile.program.same_weights import ParameterSet, fact_of_set, record_of_values
from spcompile.torch_private import around_backward, traced_function


@dataclass(frozen=True)
class Inputs:
    """The inputs of a Dynamo graph, by name. state: places of those that modules own."""

    graph: str
    names: list[str]
    state: list[int]

    @classmethod
    def of(cls, gm: fx.GraphModule) -> Inputs:
        """From a graph as Dynamo gave it."""
        return cls(traced_function(), names_of(gm), places_of_state(gm))

    @property
    def passed(self) -> list[int]:
        """Places of what callers pass."""
        own = set(self.state)
        return [i for i in range(len(self.names)) if i not in own]


class CheckedCalls:
    """A program whose ranks must be about to do the same.

    Random numbers are drawn for whole tensors on every rank: their state must be the same as well, but over dp, whose
    ranks have other entries.
    """

    def __init__(
        self, run: Callable[..., Any], inputs: Inputs, number: int, agreement: Agreement, options: Options, random: bool
    ) -> None:
        self._run = run
        self._inputs = inputs
        self._agreement = agreement
        self._random = random
        self._compare_values = options.compare_inputs
        self._later = options.compare == "later" or (options.compare == "auto" and agreement.device_type != "cpu")
        self._label = f"graph {number} of {inputs.graph}"
        self._calls = 0
        self._last: ParameterSet | None = None

    def __call__(self, *args: Any) -> Any:
        agreement = self._agreement
        self._calls += 1
        doing = f"runs call {self._calls} of {self._label}"
        with agreement.caller.inside(doing) as refused:
            if refused is not None:
                with agreement.shared_errors():
                    raise refused
            self._compare_call(doing, args)
            outputs = self._inside(doing, functools.partial(self._run, *args))
            if self._last is not None:
                self._last.accept()
        self._watch_backward(outputs, self._calls)
        return outputs

    def _compare_call(self, doing: str, args: Sequence[Any]) -> None:
        agreement, inputs = self._agreement, self._inputs
        own = [i for i in inputs.state if isinstance(args[i], torch.Tensor)]
        tensors, names = [args[i] for i in own], [inputs.names[i] for i in own]
        self._last, is_new = agreement.parameter_sets.of(tensors, self._last)
        which = [fact_of_set(self._last, names)]
        passed = inputs.passed
        passed_facts = facts_of_inputs(
            [inputs.names[i] for i in passed], [args[i] for i in passed], with_values=self._compare_values
        )
        if self._random:
            which.append(random_fact(agreement.device_type))
        wishes = is_new or self._last.written_to(tensors)

        def record() -> Record:
            return Record(doing, (*passed_facts(), *which), wishes, mark=doing)

        wished = False
        if self._later and not is_new:
            agreement.require_call_later(record)
        else:
            wished = agreement.require(record())
        if agreement.take_wish() or wished:
            agreement.require(record_of_values(names, tensors, doing.removeprefix("runs ")))
            self._last.accept()

    def _inside(self, doing: str, run: Callable[[], Any]) -> Any:
        agreement, where = self._agreement, doing.removeprefix("runs ")
        agreement.roll_call.at(f"is inside {where}", doing)
        try:
            result = run()
        except SpcompileError:
            raise
        except Exception as error:
            agreement.failed_in(error, doing, where)
            raise
        agreement.roll_call.at(f"has ended {where} and runs no compiled model")
        return result

    def _watch_backward(self, outputs: Any, call: int) -> None:
        for output in outputs if isinstance(outputs, (tuple, list)) else [outputs]:
            is_tensor = isinstance(output, torch.Tensor) and not isinstance(output, NotComputedTensor)
            if is_tensor and output.grad_fn is not None:
                node = around_backward(output, self._compared_backward)
                if node is not None and not hasattr(node, "_spx_call"):
                    node._spx_call = call

    def _compared_backward(self, backward: Callable[..., Any]) -> Callable[..., Any]:
        def compared(ctx: Any, *gradients: Any) -> Any:
            agreement = self._agreement
            doing = f"runs the backward of call {getattr(ctx, '_spx_call', '?')} of {self._label}"
            with agreement.caller.inside(doing) as refused:
                if refused is not None:
                    with agreement.shared_errors():
                        raise refused
                record = Record(doing, mark=doing)
                if self._later:
                    agreement.require_backward_later(lambda: record)
                else:
                    agreement.require(record)
                return self._inside(doing, lambda: backward(ctx, *gradients))

        return compared


def random_fact(device_type: str) -> Fact:
    """The state of a device's random numbers."""
    state = torch.get_rng_state() if device_type == "cpu" else torch.get_device_module(device_type).get_rng_state()
    digest = hashlib.sha256(state.numpy().tobytes()).hexdigest()[:8]
    legal = "torch.manual_seed with one seed on all ranks of cp and tp, and the same draws everywhere"
    return Fact("random state", f"{digest} (seed {torch.initial_seed()})", ("dp",), legal)
