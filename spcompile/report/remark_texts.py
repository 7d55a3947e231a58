"""Cause, example and cure of every remark, by code."""

from __future__ import annotations

from spcompile.report.code_text import CodeText

REMARK_TEXTS: dict[str, CodeText] = {
    "SPR101": CodeText(
        "`cp` splits the rows that attention, convolutions or products over the sequence mix. Here is none, "
        "so all ranks "
        "compute all of it.",
        'plan = spcompile.explain(nn.Linear(32, 32), (x,), {"cp": 2})',
        "Entries of the batch are split by `dp`. An attention of a custom op has no meaning to read: use torch's.",
    ),
    "SPR102": CodeText(
        "No rule says how the operation could be computed on a part of its operands.",
        """
        class Bessel(Block):
            def forward(self, x):
                x = super().forward(x)
                return x + torch.special.bessel_j0(x.detach())


        plan = spcompile.explain(Bessel(), (x,), {"cp": 2})
        """,
        "[ops.md](ops.md) lists what has a rule; [add-an-op.md](add-an-op.md) adds one.",
    ),
    "SPR103": CodeText(
        "The operation mixes positions of the sequence, and no other dim could be split meanwhile.",
        """
        class NormOfAll(Block):
            def forward(self, x):
                return F.layer_norm(super().forward(x), (16, 32))


        plan = spcompile.explain(NormOfAll(), (x,), {"cp": 2})
        """,
        "If it need not mix positions, normalise or sort the last dim alone. If it must, this is what it costs: the "
        "collective is a row of the plan.",
    ),
    "SPR104": CodeText(
        "Over `dp` the graph is traced with a symbol for the number of entries. Something in the model wants a number.",
        "SPR104 compiled for 4 entries, since not for a symbol: ...",
        "Nothing is wrong. Batches of other sizes compile again: `drop_last=True`, or sizes that the loader keeps.",
        runs=False,
    ),
    "SPR105": CodeText(
        'Dynamo made several graphs of the model, and `on_graph_break="gather"` allows that.',
        """
        class Branches(Block):
            def forward(self, x):
                x = super().forward(x)
                return x * 2 if x.sum() > 0 else x


        plan = spcompile.explain(Branches(), (x,), {"cp": 2}, on_graph_break="gather")
        """,
        "The remark names the line and what crosses whole. One graph is cheaper: see SP301.",
    ),
    "SPR107": CodeText(
        "Over `dp` no rank has the others' entries, and the operation reads several.",
        """
        class Ranked(Block):
            def forward(self, x):
                return super().forward(x).sort(0).values.square().mean()


        plan = spcompile.explain(Ranked(), (x,), {"dp": 2})
        """,
        "If it is meant, as in a contrastive loss, this is what it costs. If each rank may do with its own "
        "entries, use "
        "DDP over `dp`: [works-with.md](works-with.md).",
    ),
    "SPR108": CodeText(
        "The operation runs along the sequence and over each of another dim's indices alone, so that dim is "
        "split around "
        "it, by an all-to-all on either side.",
        """
        class Sums(Block):
            def forward(self, x):
                return super().forward(x).logcumsumexp(1)


        plan = spcompile.explain(Sums(), (x,), {"cp": 2})
        """,
        "Nothing to do: a gather would cost more.",
    ),
    "SPR109": CodeText(
        "Without attention, the sequence is the rows that linear layers treat alike and other products mix.",
        """
        class Mixer(nn.Module):
            def __init__(self):
                super().__init__()
                self.table, self.channels = nn.Embedding(90, 32), nn.Linear(32, 32)
                self.tokens = nn.Sequential(nn.Linear(16, 12), nn.GELU(), nn.Linear(12, 16))

            def forward(self, ids):
                x = self.table(ids)
                x = x + self.tokens(x.mT).mT
                return x + self.channels(x)


        ids = torch.zeros(2, 16, dtype=torch.int64)
        plan = spcompile.explain(Mixer(), (ids,), {"cp": 2})
        """,
        "Look whether the line is where you would split. If not, give the model to `dp` or `tp`.",
    ),
    "SPR201": CodeText(
        "A mask is no formula of positions, lengths or document ids that kernels could compute: it depends on values. "
        "Its rows are split as the queries are, and its columns are whole.",
        """
        class ByValue(Block):
            def attend(self, q, k, v):
                return F.scaled_dot_product_attention(q, k, v, attn_mask=(q @ k.mT).detach() > 0)


        plan = spcompile.explain(ByValue(), (x,), {"cp": 2})
        """,
        "Build masks from `torch.arange`, lengths and ids: [attention.md](attention.md) says what is read.",
    ),
    "SPR202": CodeText(
        "Attention that is written out does something with its weights that no kernel does. It stays as written, split "
        "by query rows, with keys and values of all ranks.",
        """
        class Sharpened(Block):
            def attend(self, q, k, v):
                weights = (q @ k.mT).softmax(-1)
                return weights.cumsum(-1) @ v


        plan = spcompile.explain(Sharpened(), (x,), {"cp": 2})
        """,
        "`F.scaled_dot_product_attention` and the written-out forms of [attention.md](attention.md) run as rings or "
        "Ulysses.",
    ),
    "SPR203": CodeText(
        "Which way attention is spread, and in which order ranks hold the sequence, was chosen by bytes, "
        "heads and links.",
        'plan = spcompile.explain(model, (x,), {"cp": 2})',
        "Nothing to do. `attention=` and `balance=` ask for another; `links=` says what ranks talk over.",
    ),
    "SPR204": CodeText(
        "The strategy that `attention=` names cannot be: a hybrid of a prime number of ranks, a bias that "
        "all heads share.",
        'plan = spcompile.explain(model, (x,), {"cp": 3}, attention="hybrid")',
        "The remark says which was taken and why. Ask for that one, or for another size of `cp`.",
    ),
    "SPR205": CodeText(
        "Messages of groups of heads travel while others are computed.",
        """
        apart = {"split-all-to-alls": {"groups": 1, "way": "apart"}}
        plan = spcompile.explain(model, (x,), {"cp": 2}, attention="ulysses", passes=apart)
        """,
        'Nothing to do. `passes={"split-all-to-alls": False}` leaves one message each way.',
    ),
    "SPR206": CodeText(
        "The pass was told to use symmetric memory, which is for GPUs that read each other's memory, for rows that "
        "divide by the ranks, and for one product in front of a sum.",
        """
        on = {"pipeline-matmuls": {"symmetric_memory": True, "min_gain": float("-inf")}}
        plan = spcompile.explain(model, (x,), {"tp": 2}, passes=on)
        """,
        "Nothing to do: chunks are sent and multiplied one after the other instead. The remark says what stands in "
        "the way.",
    ),
    "SPR207": CodeText(
        "Scores get a large negative number times one minus an integer mask. With integers other than 0 and "
        "1 that would "
        "be a bias, which cannot be known before the run.",
        """
        class Padded(nn.Module):
            def forward(self, q, keep):
                scores = q @ q.mT + (1 - keep[:, None, None, :]) * torch.finfo(q.dtype).min
                return scores.softmax(-1) @ q


        inputs = (torch.randn(2, 4, 16, 8), torch.ones(2, 16, dtype=torch.int64))
        plan = spcompile.explain(Padded(), inputs, {"cp": 2})
        """,
        "Nothing to do where the mask is of zeros and ones. A bool mask says so itself.",
    ),
    "SPR208": CodeText(
        "The loss of a wide head is computed in chunks without logits, unless something else reads these: "
        "here the model "
        "returns them.",
        """
        class WithHead(Block):
            def __init__(self):
                super().__init__()
                self.head = nn.Linear(32, 4096)

            def forward(self, x, labels):
                logits = self.head(super().forward(x))
                return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits


        labels = torch.zeros(2, 16, dtype=torch.int64)
        plan = spcompile.explain(WithHead(), (x, labels), {"cp": 2})
        """,
        '`outputs="loss"`, or a model that returns the loss alone in training.',
    ),
    "SPR301": CodeText(
        "One query has no rows to split, and the keys of the cache are whole on every rank.",
        """
        class Decoding(nn.Module):
            def forward(self, q, k, v):
                return F.scaled_dot_product_attention(q, k, v)


        q, k, v = torch.randn(1, 4, 1, 8), torch.randn(1, 4, 16, 8), torch.randn(1, 4, 16, 8)
        with torch.no_grad():
            plan = spcompile.explain(Decoding(), (q, k, v), {"cp": 2})
        """,
        "Right, but no faster than one device. `tp` splits heads in decoding, too.",
    ),
    "SPR302": CodeText(
        "Numbers that are drawn must be the ones that one device draws, so every rank draws all of them and takes its "
        "own part.",
        """
        class Noisy(Block):
            def forward(self, x):
                return torch.bernoulli(super().forward(x).sigmoid())


        plan = spcompile.explain(Noisy(), (x,), {"cp": 2})
        """,
        "Draw smaller tensors, or outside of the model. Dropout draws its mask only: see the row of the plan.",
    ),
    "SPR303": CodeText(
        "A mask of attention weights would be as large as the scores. It follows from a seed and the position of each "
        "score, so that it is the same on any number of ranks, but another than one plain device draws.",
        """
        class Dropped(Block):
            def attend(self, q, k, v):
                return F.scaled_dot_product_attention(q, k, v, dropout_p=0.1, is_causal=True)


        plan = spcompile.explain(Dropped(), (x,), {"cp": 2})
        """,
        "Nothing to do. Comparisons with the plain model want `dropout_p=0`.",
    ),
    "SPR401": CodeText(
        "There is one process. Attention and masks are still read, where that saves memory.",
        'plan = spcompile.explain(model, (x,), {"cp": 1})',
        "Nothing to do; `torchrun --nproc-per-node N` starts several.",
    ),
    "SPR402": CodeText(
        "On one device the model runs in any case; what could not be captured keeps its dense masks and scores.",
        "SPR402 attention is not looked for, the graph cannot be captured: SP302 cannot capture: ...",
        "As for the error behind it. On several ranks it would be raised.",
        runs=False,
    ),
    "SPR403": CodeText(
        "Dynamo ran a call as plain code. Over `cp` and `tp` that is right where all ranks do it, but "
        "nothing is split.",
        """
        SPR403 Block ran uncompiled so each rank of cp=2 computes all of it and keeps 2 times the activations:
          Dynamo has made 8 programs of it, and torch._dynamo.config.recompile_limit allows no more
          instead: a greater limit, or fewer kinds of inputs: padded lengths, dynamic=True, tensors for numbers
        """,
        "As the line `instead:` says; `TORCH_LOGS=recompiles` tells what differs between the programs.",
        runs=False,
    ),
    "SPR501": CodeText(
        "`tp` splits hidden features or heads, and the operation reads all of them at once. Where enough runs on rows "
        "of the sequence, an all-to-all makes rows of them; else they are gathered.",
        """
        class Sorted(Block):
            def forward(self, x):
                x = x + self.out(self.attend(*self.heads(x)).transpose(1, 2).flatten(2))
                return x + self.down(self.up(x).sort(-1).values)


        plan = spcompile.explain(Sorted(), (x,), {"tp": 2})
        """,
        "Sort, normalise or draw over the features of the stream, which are whole, in place of those between two "
        "projections.",
    ),
    "SPR502": CodeText(
        "`tp` splits a matrix where its product is split on one side. This one would be gathered at once, so it stays "
        "whole.",
        """
        class Square(Block):
            def __init__(self):
                super().__init__()
                self.between = nn.Linear(64, 64)

            def forward(self, x):
                x = x + self.out(self.attend(*self.heads(x)).transpose(1, 2).flatten(2))
                return x + self.down(F.gelu(self.between(F.gelu(self.up(x)))))


        plan = spcompile.explain(Square(), (x,), {"tp": 2})
        """,
        'Nothing to do. `shard_parameters="tp"` of `parallelize` stores it in parts all the same.',
    ),
    "SPR503": CodeText(
        "Heads, or groups of key and value heads, are no multiple of `tp`.",
        'plan = spcompile.explain(model, (x,), {"tp": 3})',
        "A size of `tp` that divides the heads; the rest of the ranks go to `cp` or `dp`.",
    ),
    "SPR504": CodeText(
        "`parallelize` has split a parameter as one graph reads it. Another graph, or another place of the same, reads "
        "it differently.",
        """
        SPR504 a parameter (64, 32) held as S(1) is gathered: aten.linear.default wants it S(0)
        """,
        "Look at the line: a weight that is used twice, or an example of `parallelize` that is no training step.",
        runs=False,
    ),
    "SPR505": CodeText(
        "Drop-in, `tp` splits the work on weights and not the weights: every rank holds all of them, and all states of "
        "the optimizer.",
        'plan = spcompile.explain(model, (x,), {"tp": 2})',
        "`spcompile.parallelize(model, mesh, inputs)` before the optimizer is made: [parameters.md](parameters.md).",
    ),
    "SPR601": CodeText(
        "The budget is less than a step would take, and making these values again costs least.",
        """
        deep, x = nn.Sequential(*(Block() for _ in range(3))), torch.randn(1, 512, 32)
        plan = spcompile.explain(deep, (x,), {"cp": 2}, memory="min")
        """,
        "Nothing to do. More memory, more ranks or fewer tokens save the seconds that the remark names.",
    ),
    "SPR602": CodeText(
        "Blocks that repeat are made again from the stream between two of them. Without such, only what is made from "
        "values nearby is.",
        'plan = spcompile.explain(model, (x,), {"cp": 2}, memory="min")',
        "Nothing to do for a shallow model. In a deep one, look for what differs between the layers.",
    ),
    "SPR603": CodeText(
        "As SP106, told by `explain`, which goes on to show what takes the memory.",
        'plan = spcompile.explain(nn.Linear(32, 32), (x,), {"cp": 2}, memory=1000)',
        "`plan.answers` says what was tried and fits. Else as SP106.",
    ),
    "SPR604": CodeText(
        "Copies to the host and back hide behind compute, and cost less than making the values again.",
        "SPR604 6.2 GiB wait in the memory of the host for the backward, 49.6 GiB on a node of 8 ranks, 64 values; "
        "0.4 ms of their copies are not hidden by compute",
        "Nothing to do. `host_memory=0` keeps everything on the accelerator, or makes it again.",
        runs=False,
    ),
    "SPR605": CodeText(
        "As SP108, told by `explain`.",
        "SPR605 96 GiB wait in the memory of the host for the backward, 768 GiB on a node of 8 ranks; host_memory "
        "allows 512 GiB",
        "As SP108.",
        runs=False,
    ),
    "SPR606": CodeText(
        "An MLP is wide between two narrow values. In tiles of rows its wide ones never stand whole, in the "
        "forward and "
        "in the backward.",
        "SPR606 32 wide row-wise parts run over 4 tiles of rows: 2.6 GiB of the largest never stand whole, "
        "for 1.1 ms a "
        "step",
        "Nothing to do. The budget `memory=` decides.",
        runs=False,
    ),
    "SPR607": CodeText(
        "Ulysses sends groups of heads in messages of their own. In stages each group is projected when its "
        "attention is about to run, and its gradients go back alone, so that not all heads stand at once.",
        "SPR607 heads run in 4 stages behind 64 products: 768 MiB of the largest never stand whole, for 1.1 ms a step",
        "Nothing to do. The budget `memory=` decides.",
        runs=False,
    ),
}
