"""The rule of `spx::attention`, the one op that pairs two factors: keys are split wherever query rows are.

Not so where queries are few, as of pooling by learned queries: there every rank has all of them, and sees its own keys.
"""

from __future__ import annotations

import torch
import torch.fx as fx

import spcompile.attention.op  # noqa: F401  (defines the op)
from spcompile.attention.scores.attention_call import AttentionCall
from spcompile.graph.sizes import Size, hint, quotient, same
from spcompile.sharding.rules.rule import Dims, OpRule, register

FEW = 32  # queries are few where there are so many times more keys: then they are cheaper to hold everywhere than keys


def merges_keys(call: AttentionCall) -> bool:
    """Whether ranks let all queries see their own keys, and merge what comes out by its log-sum-exp.

    A sink counts once, so it is none of a rank's own keys.
    """
    sizes = call.sizes
    few = same(sizes.q_rows, 1) or FEW * hint(sizes.q_rows) <= hint(sizes.k_rows)
    return few and not same(sizes.k_rows, 1) and call.sinks is None


@register(torch.ops.spx.attention.default)
def attention(node: fx.Node) -> OpRule:
    """Q "b (g r) s h", k "b g t h", v "b g t v" -> out "b (g r) s v", lse "b (g r) s"; t follows s.
    Where ranks merge (`merges_keys`) t is split by itself, and results are complete.

    Query head i reads key head i // r. The mask's vectors and the columns of a dense bias are read whole: their
    factors are replicated.
    """
    call = AttentionCall.of(node)
    read = {role: arg for role, arg in call.named().items() if isinstance(arg, fx.Node)}
    sizes: dict[str, Size] = dict(zip("bngsthv", call.sizes, strict=True))
    sizes["r"] = quotient(sizes.pop("n"), sizes["g"])
    batch, heads, rows = (_present(sizes, *names) for names in ("b", "gr", "s"))
    layouts: dict[str, Dims] = {
        "q": (batch, heads, rows, _present(sizes, "h")),
        "k": tuple(_present(sizes, name) for name in "bgth"),
        "v": tuple(_present(sizes, name) for name in "bgtv"),
    }
    shared = dict.fromkeys(("q_documents", "k_documents", "key_valid"), (batch,)) | {
        "bias": (batch, heads, rows),
        "alibi_slopes": (heads,),
        "sinks": (heads,),
        "dropout_seed": (batch, heads),
    }
    for role in read.keys() - layouts.keys():
        dims: list[tuple[str, ...]] = []
        for dim, size in enumerate(read[role].meta["val"].shape):
            own = f"{role}{dim}"
            common = shared.get(role, ())
            dims.append(() if same(size, 1) else common[dim] if dim < len(common) else (own,))
            sizes[own] = size
        layouts[role] = tuple(dims)
    operands = tuple(layouts[role] for role in read if isinstance(read[role].meta.get("val"), torch.Tensor))
    used = {name for dims in operands for dim in dims for name in dim}
    merges = merges_keys(call)
    return OpRule(
        operands=operands,
        results=((batch, heads, rows, _present(sizes, "v")), (batch, heads, rows)),
        sizes={name: size for name, size in sizes.items() if name in used},
        completed=frozenset("t" if merges else ""),
        replicated=frozenset(used) - set("bgrt" if merges else "bgrst"),
        paired={"s": "t"},
    )


def _present(sizes: dict[str, Size], *names: str) -> tuple[str, ...]:
    """A dim that is the product of the factors of these names; those of size 1 do not count."""
    return tuple(name for name in names if not same(sizes[name], 1))
