"""One model against itself on meshes: errors, memory, and what spcompile says of it."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

import families
import packages
import sympy
import torch
from torch import Tensor, nn

import spcompile

MESHES: dict[str, dict[str, int]] = {"cp": {"cp": 2}, "tp": {"tp": 2}}
_GATHERED = {"SPR102", "SPR103"}  # remarks with which the tokens of all ranks may be sorted by their experts
SPREAD = 0.1  # of what is added to parameters that are constant, whose gradients a zero would hide
TEXT = 300


def into(result: Connection, kind: str, name: str) -> None:
    """Measure, and send what was found."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    result.send(measured(kind, name))


def measured(kind: str, name: str) -> dict[str, Any]:
    """All of what is known of a model: for each mesh the largest relative error, the memory ratio, and remarks."""
    torch.manual_seed(0)
    found: dict[str, Any] = {"kind": kind, "name": name, "meshes": {}}
    try:
        model, batch = packages.build(name) if kind == packages.KIND else families.build(kind, name)
        model.eval()
        randomise(model)
        batch = accepted(model, batch)
        plain_step(copy.deepcopy(model), batch)
    except Exception as error:
        return found | {"unable": said(error)}
    found["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    for label, mesh in MESHES.items():
        torch._dynamo.reset()
        found["meshes"][label] = on_mesh(model, batch, mesh)
    return found


def on_mesh(model: nn.Module, batch: Any, mesh: dict[str, int]) -> dict[str, Any]:
    """The graphs of a model that breaks are sharded one by one."""
    for option in ({}, {"on_graph_break": "gather"}):
        try:
            report = spcompile.verify(model, batch, mesh, **option)
            break
        except Exception as error:
            refused = said(error)
            if "SP301" not in refused:
                return {"error": refused}
    else:
        return {"error": refused}
    found = {
        "ok": report.ok,
        "worst": max((min(row.relative, row.max_abs) for row in report.rows), default=0.0),
        "wrong": [row.name for row in report.rows if not row.ok][:4],
        "broken": bool(option),
        "remarks": sorted({remark.code for remark in report.remarks}),
        "notes": [note[:TEXT] for note in report.notes],
    }
    if not option:
        torch._dynamo.reset()
        memory = spcompile.explain(model, batch, mesh).to_dict()["memory"]
        tokens = families.BATCH * families.LENGTH
        alone = _number(memory["saved_activation_bytes_one_device"], tokens)
        own = tokens // 2 if "cp" in mesh and not _GATHERED & {*found["remarks"]} else tokens
        found["ratio"] = _number(memory["saved_activation_bytes"], own) / (alone / 2) if alone else None
    return found


def _number(size: int | str, tokens: int) -> float:
    """A size, where all that depend on data, as the tokens of an expert, are an even share of so many tokens."""
    said_size = sympy.sympify(size)
    return float(said_size.subs(dict.fromkeys(said_size.free_symbols, tokens // 2)))


def randomise(model: nn.Module) -> None:
    """Parameters that are 0 or 1 everywhere get other numbers."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.numel() and (parameter == parameter.flatten()[0]).all():
                parameter.add_(SPREAD * torch.randn_like(parameter))


def accepted(model: nn.Module, batch: Any) -> Any:
    """The inputs that a model's forward takes."""
    if not isinstance(batch, Mapping):
        return batch
    taken = inspect.signature(model.forward).parameters
    return {name: value for name, value in batch.items() if name in taken or (name == "labels" and "kwargs" in taken)}


def plain_step(model: nn.Module, batch: Any) -> None:
    """Forward and backward of the plain model: what fails here is no finding.

    Raises:
        Exception: what the model raises.
    """
    outputs = model(**batch) if isinstance(batch, Mapping) else model(*batch)
    leaves = torch.utils._pytree.tree_leaves(dict(outputs) if isinstance(outputs, Mapping) else outputs)
    sum(x.float().sum() for x in leaves if isinstance(x, Tensor) and x.requires_grad).backward()
    if not all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None):
        raise FloatingPointError("its own gradients are not finite")


def said(error: Exception) -> str:
    """The first words of an error, on one line."""
    return f"{type(error).__name__} {' '.join(str(error).split())}"[:TEXT]
