"""Gradients of a plain model, as `backward` gives them before hooks of parameters see them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def gradients_of(roots: Sequence[Tensor], wanted: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor | None]:
    """Of `roots`, times `weights` of their shapes, with respect to the leaves `wanted`; None for a leaf without one.

    By `backward`: reentrant checkpoints, which run a backward of their own inside, know no other way. All `grad` stay
    what they were. Hooks of leaves do not run: they are behind what a backend compiles, and see its gradients there.
    """
    leaves = list({id(leaf): leaf for leaf in (*wanted, *_leaves_of(roots))}.values())
    with _without_hooks(leaves):
        before = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        try:
            torch.autograd.backward(list(roots), list(weights))
            return [leaf.grad for leaf in wanted]
        finally:
            for leaf, gradient in zip(leaves, before, strict=True):
                leaf.grad = gradient


def _leaves_of(roots: Sequence[Tensor]) -> list[Tensor]:
    """What autograd would give gradients, parameter or not; it does not see into reentrant checkpoints."""
    found: list[Tensor] = [root for root in roots if root.is_leaf]
    waiting = [root.grad_fn for root in roots if root.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if hasattr(node, "variable"):
            found.append(node.variable)
        later = [after for after, _ in node.next_functions if after is not None and after not in seen]
        seen.update(later)
        waiting += later
    return found


@contextlib.contextmanager
def _without_hooks(leaves: Sequence[Tensor]) -> Iterator[None]:
    held = [hooks for leaf in leaves for hooks in (leaf._backward_hooks, leaf._post_accumulate_grad_hooks) if hooks]
    kept = [dict(hooks) for hooks in held]
    for hooks in held:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, own in zip(held, kept, strict=True):
            hooks.update(own)
