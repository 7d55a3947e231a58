"""The plain model, run once forward and backward: what everything is compared with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from spcompile.diagnostics import IllegalOption
from spcompile.options import Options
from spcompile.program.trace import Inputs
from spcompile.report.gradients import gradients_of
from spcompile.report.put_back import put_back


@dataclass
class Eager:
    """The plain model's results.

    outputs: by name. weights: what each differentiated output is multiplied with. gradients: by id of the parameter or
    input. written: the new numbers of tensors that were written to, by id. replaced: buffers that are other tensors
    now, by name.
    """

    outputs: dict[str, Any]
    weights: dict[str, Tensor]
    gradients: dict[int, Tensor | None]
    written: dict[int, Tensor] = field(default_factory=dict)
    replaced: dict[str, Tensor] = field(default_factory=dict)


@contextlib.contextmanager
def attention_by_its_formula() -> Iterator[None]:
    """Compute scaled_dot_product_attention by products and a softmax, not by a kernel that fuses them.

    torch's fused kernels keep a log-sum-exp for the backward. In a row in which a large number, as finfo.min, excludes
    all keys that has no room for the number of keys, and the gradients of such rows come out wrong (torch 2.13, CPU).
    """
    with sdpa_kernel(SDPBackend.MATH):
        yield


def run_eager(model: nn.Module, example_inputs: Inputs, options: Options) -> Eager:
    """The plain model, forward and backward; it and its inputs are put back."""
    args = () if isinstance(example_inputs, Mapping) else tuple(example_inputs)
    kwargs = dict(example_inputs) if isinstance(example_inputs, Mapping) else {}
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    buffers = dict(model.named_buffers())
    with put_back(model, (args, kwargs)) as kept, attention_by_its_formula():
        outputs = named_leaves(model(*args, **kwargs))
        weights = _weights(outputs, options)
        leaves = [*model.parameters(), *tensors]
        wanted = [x for x in leaves if x.requires_grad and x.is_leaf]
        grads: Sequence[Tensor | None] = [None] * len(wanted)
        if weights and wanted:
            roots = [outputs[name] for name in weights]
            grads = gradients_of(roots, wanted, list(weights.values()))
        written = {id(x): x.detach().clone() for x in kept.changed() if x.layout is torch.strided}
        replaced = {n: x.detach().clone() for n, x in model.named_buffers() if x is not buffers.get(n)}
        if written:  # outputs may be views of them
            outputs = {name: x.detach().clone() if isinstance(x, Tensor) else x for name, x in outputs.items()}
    gradients = {id(x): g for x, g in zip(wanted, grads, strict=True)}
    return Eager(outputs, weights, gradients, written, replaced)


def named_leaves(result: Any) -> dict[str, Any]:
    """The leaves of a model's result by path; by number where a container was registered without names of its parts."""
    try:
        paths, _ = pytree.tree_flatten_with_path(result)
    except ValueError:
        return {f"output {i}": leaf for i, leaf in enumerate(pytree.tree_leaves(result))}
    return {pytree.keystr(path).strip("[]'.") or "output": leaf for path, leaf in paths}


def _weights(outputs: Mapping[str, Any], options: Options) -> dict[str, Tensor]:
    """1 for the loss, the first differentiable scalar; without one, random numbers for every output."""
    floating = {n: x for n, x in outputs.items() if isinstance(x, Tensor) and x.is_floating_point() and x.requires_grad}
    loss = next((name for name, x in floating.items() if x.ndim == 0), None)
    if loss is not None:
        return {loss: torch.ones_like(floating[loss])}
    if options.outputs == "loss":
        raise IllegalOption('outputs="loss" for a model that returns no loss', legal='outputs="full" or "sharded"')
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device) for n, x in floating.items()}
