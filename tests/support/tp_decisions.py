"""What axis `tp` does with each parameter, read off the graph behind annotate-tensor-parallel.

    colwise     the products that read it keep its split dim: their results are split
    rowwise     they sum over it: their results are partial sums
    vocabulary  the rows of a lookup table are split
    part        an op that is no product reads its parts: a bias, the scale of a norm inside a head, a sink
    whole       every rank reads all of it

A parameter that is read in several ways has them all, joined by "+".
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.fx as fx
from torch import nn

from spcompile.graph.aten_ops import tensor_operands
from spcompile.machine.mesh import MeshShape
from spcompile.options import Options
from spcompile.passes import PIPELINE
from spcompile.program.build import LocalProgram, build
from spcompile.program.trace import through_dynamo
from spcompile.sharding.layout import layout_of
from spcompile.sharding.propagate import place_of

BEHIND = "annotate-tensor-parallel"


@dataclass
class Decisions:
    """kinds: by parameter name; a tied one has one entry for each of its names. program: where compiling stopped."""

    kinds: dict[str, str]
    program: LocalProgram

    @property
    def codes(self) -> set[str]:
        """Of the remarks."""
        return {remark.code for remark in self.program.ctx.remarks.rows}

    def of(self, ending: str) -> str:
        """The kind of the only parameter whose name ends so."""
        (found,) = {kind for name, kind in self.kinds.items() if name.endswith(ending)}
        return found


def decide(
    model: nn.Module, inputs: Mapping[str, Any] | Sequence[Any], degree: int = 2, behind: str = BEHIND
) -> Decisions:
    """Compile a model for `tp` up to the pass `behind`, and read what becomes of its parameters."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    stages = [*itertools.takewhile(lambda p: p.name != behind, PIPELINE)]
    stages.append(PIPELINE[len(stages)])
    found: list[Decisions] = []

    def read(gm: fx.GraphModule, values: Sequence[Any]) -> None:
        program = build(gm, values, MeshShape.of({"tp": degree}), Options(), stages)
        placeholders = [n for n in program.gm.graph.nodes if n.op == "placeholder"]
        kinds = {}
        for node, value in zip(placeholders, values, strict=True):
            kinds.update(dict.fromkeys(names.get(id(value), []), "+".join(sorted(kinds_of(node)))))
        found.append(Decisions(kinds, program))

    through_dynamo(model, inputs, read)
    return found[0]


def kinds_of(weight: fx.Node) -> set[str]:
    """In which ways a weight, or what is made of it alone, is read."""
    found: set[str] = set()
    for user in weight.users:
        layout = layout_of(user)
        if user.op == "output" or layout is None or layout.call is None:
            found.add("whole")
            continue
        operands = tensor_operands(user)
        choice, rule = layout.choice.get("tp"), layout.call.rule
        if len(operands) == 1 and not rule.reductions:
            found |= kinds_of(user)
            continue
        place = place_of(rule.operands[operands.index(weight)], layout.call, choice) if choice is not None else None
        if choice is None or place is None:
            found.add("whole")
        elif choice.factor in rule.reductions:
            others = [x for x in operands if x is not weight and x.meta["val"].is_floating_point()]
            found.add("rowwise" if others else "vocabulary")
        else:
            found.add("colwise" if rule.reductions else "part")
    return found
