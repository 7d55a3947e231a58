"""What a strategy costs one attention: bytes that a rank sends, and a prediction of its time, forward and backward.

Bytes are exact, those of the final graphs. Ulysses over P ranks sends (P-1)/P^2 * s*b*d*(2a + 2max(g, P)) elements
forward, as many backward, and there again what is not saved: the result, and keys and values that go to several ranks.
A ring sends 2(P-1)/P * s*b*g*d forward, and twice that plus gradients in the accumulation dtype backward (Liu et al.
2023). A hybrid sends the first among its inner ranks, for their rows, and the second between its outer ones, for a
part of the heads.

Time assumes:
- kernels reach a constant rate on whole sequences, and the backward takes 2.5 times the forward;
- on rings they reach RING_RATE of it. So did rings of the same kernel on 8 to 64 H100s, 421 to 457 of 582 to 602
  TFLOP/s (SandAI-org/MagiAttention, its benchmark of context parallelism, figures for causal masks);
- a hop of a ring hides behind the block before it, as far as that takes as long; the gradients' way home does not;
- all-to-alls hide behind nothing, an upper bound where split-all-to-alls splits them, and wait for one message's
  latency, since all their messages leave at once;
- the slowest rank decides: padded heads are computed like others, and a causal ring in contiguous order waits for its
  last rank. Documents and padding, which are data, are taken as full.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from spcompile.attention.ring.ring import Ring, backward_bytes, forward_bytes, message_numbers
from spcompile.attention.scores.attention_call import AttentionCall
from spcompile.attention.scores.mask import AttentionMask
from spcompile.attention.scores.runs import Run, natural_runs
from spcompile.attention.strategy import Strategy
from spcompile.attention.ulysses.head_shares import HeadSplit
from spcompile.graph.sizes import hint
from spcompile.graph.typed_call import value_of
from spcompile.machine.byte_sizes import bytes_text
from spcompile.machine.durations import ms_text
from spcompile.machine.links import Link
from spcompile.machine.sequence import local_length

RING_RATE = 0.75
BACKWARD = 2.5
_SAMPLES = 16  # rows of a run for which visible keys are counted


@dataclass(frozen=True)
class Problem:
    """One attention of whole sequences: q [batch, heads, q_length, qk_size], v [batch, kv_heads, k_length, v_size].

    itemsize: bytes of a number. bias_row: of a bias that differs between rows, bytes of a row of a head.
    """

    batch: int
    heads: int
    kv_heads: int
    q_length: int
    k_length: int
    qk_size: int
    v_size: int
    itemsize: int
    mask: AttentionMask
    bias_row: int = 0

    @classmethod
    def of(cls, call: AttentionCall) -> Problem:
        """That of a call on one device. Sizes that are symbols are taken as traced."""
        sizes = call.sizes.hints()
        return cls(
            batch=sizes.batch,
            heads=sizes.heads,
            kv_heads=sizes.kv_heads,
            q_length=sizes.q_rows,
            k_length=sizes.k_rows,
            qk_size=sizes.qk_size,
            v_size=sizes.v_size,
            itemsize=value_of(call.q).element_size(),
            mask=call.attention_mask,
            bias_row=_bytes_of_bias_row(call),
        )


def _bytes_of_bias_row(call: AttentionCall) -> int:
    """Of one query row of one head, over the batch, of a bias whose rows differ."""
    if not call.bias_has_rows:
        return 0
    bias = value_of(call.bias)
    return hint(bias.shape[0]) * hint(bias.shape[3]) * bias.element_size()


@dataclass(frozen=True)
class Cost:
    """Of one rank, forward and backward. inner_bytes, outer_bytes: sent by all-to-alls and by a ring."""

    strategy: Strategy
    inner_bytes: int
    outer_bytes: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.strategy} {bytes_text(self.inner_bytes + self.outer_bytes)}, {ms_text(self.seconds)} ms"


@functools.lru_cache(maxsize=1024)
def cost(problem: Problem, strategy: Strategy, order: str, inner: Link, outer: Link, flops: float) -> Cost:
    """The cost of a strategy.

    order: of the sequence; inner, outer: what its parts of the axis run over; flops: a second, of a rank, in attention.
    """
    heads = HeadSplit(problem.heads, problem.kv_heads, strategy.inner)
    inner_bytes, messages = _all_to_alls(problem, strategy, order, heads)
    length = (problem.q_length, problem.k_length)
    ring = Ring(*length, strategy.outer, order, strategy.inner)
    pairs = max(
        _number_of_pairs(problem.mask, ring.q_runs(rank) if strategy.outer > 1 else natural_runs(length[0]), length[1])
        for rank in range(strategy.outer)
    )
    work = 2 * problem.batch * heads.local_heads * pairs * (problem.qk_size + problem.v_size)
    compute = work / flops
    hops = len(ring.distances(problem.mask.usual)) if strategy.outer > 1 else 0
    seconds = inner.seconds(inner_bytes, messages)
    if hops == 0:
        return Cost(strategy, inner_bytes, 0, seconds + (1 + BACKWARD) * compute)
    keys = local_length(problem.k_length, strategy.inner * strategy.outer, order) * strategy.inner
    numbers = message_numbers(problem.batch, heads.local_kv_heads, keys, problem.qk_size, problem.v_size)
    outer_bytes = forward_bytes(numbers, hops, problem.itemsize) + backward_bytes(numbers, hops, problem.itemsize)
    block = compute / RING_RATE / (hops + 1)
    gradients = numbers * max(4, problem.itemsize)
    forward = block + hops * max(block, outer.seconds(numbers * problem.itemsize))
    hop_back = outer.seconds(numbers * problem.itemsize + gradients)
    backward = BACKWARD * block + hops * max(BACKWARD * block, hop_back) + outer.seconds(gradients)
    return Cost(strategy, inner_bytes, outer_bytes, seconds + forward + backward)


def _all_to_alls(problem: Problem, strategy: Strategy, order: str, heads: HeadSplit) -> tuple[int, int]:
    """(bytes, messages that wait for one another) of all-to-alls among the inner ranks."""
    n = strategy.inner
    if n == 1:
        return 0, 0
    q_rows, k_rows = (
        local_length(length, n * strategy.outer, order) for length in (problem.q_length, problem.k_length)
    )
    queries, keys = problem.batch * n * heads.local_heads * q_rows, problem.batch * n * heads.local_kv_heads * k_rows
    result, key_bytes = queries * problem.v_size, keys * (problem.qk_size + problem.v_size)
    once = queries * problem.qk_size + key_bytes + result
    again = result + (key_bytes if heads.repeats_keys else 0)
    bias = 3 * n * heads.local_heads * q_rows * problem.bias_row
    apart = heads.repeats_keys or q_rows != k_rows
    messages = 2 * (2 + apart) + 1 + heads.repeats_keys + (3 if bias else 0)
    return (n - 1) * (((2 * once + again) * problem.itemsize + bias) // n), messages


def _number_of_pairs(mask: AttentionMask, q_runs: tuple[Run, ...], k_length: int) -> float:
    """About how many pairs of a query in these runs and a key the mask leaves, documents and padding aside."""
    total = 0.0
    for run in q_runs:
        count = min(run.length, _SAMPLES)
        seen = 0
        for i in range(count):
            row = run.first + (2 * i + 1) * run.length // (2 * count)
            first, last = mask.usual.reach(row, row)
            seen += max(0, min(k_length - 1, k_length if last is None else last) + 1 - first)
        total += seen * run.length / count
    return total
