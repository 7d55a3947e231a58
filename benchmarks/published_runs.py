"""Runs of Llama 3 8B on eight H100s that others published, as this compiler would do them: seconds, and what they take.

Each run is compiled at two depths with whole layers made again, as all of them did (full activation checkpointing),
and continued to 32 layers. Three constants of machines are fitted, one each, to one row that then has no error: what
the attention kernels of two systems reach, and what ALST's optimizer takes on the host's processors. All else is
spcompile/machine/hardware.json.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.fx as fx

from spcompile import models
from spcompile.attention.scores.mask import AttentionMask
from spcompile.attention.strategy import Strategy
from spcompile.attention.strategy_cost import Problem, cost
from spcompile.machine.accelerators import ACCELERATORS
from spcompile.machine.links import LINKS
from spcompile.memory.ladder import HOST
from spcompile.options import Options
from spcompile.passes import PIPELINE
from spcompile.plan_world import with_depths
from spcompile.planning.candidates import Candidate
from spcompile.planning.figures import Figures, extrapolated
from spcompile.planning.search import Depths, steps_of
from spcompile.planning.short_step import ShortStep

RANKS = 8
MODEL = "llama3-8b"
ULYSSES, ZERO = Candidate((("cp", RANKS),), "ulysses", True, ("cp",)), Candidate((("dp", RANKS),), shard=("dp",))
RING = Candidate((("cp", RANKS),), "ring", True, ("cp",))
RING_4 = Candidate((("dp", 2), ("cp", 4)), "ring", True, ("dp", "cp"))


@dataclass(frozen=True)
class Run:
    """A published run. entries: rows of the batch. seconds: of a step. peak_gib: of one rank, None: not published.

    on_host: whether inputs of layers waited in the host's memory. whole_logits: the loss made all of them at once.
    """

    name: str
    tokens: int
    candidate: Candidate
    seconds: float
    entries: int = 1
    on_host: bool = False
    whole_logits: bool = False
    peak_gib: float | None = None


ALST = (
    Run("baseline", 32_768, ZERO, 17, RANKS, whole_logits=True),
    Run("+ tiled loss", 163_840, ZERO, 123, RANKS),
    Run("+ Ulysses", 1_100_000, ULYSSES, 564),
    Run("+ tiled MLP", 1_200_000, ULYSSES, 703),
    Run("+ offload of checkpoints", 2_400_000, ULYSSES, 2610, on_host=True),
    Run("+ both", 3_700_000, ULYSSES, 6455, on_host=True),
)
ALST_FITTED = "+ Ulysses"
ALST_OPTIMIZER_FITTED = "baseline"  # the shortest step: what is the same in all of them shows best
UPIPE = (Run("UPipe, 128k", 131_072, ULYSSES, 131_072 / RANKS / 2280, on_host=True, peak_gib=21.1),)
TORCHTITAN = (
    Run("torchtitan, 128k, cp 4", 131_072, RING_4, 2 * 131_072 / RANKS / 1071, 2),
    Run("torchtitan, 256k, cp 8", 262_144, RING, 262_144 / RANKS / 548),
)
TORCHTITAN_FITTED = "torchtitan, 256k, cp 8"


@dataclass(frozen=True)
class Prepared:
    """A run, compiled. steps: at both depths. finals: their graphs, and the seconds of what they make again."""

    run: Run
    steps: Sequence[ShortStep]
    finals: Sequence[tuple[dict[str, fx.GraphModule], float]]
    depths: Depths

    @classmethod
    def of(cls, run: Run, depths: Depths, options: Options) -> Prepared:
        """With all that can be made again, or on the host."""
        steps = steps_of(depths, run.candidate, options, PIPELINE)
        finals = []
        for step in steps:
            assert step.ladder is not None
            finals.append(step.final_graphs(HOST if run.on_host else len(step.ladder.kinds)))
        return cls(run, steps, finals, depths)

    def figures(self, attention_reached: float | None = None) -> Figures:
        """At full depth. attention_reached: by attention kernels, of the peak; None: as in the table."""
        found = []
        for step, (graphs, again) in zip(self.steps, self.finals, strict=True):
            accelerator = step.cost.accelerator
            if attention_reached is not None:
                accelerator = replace(accelerator, attention_reached=attention_reached)
            timed = replace(step, cost=replace(step.cost, accelerator=accelerator))
            found.append(timed.figures_of(graphs, again))
        few, more = found
        blocks = self.depths.shorts[0].blocks, self.depths.shorts[1].blocks
        return extrapolated(few, more, blocks, self.depths.count)


def prepared(run: Run) -> Prepared:
    """Compile a run."""
    passes = {"recognize-linear-loss": False} if run.whole_logits else {}
    options = Options.parse({"outputs": "loss", "accelerator": "h100", "optimizer": "none", "passes": passes})
    found: list[Prepared] = []

    def explore(depths: Depths, _: int) -> None:
        found.append(Prepared.of(run, depths, options))

    with torch.device("meta"):
        model = models.build(MODEL).to(torch.bfloat16)
        ids = torch.zeros(run.entries, run.tokens, dtype=torch.int64)
    with_depths(model, {"ids_BS": ids, "labels_BS": ids}, run.candidate.size("dp"), options, explore)
    return found[0]


def reached_by_attention(one: Prepared, beside: float = 0.0) -> float:
    """With which a run takes as long as was published: found by halving. beside: seconds that are added to a step."""
    low, high = 0.02, 1.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if one.figures(middle).seconds + beside > one.run.seconds else (low, middle)
    return (low + high) / 2


def reached_beside_optimizer(of_attention: Prepared, of_optimizer: Prepared) -> tuple[float, float]:
    """(what attention reaches, seconds of an optimizer on the host) with which each run takes as long as published.

    Attention is a small part of the second run, so that a few turns settle both.
    """
    seconds = 0.0
    for _ in range(8):
        reached = reached_by_attention(of_attention, seconds)
        seconds = of_optimizer.run.seconds - of_optimizer.figures(reached).seconds
    return reached, seconds


def ring_and_ulysses_percent(cp: int) -> tuple[float, float]:
    """(ring, Ulysses): by how much tokens a second and GPU change from one H200 to `cp` of them, at 64k tokens.

    GLM-4.5-Air, of which only what a step computes is modelled: 46 layers of attention with 96 heads of 128 and 8 for
    keys and values, and products with 12 billion active parameters; each layer made again.
    """
    tokens, layers, active = 65_536, 46, 12e9
    accelerator = ACCELERATORS["h200"]
    link = LINKS[accelerator.links.get("nvlink", "nvlink")]
    problem = Problem(1, 96, 8, tokens, tokens, 128, 128, 2, AttentionMask(causal=True))
    rate = accelerator.attention_flops(2)
    products = 8 * active * tokens / (accelerator.peak(2) * accelerator.reached)

    def step(strategy: Strategy) -> float:
        order = "zigzag" if strategy.outer > 1 else "contiguous"
        attention = cost(problem, strategy, order, link, link, rate).seconds
        ranks = strategy.inner * strategy.outer
        again = layers * cost(problem, Strategy(1, 1), "contiguous", link, link, rate).seconds / 3.5 / ranks
        return layers * attention + again + products / ranks

    alone = step(Strategy(1, 1))
    ring, ulysses = (100 * (alone / cp / step(one) - 1) for one in (Strategy(1, cp), Strategy(cp, 1)))
    return ring, ulysses


RING_AGAINST_ULYSSES = {2: (-29.0, -8.0), 4: (-32.0, 1.0)}  # (ring, Ulysses), prime-rl issue 2418, FlashAttention 3
