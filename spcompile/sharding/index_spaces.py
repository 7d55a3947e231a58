"""Finds the index spaces of a whole graph from the factor rules of its ops."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.fx as fx

from spcompile.graph.aten_ops import tensor_operands
from spcompile.graph.edit import is_getitem, operand, result_number
from spcompile.graph.sizes import same
from spcompile.sharding.rules import OpRule, rule_of
from spcompile.sharding.rules.rule import tensor_results
from spcompile.sharding.spaces import Space, leaves, unify

Dims = list[list[Space]]  # of one tensor: the product of spaces of every dim


@dataclass
class OpSpaces:
    """One call: its rule, and the spaces each factor of the rule stands for."""

    rule: OpRule
    factors: dict[str, list[Space]] = field(default_factory=dict)

    def leaves_of(self, factor: str) -> list[Space]:
        """The finest known factors of a factor."""
        return leaves(self.factors[factor])


@dataclass
class IndexSpaces:
    """The spaces of every tensor value (a list, one entry per result) and of every call that has a rule."""

    values: dict[fx.Node, list[Dims]] = field(default_factory=dict)
    calls: dict[fx.Node, OpSpaces] = field(default_factory=dict)

    def dims(self, node: fx.Node) -> list[list[Space]]:
        """The finest known factors of every dim of a value with one result."""
        return [leaves(dim) for dim in self.values[node][0]]


def find_index_spaces(
    graph: fx.Graph,
    *,
    apart: bool = False,
    moving: bool = False,
    zigzag: bool = False,
    convolving: bool = False,
    rules: Mapping[fx.Node, OpRule] | None = None,
) -> IndexSpaces:
    """One pass in topological order. Calls without a rule get new spaces for their results.

    apart: of an axis whose ranks have parts of their own from the start: where an op has another rule for that.
    moving: of an axis whose ranks send each other what an op moves: the same.
    zigzag: of an axis whose ranks have elements that do not stand together: factors that are ordered are replicated.
    convolving: of one whose ranks send each other only what windows have in common that are multiplied by weights, and
        what running sums of their rows come to.
    rules: of calls that have another rule than else.
    """
    spaces = IndexSpaces()
    others = rules or {}
    for node in graph.nodes:
        examples = tensor_results(node)
        if node.op == "output" or not examples:
            continue
        if is_getitem(node):
            spaces.values[node] = [spaces.values[operand(node, 0)][result_number(node)]]
            continue
        rule = others.get(node) or (rule_of(node) if node.op == "call_function" else None)
        if apart and rule is not None and rule.apart is not None:
            first = next((spaces.values[n][0] for n in tensor_operands(node)), [])
            rule = rule.apart([[space.size for space in leaves(dim)] for dim in first])
        of_rows = rule is not None and rule.moving is not None and bool(convolves(rule) or rule.moving.summed_up)
        if rule is not None and rule.moving is not None and (moving or (convolving and of_rows)):
            rule = rule.moving
        if convolving and rule is not None and rule.moving is not None:
            rule = replace(rule, prefix_of={})  # what is much shorter has a layout of its own
        if zigzag and rule is not None and rule.ordered:
            rule = replace(rule, replicated=rule.replicated | rule.ordered)
        call = _bind(node, rule, spaces) if rule is not None else None
        if call is not None:
            spaces.calls[node] = call
            spaces.values[node] = [_result_dims(dims, call) for dims in call.rule.results]
        else:
            spaces.values[node] = [_fresh(value) for value in examples]
    return spaces


def convolves(rule: OpRule) -> bool:
    """Whether an op multiplies windows by weights, on an axis that may split them."""
    return bool((rule.moving or rule).windows) and len(rule.operands) > 1


def prefixes_of_their_own(spaces: IndexSpaces, sequences: set[Space]) -> dict[fx.Node, OpRule]:
    """The rules of calls that cut one of `sequences` off something longer, which is to be laid out like none of them.

    What a causal convolution pads at both ends, and cuts, is as long as its sequence by chance of how it is written.
    """
    return {
        node: call.rule.alone
        for node, call in spaces.calls.items()
        if call.rule.alone is not None
        for short, whole in call.rule.prefix_of.items()
        if sequences.intersection(call.leaves_of(short)) and not sequences.intersection(call.leaves_of(whole))
    }


def _fresh(value: torch.Tensor) -> Dims:
    return [[] if same(size, 1) else [Space(size)] for size in value.shape]


def _bind(node: fx.Node, rule: OpRule, spaces: IndexSpaces) -> OpSpaces | None:
    """Tie the factors of a rule to the spaces of the operands, then make new spaces for those only in results.

    Dims that are cut in other places than another operand's, as 3 x 4 beside 4 x 3, cannot be split by this call.
    None where two operands' symbolic sizes cannot be shown to agree: the call counts as one without a rule.
    """
    call, cut_otherwise = OpSpaces(rule), set[str]()
    for read, dims in zip(tensor_operands(node), rule.operands, strict=True):
        for value_dim, factor_names in zip(spaces.values[read][0], dims, strict=True):
            wanted = [call.factors.setdefault(f, [Space(rule.sizes[f])]) for f in factor_names]
            agreed = unify([space for group in wanted for space in group], value_dim)
            if factor_names and not agreed:
                if not all(isinstance(space.size, int) for space in leaves(value_dim)):
                    return None
                cut_otherwise.update(factor_names)
    for factor, size in rule.sizes.items():
        call.factors.setdefault(factor, [Space(size)])
    if cut_otherwise:
        call.rule = replace(rule, replicated=rule.replicated | cut_otherwise)
    return call


def _result_dims(dims: tuple[tuple[str, ...], ...], call: OpSpaces) -> Dims:
    return [[space for factor in dim for space in call.factors[factor]] for dim in dims]
