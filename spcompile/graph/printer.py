"""The canonical text of a graph: what dumps, golden tests and the comparison between ranks are made of.

    # model.py:61  x = x + self.mlp(h)
    add: "f32[2, 512, 64] cp=S(1)" = aten.add(x, y)

Nothing in it depends on the rank or the run: no process group names, device indices, paths or addresses.
"""

from __future__ import annotations

import difflib
import operator
import os
import re
from typing import Any

import torch
import torch.fx as fx

from spcompile.diagnostics import source_of
from spcompile.graph.axes import axis_argument
from spcompile.graph.reshard import Reshard, is_reshard, reshard
from spcompile.machine.mesh import MeshShape
from spcompile.plain_text import one_line

_DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "b8",
    torch.complex64: "c64",
    torch.complex128: "c128",
}

# State before and after -> collective. Splits of a dim are "S".
_RESHARDS = {
    ("S", "R"): "all_gather",
    ("S", "I"): "all_gather",
    ("S", "S"): "all_to_all",
    ("P", "S"): "reduce_scatter",
    ("P", "I"): "all_reduce",
    ("P", "R"): "all_reduce",
    ("I", "S"): "shard",
    ("R", "S"): "shard",
    ("I", "R"): "vary",
}


def op_name(node: fx.Node) -> str:
    """The op of a node without its overload: `aten.add`, `spx.all_gather`, `operator.getitem`."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.replace("::", ".")
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"higher_order.{target.name()}"
    if isinstance(target, str):
        return target
    if target is reshard:
        return "reshard"
    module = getattr(target, "__module__", None) or ""
    module = "operator" if module == "_operator" else module
    return f"{module}.{getattr(target, '__name__', type(target).__name__)}".lstrip(".")


def format_graph(gm: fx.GraphModule, mesh: MeshShape | None = None, title: str | None = None) -> str:
    """One value per line, its type as a string, the source line wherever it changes."""
    lines = [f"# {title}"] if title else []
    lines += [f"# mesh {mesh}"] if mesh is not None else []
    place = None
    for node in gm.graph.nodes:
        source = source_of(node) if node.op not in ("placeholder", "output") else None
        here = f"# {os.path.basename(source.file)}:{source.line}  {source.text}".rstrip() if source else None
        if here is not None and here != place:
            lines.append(here)
            place = here
        lines.append(one_line(_line(gm, node)))
    return "\n".join(lines) + "\n"


def compared_text(gm: fx.GraphModule) -> str:
    """The text that must be equal on all ranks: of the graph with its nodes counted anew.

    Tracing counts nodes that it drops later, such as the storage offset of an input, which on one rank is not 0.
    """
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), new.__getitem__)
        plain = re.sub(r"_\d+$", "", node.name)
        new[node] = graph.create_node(node.op, node.target, args, kwargs, plain, node.type)
        new[node].meta = node.meta
    return format_graph(fx.GraphModule(gm, graph))


def unified_diff(a: str, b: str, a_name: str = "before", b_name: str = "after") -> str:
    """The difference of two texts; empty if they are equal."""
    return "".join(difflib.unified_diff(a.splitlines(True), b.splitlines(True), a_name, b_name))


def _line(gm: fx.GraphModule, node: fx.Node) -> str:
    if node.op == "output":
        return f"return {_value_text(node.args[0])}"
    val = node.meta.get("val")
    if val is None and node.op == "get_attr":
        val = operator.attrgetter(str(node.target))(gm)
    type_name = type_text(val)
    collective = _collective_comment(node)
    sharding = "".join(f" {axis}={text}" for axis, text in (node.meta.get("sharding") or {}).items())
    return f'{node.name}: "{type_name}{sharding}" = {_expression(node)}{collective}'


def _collective_comment(node: fx.Node) -> str:
    """A comment: the collective that a `reshard` of a GLOBAL graph will be."""
    if not is_reshard(node):
        return ""
    src, dst = Reshard.of(node).kinds
    return f"  # {_RESHARDS.get((src, dst), f'{src} to {dst}')}"


def _expression(node: fx.Node) -> str:
    if node.op == "placeholder":
        return "input"
    if node.op == "get_attr":
        return f"self.{node.target}"
    args, kwargs = _unbound(node)
    written = [_value_text(arg) for arg in args] + [f"{key}={_value_text(value)}" for key, value in kwargs.items()]
    if node.target is operator.getitem:
        return f"{written[0]}[{written[1]}]"
    if node.op == "call_method":
        return f"{written[0]}.{node.target}({', '.join(written[1:])})"
    prefix = "self." if node.op == "call_module" else ""
    return f"{prefix}{op_name(node)}({', '.join(written)})"


def _unbound(node: fx.Node) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a node, with the mesh axis in place of the process group that it was bound to."""
    args, kwargs = list(node.args), dict(node.kwargs)
    index = axis_argument(node.target)
    if index is not None and "axis" in node.meta:
        assert isinstance(node.target, torch._ops.OpOverload)
        if index < len(args):
            args[index] = node.meta["axis"]
        else:
            kwargs[node.target._schema.arguments[index].name] = node.meta["axis"]
    return args, kwargs


def type_text(val: Any) -> str:
    """The type of an example value: `f32[2, 512]`, `(f32[2], i64[])`, `SymInt(s0)`."""
    if isinstance(val, torch.Tensor):
        return f"{_dtype_text(val.dtype)}[{', '.join(str(size) for size in val.shape)}]"
    if isinstance(val, (tuple, list)):
        return f"({', '.join(type_text(v) for v in val)})"
    if isinstance(val, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return f"{type(val).__name__}({val})"
    return "?" if val is None else type(val).__name__


def _dtype_text(dtype: torch.dtype) -> str:
    return _DTYPES.get(dtype, str(dtype).removeprefix("torch."))


def _value_text(value: Any) -> str:
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, tuple):
        return f"({', '.join(_value_text(v) for v in value)}{',' if len(value) == 1 else ''})"
    if isinstance(value, list):
        return f"[{', '.join(_value_text(v) for v in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_value_text(k)}: {_value_text(v)}" for k, v in value.items()) + "}"
    if isinstance(value, slice):
        start, stop = ("" if end is None else _value_text(end) for end in (value.start, value.stop))
        ends = f"{start}:{stop}"
        return ends if value.step is None else f"{ends}:{_value_text(value.step)}"
    if value is Ellipsis:
        return "..."
    if isinstance(value, torch.dtype):
        return _dtype_text(value)
    if isinstance(value, torch.device):
        return value.type
    if isinstance(value, (bool, int, float, complex, str, type(None))):
        return repr(value)
    return str(value) if isinstance(value, (torch.SymInt, torch.layout, torch.memory_format)) else type(value).__name__
