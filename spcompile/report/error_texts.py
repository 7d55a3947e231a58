"""Cause, example and cure of every error, by code."""

from __future__ import annotations

from spcompile.report.code_text import CodeText

ERROR_TEXTS: dict[str, CodeText] = {
    "SP101": CodeText(
        "The name of an option is misspelled, or is one of another compiler. Options are checked before anything is "
        "traced.",
        'spcompile.explain(model, (x,), {"cp": 2}, atention="ring")',
        "The error names the nearest option and lists all of them: [options.md](options.md).",
    ),
    "SP102": CodeText(
        "An option has a value outside of those it can have, two settings exclude each other, or a tool around the "
        "model was told to shard as well.",
        'spcompile.explain(model, (x,), {"cp": 2}, attention="rings")',
        "Take one of the values behind `legal:`.",
    ),
    "SP103": CodeText(
        "A mesh has an axis other than `dp`, `tp` and `cp`, a size that is no whole number above 0, or another number "
        "of ranks than were launched.",
        'spcompile.explain(model, (x,), {"sp": 2})',
        "Name the axes as `legal:` does. Their sizes multiply to the number of processes.",
    ),
    "SP104": CodeText(
        "A launcher has started several processes, and a model is called before they know of each other.",
        """
        import os

        os.environ["WORLD_SIZE"] = "2"  # as torchrun does
        torch.compile(model, backend="spcompile")(x)
        """,
        "Call `torch.distributed.init_process_group()` first. With one process, unset `WORLD_SIZE`.",
    ),
    "SP105": CodeText(
        "A model, its config or its checkpoint is missing or damaged, has other tensors than are asked for, or cannot "
        "be used in this way, as one that is parallelized twice.",
        "spcompile.plan(nn.Linear(32, 32), (x,), 2)  # without attention there is no mesh to choose",
        "The text says which file or module was looked at. `legal:` says what is needed in its place.",
    ),
    "SP106": CodeText(
        "With all that may be made again, kept on the host and tiled, one step takes more than the accelerator has, or "
        "than `memory=` allows.",
        """
        options = {"memory": 1000, "compiler": "eager"}
        torch.compile(model, backend="spcompile", options=options)(x)
        """,
        "More ranks on `cp` or `tp`, parameters split by `spcompile.parallelize(..., shard_parameters=...)`, fewer "
        "tokens. `spcompile.explain` shows what is large, and tries what would fit; `spcompile.plan` looks for a mesh.",
    ),
    "SP107": CodeText(
        "A module that `plugins=` or an entry point names cannot be imported, or one of its passes cannot stand where "
        "it is to, or raised.",
        'spcompile.explain(model, (x,), {"cp": 2}, plugins=["my_plugin"])',
        "The error has the plugin's own error behind it. [write-a-pass.md](write-a-pass.md) has a plugin that runs.",
    ),
    "SP108": CodeText(
        "A step fits only where saved values wait in the memory of the host, and all ranks of a node together would "
        "keep more there than it has, or than `host_memory=` allows.",
        """
        SP108 host memory exceeded: 96 GiB wait in the memory of the host for the backward,
          768 GiB on a node of 8 ranks; host_memory allows 512 GiB
          legal: more than 8 ranks on cp or tp, fewer tokens, or host_memory= where the host has more
        """,
        "As for SP106; or `host_memory=` where the node has more than is assumed of the accelerator's.",
        runs=False,
    ),
    "SP201": CodeText(
        "Ranks of `cp` and `tp` are one trainer: they pass the same batch, have the same weights, options "
        "and versions, "
        "and call the same models in the same order. Here they do not; usually a sampler gives each its own batch.",
        """
        SP201 ranks disagree: runs call 1 of graph 0 of Block
          values of input x
            rank 0: checksum 5074861c519b6a69
            rank 1: checksum ff371ef6507ab005
          legal: all ranks of cp and tp pass the same batch; ...
        """,
        "A `DistributedSampler` gets `num_replicas=` the size of `dp` and `rank=` the place on it. "
        "`spcompile.broadcast(model, mesh)` makes weights equal. Random numbers in the data need one seed.",
        runs=False,
    ),
    "SP202": CodeText(
        "A rank waits in a call, or the backward of one, for others that do not come: they ended, still compile, load "
        "data, write a checkpoint, or are at another place of the program.",
        """
        SP202 ranks are missing: rank 1 did not come to call 12 of graph 0 of Block (timeout 600 s)
          rank 0: waits in call 12 of graph 0 of Block, since 14:03:10
          rank 1: is outside of compiled models, since 14:03:09
          all ranks met last: in the backward of call 11 of graph 0 of Block, at 14:03:09
        """,
        "The text says where each rank is: look there. A longer `timeout=` of `init_process_group` where one is just "
        "slow. Afterwards the process group is of no more use.",
        runs=False,
    ),
    "SP203": CodeText(
        "Collectives are matched by their order, which two threads would mix.",
        """
        SP203 called from two threads: thread 'Thread-1' runs call 3 of graph 0 of Block,
          while thread 'MainThread' runs call 2 of graph 0 of Block
          legal: calls of compiled models, and backwards of them, from one thread at a time
        """,
        "Call compiled models, and backwards of them, from one thread, or behind a lock that all ranks take "
        "in the same "
        "order.",
        runs=False,
    ),
    "SP204": CodeText(
        "A worker of a data loader, or another child made by fork, calls the model: sockets and streams of its parent "
        "are not its own.",
        """
        SP204 called in a forked process: process 4711, a child of rank process 4242, runs call 1 of graph 0 of Block
          legal: compiled models are called in the process that called init_process_group; ...
        """,
        "Compute with the plain model in workers, or start children by spawn, with a process group of their own.",
        runs=False,
    ),
    "SP301": CodeText(
        "Dynamo could not follow the forward as one graph: a branch on the value of a tensor, `.item()`, a "
        "call that it "
        "does not know.",
        """
        class Branches(Block):
            def forward(self, x):
                x = super().forward(x)
                return x * 2 if x.sum() > 0 else x


        spcompile.explain(Branches(), (x,), {"cp": 2})
        """,
        "The error names the line and Dynamo's reason: write it with tensors, as `torch.where`. "
        '`on_graph_break="gather"` shards each graph on its own, and says what crosses whole.',
    ),
    "SP302": CodeText(
        "A part of the graph cannot be written as a pure graph of ATen operations; often a "
        "`torch.autograd.Function` whose backward is not linear in gradients, so that it is no derivative of anything.",
        """
        class Clipped(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x * 2

            @staticmethod
            def backward(ctx, gradient):
                return gradient.clamp(-1, 1)


        class Odd(Block):
            def forward(self, x):
                return Clipped.apply(super().forward(x))


        spcompile.explain(Odd(), (x,), {"cp": 2})
        """,
        "Write the function in operations whose gradient autograd knows. Gradients are clipped behind the backward.",
    ),
    "SP303": CodeText(
        "A `score_mod` or `mask_mod` of FlexAttention computes what is no mask, bias, softcap or scale that a shard "
        "could compute for itself.",
        """
        from torch.nn.attention.flex_attention import flex_attention


        class Squares(Block):
            def heads(self, x):
                return self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)

            def attend(self, q, k, v):
                return flex_attention(q, k, v, score_mod=lambda score, b, h, query, key: score * score)


        with torch.no_grad():  # torch has no backward of it on CPU
            spcompile.explain(Squares(), (x,), {"cp": 2})
        """,
        "[attention.md](attention.md) lists what is read. What is not can be written out with a softmax: it is then "
        "split by query rows, from gathered keys.",
    ),
    "SP304": CodeText(
        "Over `dp` every rank passes its own entries of the batch, and gets its own entries of each output. "
        "Here a rank's "
        "own cannot be told, as in an output that is sorted over the batch.",
        """
        class Ranked(Block):
            def forward(self, x):
                return super().forward(x).sort(0).values


        spcompile.explain(Ranked(), (x,), {"dp": 2})
        """,
        "Return what has entries, or a scalar. Else use a mesh without `dp`, and DDP: [works-with.md](works-with.md).",
    ),
    "SP305": CodeText(
        "Dynamo ran a call as plain code: its limit of recompilations, `torch.compiler.disable` or `set_stance`. Over "
        "`dp` plain code takes one rank's part of the batch for all of it.",
        """
        SP305 ran uncompiled: Block on dp=2, as if a rank's part of the batch were all of it: Dynamo has made 8 programs
          of it, and torch._dynamo.config.recompile_limit allows no more
          legal: a greater limit, or fewer kinds of inputs: padded lengths, dynamic=True, tensors for numbers
        """,
        "As `legal:` says; `TORCH_LOGS=recompiles` tells what differs between the programs.",
        runs=False,
    ),
    "SP401": CodeText(
        "`strict=True` asks for an error where work or memory is not split, and this remark tells of such a place.",
        """
        class Sampled(Block):
            def forward(self, x):
                return torch.bernoulli(super().forward(x).sigmoid())


        spcompile.explain(Sampled(), (x,), {"cp": 2}, strict=True)
        """,
        "The code of the remark is in the text: its cure is below. Without `strict` it is a line in the log.",
    ),
    "SP402": CodeText(
        '`outputs="loss"` computes the loss alone, so that logits need not be gathered; something else of the result '
        "was read.",
        """
        SP402 output not computed: this output was read by argmax, but outputs="loss" computes scalars only
          legal: outputs="full" or "sharded"
        """,
        'Read only the loss, or set `outputs="full"`, or `"sharded"` for each rank\'s own rows.',
        runs=False,
    ),
    "SP403": CodeText(
        "The mask in a buffer was read when the model was compiled, and has become a formula in the kernel. Later "
        "something wrote other values to the buffer.",
        """
        class Buffered(nn.Module):
            def __init__(self):
                super().__init__()
                self.keep = nn.Buffer(torch.ones(1, 1, 16, 16, dtype=torch.bool).tril())

            def forward(self, q, k, v):
                lowest = torch.finfo(q.dtype).min
                return torch.where(self.keep, q @ k.mT, lowest).softmax(-1) @ v


        model, q = Buffered(), torch.randn(1, 2, 16, 8)
        compiled = torch.compile(model, backend="spcompile", options={"compiler": "eager"})
        compiled(q, q, q)
        model.keep[..., 5, 3] = False
        compiled(q, q, q)
        """,
        "`torch.compiler.reset()` compiles anew. A mask that changes with the batch is an input of the model.",
    ),
    "SP901": CodeText(
        "A pass left a graph that breaks a law: a shape that is not what the operation gives, a gradient that is "
        "missing a sum. It is a bug of spcompile, or of a pass of a plugin.",
        """
        SP901 invalid graph: after pass my-pass: mul: aten.mul.Tensor gives f32[3], the graph says f32[99]
        """,
        "`passes={name: False}` leaves the pass out, `dump=` writes the graph before and after. Please report it with "
        "both.",
        runs=False,
    ),
}
