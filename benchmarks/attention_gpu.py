"""The Triton attention kernels on one NVIDIA GPU against what else is there, in one run; a table and JSON.

    python benchmarks/attention_gpu.py [--json FILE] [--seconds 450] [--check-only]

First every kernel is checked against dense float64 arithmetic. Then forward and backward TFLOP/s of bfloat16, causal
and full, head sizes 64 and 128, 64:8 and 32:32 heads, 2k to 32k tokens (32k tokens a call): SDPA's flash and cuDNN
kernels, FlexAttention (compiled for each shape, so for some only) and, where installed, flash-attn. Last the ring
step: n hops of S / n keys with carried state against one kernel on S keys, which is a ring's efficiency without the
wire. What does not fit into --seconds is left out, and said so. Exit status: 1 for a wrong kernel, 2 without a GPU.

Runs from the source tree; of the package it imports `spcompile.attention` only, which needs torch and triton.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

package = types.ModuleType("spcompile")  # without its __init__, which needs an installation
package.__path__ = [str(Path(__file__).resolve().parent.parent / "spcompile")]
sys.modules.setdefault("spcompile", package)

from spcompile.attention.kernels import naive  # noqa: E402
from spcompile.attention.scores.dropout import Dropout  # noqa: E402
from spcompile.attention.scores.mask import AttentionMask  # noqa: E402
from spcompile.attention.scores.provider import Rows, Scores  # noqa: E402
from spcompile.attention.scores.runs import Run, natural_runs  # noqa: E402

TOKENS = 32 * 1024  # of one call: batch times length
LENGTHS = (2048, 4096, 8192, 16384, 32768)
HEADS = ((64, 8), (32, 32))
FLEX_LENGTHS = (8192,)  # elsewhere FlexAttention's compile time would eat the budget
Call = Callable[[], Any]


@dataclass(frozen=True)
class Shape:
    """One call of attention in bfloat16: B batch, N query heads, G key heads, S tokens, head size D."""

    N: int
    G: int
    S: int
    D: int
    causal: bool

    @property
    def B(self) -> int:
        return max(1, TOKENS // self.S)

    @property
    def flops(self) -> float:
        """Of the forward: two products of S x S x D for each head, half of it under a causal mask."""
        return 4 * self.B * self.N * self.S**2 * self.D / (2 if self.causal else 1)

    def inputs(self) -> list[Tensor]:
        """q, k, v and the gradient of the output."""
        sizes = (self.N, self.G, self.G, self.N)
        return [torch.randn(self.B, n, self.S, self.D, device="cuda", dtype=torch.bfloat16) for n in sizes]


def ours(shape: Shape) -> tuple[Call, Call]:
    from spcompile.attention.kernels.triton.hop_provider import Triton

    q, k, v, grad_out = shape.inputs()
    scores = Scores(AttentionMask(causal=shape.causal), shape.D**-0.5)
    runs = natural_runs(shape.S)

    def forward() -> tuple[Tensor, Tensor]:
        state = Triton().start_forward(q, v, scores)
        state.add(k, v, runs, runs, last=True)
        return state.result()

    out, lse = forward()
    return forward, lambda: Triton().backward(Rows(q, out, grad_out, lse, None), k, v, runs, runs, scores, False)


def ring_step(shape: Shape, hops: int) -> tuple[Call, Call]:
    """The same work as `ours` in hops of S / hops keys each."""
    from spcompile.attention.kernels.triton.hop_provider import Triton

    q, k, v, grad_out = shape.inputs()
    scores = Scores(AttentionMask(causal=shape.causal), shape.D**-0.5)
    runs, part = natural_runs(shape.S), shape.S // hops
    parts = [
        (k[:, :, i : i + part], v[:, :, i : i + part], Run(0, part, i, i + part - 1)) for i in range(0, shape.S, part)
    ]

    def forward() -> tuple[Tensor, Tensor]:
        state = Triton().start_forward(q, v, scores)
        for i, (k_part, v_part, run) in enumerate(parts):
            state.add(k_part, v_part, runs, (run,), last=i == hops - 1)
        return state.result()

    out, lse = forward()

    def backward() -> Any:
        state = Triton().start_backward(Rows(q, out, grad_out, lse, None), v, scores, False)
        for i, (k_part, v_part, run) in enumerate(parts):
            state.add(k_part, v_part, runs, (run,), last=i == hops - 1)
        return state.result()

    return forward, backward


def autograd(function: Callable[..., Tensor], shape: Shape, heads_dim: int = 1) -> tuple[Call, Call]:
    """The two halves of a differentiable function of q, k and v."""
    *leaves, grad_out = (x if heads_dim == 1 else x.transpose(1, 2).contiguous() for x in shape.inputs())
    leaves = [x.requires_grad_() for x in leaves]
    out = function(*leaves)
    return (
        lambda: function(*(x.detach() for x in leaves)),
        lambda: torch.autograd.grad(out, leaves, grad_out, retain_graph=True),
    )


def sdpa(backend: SDPBackend, shape: Shape) -> tuple[Call, Call]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=shape.causal, enable_gqa=True)

    return autograd(run, shape)


def flex(shape: Shape) -> tuple[Call, Call]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if shape.S not in FLEX_LENGTHS:
        raise RuntimeError("not asked for")
    mask = None
    if shape.causal:
        mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, shape.S, shape.S, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False)
    return autograd(lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=True), shape)


def flash_attn(shape: Shape) -> tuple[Call, Call]:
    try:
        from flash_attn_interface import flash_attn_func
    except ImportError:
        from flash_attn import flash_attn_func

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = flash_attn_func(q, k, v, causal=shape.causal)
        return result[0] if isinstance(result, tuple) else result

    return autograd(run, shape, heads_dim=2)


METHODS: dict[str, Callable[[Shape], tuple[Call, Call]]] = {
    "spcompile": ours,
    "sdpa flash": functools.partial(sdpa, SDPBackend.FLASH_ATTENTION),
    "sdpa cudnn": functools.partial(sdpa, SDPBackend.CUDNN_ATTENTION),
    "flex": flex,
    "flash-attn": flash_attn,
}


def milliseconds(call: Call) -> float:
    from triton.testing import do_bench

    return float(do_bench(call, warmup=20, rep=100, return_mode="median"))


def measured(make: Callable[[], tuple[Call, Call]], flops: float) -> dict[str, Any]:
    """Milliseconds and TFLOP/s of both directions, or why there are none. The backward counts 2.5 times the forward."""
    try:
        forward, backward = make()
        times = milliseconds(forward), milliseconds(backward)
    except Exception as error:  # a kernel that is missing, refuses or fails is a row of the table
        return {"missing": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"[:160]}
    finally:
        torch.cuda.empty_cache()
    return {
        "forward_ms": times[0],
        "backward_ms": times[1],
        "forward_tflops": flops / times[0] / 1e9,
        "backward_tflops": 2.5 * flops / times[1] / 1e9,
    }


def shapes() -> Iterator[Shape]:
    """The most telling ones first, in case time runs out."""
    order = sorted(product((True, False), (128, 64), HEADS), key=lambda x: (x[1] != 128, x[2] != HEADS[0]))
    for length in (8192, *(x for x in LENGTHS if x != 8192)):
        for causal, size, (heads, key_heads) in order:
            yield Shape(heads, key_heads, length, size, causal)


def check(dtype: torch.dtype, size: int, text: str, hops: int, **more: Any) -> dict[str, Any]:
    """Largest error of the kernels, relative to the largest number, against `naive` in float64, out and gradients."""
    from spcompile.attention.kernels.triton.hop_provider import Triton

    torch.manual_seed(0)
    B, N, G, S = 2, 4, 2, 333
    mask = AttentionMask.parse(text)
    q, k, v, grad_out = (torch.randn(B, n, S, size, device="cuda", dtype=dtype) for n in (N, G, G, N))
    ids = torch.randint(0, 3, (B, S), device="cuda").sort(-1).values if mask.documents else None
    valid = torch.rand(B, S, device="cuda") > 0.2 if mask.key_padding else None
    dropout = Dropout(0.2, torch.randint(0, 2**40, (B, N), device="cuda")) if more.pop("drop", False) else None
    scores = Scores(mask, size**-0.5, ids, ids, valid, dropout=dropout, **more)
    runs, part = natural_runs(S), -(-S // hops)
    parts = [(i, min(i + part, S)) for i in range(0, S, part)]
    hop = [(k[:, :, a:b], v[:, :, a:b], runs, (Run(0, b - a, a, b - 1),)) for a, b in parts]
    state = Triton().start_forward(q, v, scores)
    for i, args in enumerate(hop):
        state.add(*args, last=i == hops - 1)
    out, lse = state.result()
    backward = Triton().start_backward(Rows(q, out, grad_out, lse, None), v, scores, False)
    dk, dv = (torch.cat(x, 2) for x in zip(*(backward.add(*a, last=a is hop[-1]) for a in hop), strict=True))

    at = torch.arange(S, device="cuda")
    keep = mask.allowed(at, at, ids, ids, valid)
    factors = None if dropout is None else dropout.factors(at, at, torch.float64)
    bias = None if scores.bias is None else scores.bias.double()
    wide = [x.double() for x in (q, k, v)]
    exact, exact_lse = naive.forward(*wide, scores.scale, keep, bias, scores.softcap, factors)
    delta = (out.double() * grad_out.double()).sum(-1)
    more_args = (scores.scale, keep, bias, scores.softcap, factors)
    gradients = naive.backward(*wide, grad_out.double(), exact_lse, delta, *more_args)[:3]
    pairs = zip((out, backward.result()[0], dk, dv), (exact, *gradients), strict=True)
    errors = [float((a.double() - b).abs().max() / b.abs().max()) for a, b in pairs]
    allowed = 64 * torch.finfo(dtype).eps if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    wrong = not all(error <= allowed for error in errors)  # NaN is wrong too
    names = [*more, *(["dropout"] if dropout else [])]
    case = {"dtype": str(dtype), "size": size, "mask": text, "hops": hops, "more": names}
    return {**case, "errors": errors, "allowed": allowed, "wrong": wrong}


def checks() -> list[dict[str, Any]]:
    found = []
    for dtype, size in product((torch.bfloat16, torch.float16, torch.float32), (64, 80, 128, 256)):
        found += [check(dtype, size, "causal", 1), check(dtype, size, "full", 3)]
    for size in (64, 128):
        found.append(check(torch.bfloat16, size, "causal window=100 documents key_padding", 2))
        found.append(check(torch.bfloat16, size, "causal", 2, softcap=5.0, drop=True))
        bias = torch.randn(1, 4, 333, 333, device="cuda", dtype=torch.bfloat16)
        found.append(check(torch.bfloat16, size, "causal", 2, bias=bias))
    return found


def show(title: str, rows: list[dict[str, Any]], columns: list[str]) -> None:
    """A table of text; what is missing is a dash."""
    cells = [
        [f"{row[c]:.0f}" if isinstance(row.get(c), float) else str(row.get(c, "-")) for c in columns] for row in rows
    ]
    widths = [max(len(line[i]) for line in [columns, *cells]) for i in range(len(columns))]
    print(f"\n{title}")
    for line in [columns, *cells]:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    parser.add_argument("--seconds", type=float, default=450, help="start nothing new after so long")
    parser.add_argument("--check-only", action="store_true", help="check the kernels, measure nothing")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("attention_gpu needs an NVIDIA GPU, and torch sees none: nothing was measured.")
        return 2
    import triton

    started = time.monotonic()
    report: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
    }  # fmt: skip
    print(report)
    report["checks"] = checks()
    wrong = [row for row in report["checks"] if row["wrong"]]
    print(f"{len(report['checks'])} checks against float64, {len(wrong)} wrong, {time.monotonic() - started:.0f} s")
    for row in wrong:
        print("WRONG", json.dumps(row))

    report["kernels"], report["ring"], skipped = [], [], []
    for shape in () if given.check_only else shapes():
        row: dict[str, Any] = {"causal": shape.causal, "d": shape.D, "heads": f"{shape.N}:{shape.G}", "tokens": shape.S}
        # The ring step is worth more than the last lengths: it gets the end of the time.
        if time.monotonic() - started > given.seconds * 0.8:
            skipped.append(row)
            continue
        row["figures"] = {name: measured(functools.partial(make, shape), shape.flops) for name, make in METHODS.items()}
        report["kernels"].append(row)
        print(json.dumps(row), flush=True)
    for length, causal in () if given.check_only else product((8192, 32768), (False, True)):
        shape = Shape(*HEADS[0], length, 128, causal)
        row = {"causal": causal, "tokens": length}
        if time.monotonic() - started > given.seconds:
            skipped.append(row)
            continue
        one = measured(functools.partial(ours, shape), shape.flops)
        for hops in (2, 4, 8):
            many = measured(functools.partial(ring_step, shape, hops), shape.flops)
            found = {
                key[:-3]: 100 * one[key] / many[key]
                for key in ("forward_ms", "backward_ms")
                if key in many and key in one
            }
            report["ring"].append({**row, "hops": hops, **found, "one": one, "many": many})
    report["skipped"], report["seconds"] = skipped, time.monotonic() - started

    for direction in ("forward", "backward"):
        rows = [
            {**row, **{name: figures.get(f"{direction}_tflops", "-") for name, figures in row["figures"].items()}}
            for row in report["kernels"]
        ]
        show(f"{direction}, TFLOP/s", rows, ["causal", "d", "heads", "tokens", *METHODS])
    show("ring step, % of one kernel", report["ring"], ["causal", "tokens", "hops", "forward", "backward"])
    print(f"\nleft out for lack of time: {skipped or 'nothing'}; {report['seconds']:.0f} s")
    if given.json:
        given.json.write_text(json.dumps(report, indent=1))
    else:
        print(json.dumps(report))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
