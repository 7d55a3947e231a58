"""Causal attention, forward and backward: one process with two threads against ring and Ulysses on two processes.

    python benchmarks/attention_cpu.py [--seq 4096,8192,16384] [--heads 8] [--kv-heads 4] [--head-size 64] [--repeat 3]

Attention alone, on float32 operands that lie as the compiler lays them: zigzag and contiguous for the ring (Ulysses
gathers the sequence, so that its order makes no difference in work). Bytes are counted where process groups start to
send, next to the formulas of Liu et al. 2023 (ring) and Jacobs et al. 2023 (Ulysses). All in one run, one after the
other, on the same operands. The table goes to stderr, one line of JSON to stdout. Exits with 1 if an output or gradient
differs from the single process by more than 1e-5, or if other bytes are sent than the formula says.
B batch, N query heads, G key heads, S the whole sequence, s a rank's part, H head size.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

from spcompile.attention.ring.ring import backward_bytes, forward_bytes, message_numbers
from spcompile.collectives.counting import count_collectives
from spcompile.command.train import join_processes, on_processes
from spcompile.command.train_report import relative
from spcompile.machine import sequence
from spcompile.machine.host import cores
from spcompile.passes.placement.parallelize_attention import ulysses_attention

spx = torch.ops.spx

RANKS = 2
TOLERANCE = 1e-5
PARALLEL = (("ring", "zigzag"), ("ring", "contiguous"), ("ulysses", "contiguous"))

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Measurement:
    """Seconds are medians of the slowest rank's; bytes are those that each rank sends; error is relative."""

    strategy: str
    order: str
    seq: int
    forward_seconds: float
    backward_seconds: float
    sent_bytes: float = 0.0
    formula_bytes: float = 0.0
    error: float = 0.0

    @property
    def seconds(self) -> float:
        return self.forward_seconds + self.backward_seconds


def operands(options: argparse.Namespace, seq: int) -> list[Tensor]:
    """Q [1, N, S, H], k and v [1, G, S, H], and the gradient of the output, equal on all ranks."""
    generator = torch.Generator().manual_seed(seq)
    heads = (options.heads, options.kv_heads, options.kv_heads, options.heads)
    return [torch.randn(1, n, seq, options.head_size, generator=generator) for n in heads]


def one_process(options: argparse.Namespace) -> Attention:
    data = (None, None, None, None, None, None, "causal", options.head_size**-0.5)
    return lambda q_BNSH, k_BGSH, v_BGSH: spx.attention(q_BNSH, k_BGSH, v_BGSH, *data)[0]


def parallel(strategy: str, order: str, options: argparse.Namespace, seq: int) -> Attention:
    """Attention on a rank's rows; the axis is bound to the world."""
    axis = dist.group.WORLD.group_name  # type: ignore[union-attr]
    data = (None, None, None, None, "causal", options.head_size**-0.5)
    layout = (seq, seq, axis, RANKS, order)
    if strategy == "ring":
        return lambda q_BNsH, k_BGsH, v_BGsH: spx.ring_attention(q_BNsH, k_BGsH, v_BGsH, *data, *layout)[0]
    more = (None, None, None, 0.0, 0.0)
    return lambda q_BNsH, k_BGsH, v_BGsH: ulysses_attention(q_BNsH, k_BGsH, v_BGsH, *data, *more, *layout)[0]


def measure(
    attention: Attention, tensors: list[Tensor], repeat: int, together: bool
) -> tuple[float, float, list[Tensor]]:
    """(forward seconds, backward seconds, output and gradients); the first round warms up."""
    forward, backward = [], []
    results: list[Tensor] = []
    for _ in range(repeat + 1):
        leaves = [x.detach().requires_grad_() for x in tensors[:3]]
        start = _now(together)
        out = attention(*leaves)
        middle = _now(together)
        grads = torch.autograd.grad(out, leaves, tensors[3])
        stop = _now(together)
        forward.append(middle - start)
        backward.append(stop - middle)
        results = [out.detach(), *grads]
    return statistics.median(forward[1:]), statistics.median(backward[1:]), results


def _now(together: bool) -> float:
    if together:
        dist.barrier()
    return time.perf_counter()


def sent_bytes(attention: Attention, tensors: list[Tensor]) -> float:
    """What this rank sends in a forward and a backward: what it sends, and of an all-to-all all but its own part."""

    def run() -> None:
        leaves = [x.detach().requires_grad_() for x in tensors[:3]]
        torch.autograd.grad(attention(*leaves), leaves, tensors[3])

    share = {"send": 1.0}
    return sum(
        row.bytes * share.get(row.op, (RANKS - 1) / RANKS) for row in count_collectives(run) if "barrier" not in row.op
    )


def formula_bytes(strategy: str, options: argparse.Namespace, seq: int) -> float:
    """Forward and backward. Ulysses sends q, k and v, and the result back, in each of the two.

    Its log-sum-exp goes back, too: compiled programs, which nobody asks for it, drop that.
    """
    N, G, H = options.heads, options.kv_heads, options.head_size
    if strategy == "ring":
        sizes = (message_numbers(1, G, seq // RANKS, H, H), RANKS - 1, 4)
        return float(forward_bytes(*sizes) + backward_bytes(*sizes))
    return (RANKS - 1) / RANKS**2 * seq * (2 * H * (2 * N + 2 * G) + N) * 4


def run_rank(options: argparse.Namespace) -> list[Measurement]:
    """All configurations; rank 1 waits, without work, while rank 0 runs the single process."""
    found = []
    with join_processes():
        for seq in options.seq:
            whole = operands(options, seq)
            alone = [None]
            if dist.get_rank() == 0:
                torch.set_num_threads(cores())
                alone[0] = measure(one_process(options), whole, options.repeat, together=False)  # type: ignore[call-overload]
            dist.broadcast_object_list(alone, src=0)
            assert alone[0] is not None
            forward, backward, expected = alone[0]
            found.append(Measurement("one process", "natural", seq, forward, backward))
            torch.set_num_threads(max(1, cores() // RANKS))
            found += [measure_parallel(*how, options, seq, whole, expected) for how in PARALLEL]
    return found


def measure_parallel(
    strategy: str, order: str, options: argparse.Namespace, seq: int, whole: list[Tensor], expected: list[Tensor]
) -> Measurement:
    """One configuration, timed on all ranks together and compared with what the single process computed."""
    rank = dist.get_rank()
    local = [sequence.take(x, 2, rank, RANKS, order, None) for x in whole]
    attention = parallel(strategy, order, options, seq)
    forward, backward, results = measure(attention, local, options.repeat, together=True)
    sent = sent_bytes(attention, local)
    wanted = [sequence.take(x, 2, rank, RANKS, order, None) for x in expected]
    error = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(results, wanted, strict=True))
    return Measurement(strategy, order, seq, forward, backward, sent, formula_bytes(strategy, options, seq), error)


def table(rows: list[Measurement]) -> Table:
    """`ratio` is of throughputs, forward and backward together, against the single process of the same length."""
    alone = {row.seq: row for row in rows if row.strategy == "one process"}
    result = Table("tokens", "", "order", "forward, s", "backward, s", "ratio", "sent, MB", "formula, MB", "differs")
    for column in (result.columns[0], *result.columns[3:]):
        column.justify = "right"
    for row in rows:
        times = [f"{row.forward_seconds:.3f}", f"{row.backward_seconds:.3f}"]
        sizes = [f"{x / 1e6:.2f}" for x in (row.sent_bytes, row.formula_bytes)]
        ratio = f"{alone[row.seq].seconds / row.seconds:.2f}"
        is_last = (row.strategy, row.order) == PARALLEL[-1]
        cells = [*times, ratio, *sizes, f"{row.error:.1e}"]
        result.add_row(str(row.seq), row.strategy, row.order, *cells, end_section=is_last)
    return result


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seq", type=lambda text: [int(part) for part in text.split(",")], default=[4096, 8192, 16384])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    rows: list[Measurement] = on_processes(RANKS, run_rank, options)[0]
    Console(stderr=True, width=120).print(table(rows))
    machine = {"cores": cores(), "processor": platform.machine(), "torch": torch.__version__}
    print(json.dumps({"schema": 1, "machine": machine, "options": vars(options), "results": [asdict(r) for r in rows]}))
    wrong_bytes = any(relative(row.sent_bytes, row.formula_bytes) > 1e-9 for row in rows if row.formula_bytes)
    return int(wrong_bytes or any(not row.error <= TOLERANCE for row in rows))


if __name__ == "__main__":
    sys.exit(main())
