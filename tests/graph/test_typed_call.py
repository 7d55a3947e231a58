"""Typed calls say what their nodes say, and are what everybody reads instead of argument numbers."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.fx as fx
from torch.fx.experimental.proxy_tensor import make_fx

import spcompile.attention.op
import spcompile.attention.ring.hops
import spcompile.collectives.pipelined_matmuls  # noqa: F401  (defines the ops)
from spcompile.attention.scores.attention_call import AttentionCall
from spcompile.graph.printer import format_graph
from spcompile.graph.reshard import Reshard, is_reshard, reshard
from spcompile.graph.typed_call import TypedCall, named_arguments

ROOT = Path(__file__).parent.parent.parent


def _kinds(above: type[TypedCall] = TypedCall) -> Iterator[type[TypedCall]]:
    for kind in above.__subclasses__():
        if "NAME" in vars(kind):
            yield kind
        yield from _kinds(kind)


KINDS = sorted(set(_kinds()), key=lambda kind: kind.NAME)
NUMBERS = {"int": 3, "SymInt": 5, "float": 0.25, "bool": True, "str": "causal", "Device": torch.device("cpu")}
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.NAME)


def _graph(kind: type[TypedCall], only_required: bool) -> tuple[fx.GraphModule, fx.Node]:
    """A graph that calls the op, every argument another value than its default."""
    graph = fx.Graph()
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for argument in kind.target()._schema.arguments:
        if only_required and argument.has_default_value():
            continue
        type_name = str(argument.type).removeprefix("Optional[").rstrip("]")
        if "Tensor" in type_name:
            value: Any = graph.placeholder(f"{argument.name}_")
            value = [value] if type_name.startswith("List") else value
        else:
            value = [2, 3] if type_name.startswith("List") else NUMBERS[type_name]
            value = False if argument.has_default_value() and argument.default_value is True else value
        if argument.kwarg_only:
            kwargs[argument.name] = value
        else:
            args.append(value)
    node = graph.call_function(kind.target(), tuple(args), kwargs)
    graph.output(node)
    return fx.GraphModule(torch.nn.Module(), graph), node


@each_kind
def test_fields_are_those_of_the_schema(kind: type[TypedCall]) -> None:
    arguments = {argument.name: argument for argument in kind.target()._schema.arguments}
    fields = {field.name: field for field in dataclasses.fields(kind)}
    assert set(fields) == set(arguments)
    for name, argument in arguments.items():
        assert not callable(getattr(TypedCall, name, None)), f"the field {name} hides a method"
        if argument.has_default_value():
            assert fields[name].default == argument.default_value, name


@each_kind
@pytest.mark.parametrize("only_required", [False, True])
def test_reading_and_writing_changes_nothing(kind: type[TypedCall], only_required: bool) -> None:
    gm, node = _graph(kind, only_required)
    before, text = (node.args, node.kwargs), format_graph(gm)
    found = kind.of(node)
    assert found.named() == named_arguments(node.target, node.args, node.kwargs)
    assert kind.bind(*found.named().values()) == found
    found.write(node)
    assert (node.args, node.kwargs) == before
    assert format_graph(gm) == text
    assert kind.is_call(node)
    assert kind.all_in(gm.graph) == [node]


@each_kind
def test_names_do_instead_of_places(kind: type[TypedCall]) -> None:
    _, node = _graph(kind, only_required=False)
    found = kind.of(node)
    node.kwargs = found.named()
    node.args = ()
    assert kind.of(node) == found


def test_arguments_at_the_end_that_are_defaults_are_left_out_as_by_torch() -> None:
    q, k, v = (torch.zeros(1, 2, 3, 4) for _ in range(3))
    capped = AttentionCall(q=q, k=k, v=v, mask="full", scale=1.0, softcap=2.0)

    def run(attention: AttentionCall, q: Any, k: Any, v: Any) -> Any:
        return torch.ops.spx.attention(*attention.but(q=q, k=k, v=v).named().values())[0]

    for attention in (capped, capped.but(softcap=0.0)):
        gm = make_fx(partial(run, attention))(q, k, v)
        (node,) = AttentionCall.all_in(gm.graph)
        assert AttentionCall.of(node).arguments() == (node.args, node.kwargs)
        assert len(node.args) == (15 if attention is capped else 11)


def test_a_new_node_and_the_op_itself() -> None:
    q, k, v = (torch.randn(1, 2, 3, 4) for _ in range(3))
    first = AttentionCall(q=q, k=k, v=v, mask="causal", scale=0.5)
    gm = make_fx(lambda *qkv: first.but(**dict(zip("qkv", qkv, strict=True))).run(), tracing_mode="fake")(q, k, v)
    (node,) = AttentionCall.all_in(gm.graph)
    new = AttentionCall.of(node).but(mask="full").insert(like=node)
    assert AttentionCall.of(new).attention_mask.causal is False
    assert AttentionCall.of(new).sizes == AttentionCall.of(node).sizes == (1, 2, 2, 3, 3, 4, 4)
    assert torch.equal(first.run()[0], torch.ops.spx.attention(*first.named().values())[0])


def test_a_reshard_by_names() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(reshard, (x, "cp", "S(1.2)", "R"))
    assert Reshard.of(node) == Reshard(x, "cp", "S(1.2)", "R")
    assert Reshard.of(node).kinds == ("S", "R")
    assert is_reshard(node, "cp")
    assert not is_reshard(node, "tp")
    assert not is_reshard(x)


# What only arguments of spx ops are called: `argument(node, 14, "softcap")` reads one of them.
COMMON_NAMES = {
    "x",
    "q",
    "k",
    "v",
    "dim",
    "mask",
    "scale",
    "weight",
    "ignore_index",
    "bias",
    "length",
    "out",
    "to",
    "shape",
    "device",
    "dropout_p",
}
SPX_NAMES = {name for kind in KINDS for name in named_arguments(kind.target(), ())} - COMMON_NAMES
HIGHEST = 4  # no op of ATen has an argument further behind that is read by its number
FILES = [file for folder in ("spcompile", "passes") for file in sorted((ROOT / folder).rglob("*.py"))]


def _constants(tree: ast.Module) -> set[str]:
    """Names in capitals that a module gives to something."""
    assigned = [
        target for statement in tree.body if isinstance(statement, ast.Assign) for target in ast.walk(statement)
    ]
    return {name.id for name in assigned if isinstance(name, ast.Name) and name.id.isupper()}


def _numbers_of_arguments(tree: ast.Module) -> Iterator[ast.AST]:
    """Where an argument of an spx call is read by its number, as far as one can see from one function."""
    constants = _constants(tree)
    for function in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)):
        text = ast.unparse(function)
        of_spx = re.search(r"\bspx\.\w+\.default|is_reshard\(|Call\.is_call\(", text) is not None
        takes_results = "operator.getitem" in text
        for node in ast.walk(function):
            match node:
                case ast.Subscript(value=ast.Attribute(attr="args"), slice=ast.Constant(value=int(number))):
                    if number > HIGHEST or (of_spx and number > 0 and not takes_results):
                        yield node
                case ast.Subscript(value=ast.Attribute(attr="args"), slice=ast.Name(id=name)):
                    if name in constants:
                        yield node
                case ast.Call(func=ast.Name(id="argument" | "operand" as reads), args=args):
                    given = {arg.value for arg in args if isinstance(arg, ast.Constant)}
                    if given & SPX_NAMES or (of_spx and reads == "operand" and given - {0}):
                        yield node
                case ast.Assign(targets=[ast.Tuple()], value=ast.Attribute(attr="args")):
                    if of_spx:
                        yield node


def test_nobody_reads_an_spx_call_by_numbers() -> None:
    for file in FILES:
        found = [f"{file.name}:{n.lineno} {ast.unparse(n)}" for n in _numbers_of_arguments(ast.parse(file.read_text()))]  # type: ignore[attr-defined]
        assert not found, "read it through its typed call"


def test_what_reading_by_numbers_looks_like() -> None:
    """The test above finds what it looks for."""
    found = _numbers_of_arguments(
        ast.parse(
            "MASK = 9\n"
            "def first(node): return node.args[9]\n"
            "def second(node): return node.args[MASK]\n"
            "def third(node): return argument(node, 14, 'softcap', 0.0)\n"
            "def fourth(node): return node.target is spx.vary.default and node.args[1]\n"
            "def fifth(node):\n    assert is_reshard(node)\n    x, *rest = node.args\n"
            "def sixth(node): return is_reshard(node) and operand(node, 2)\n"
            "def fine(node): return node.target is aten.add.Tensor and node.args[1]\n"
        )
    )
    assert len(list(found)) == 6
