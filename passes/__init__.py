"""The passes. PIPELINE is the one place where their order is written."""

from __future__ import annotations

from spcompile.passes.annotate_sharding import AnnotateSharding
from spcompile.passes.bucket_collectives import BucketCollectives
from spcompile.passes.choose_attention import ChooseAttention
from spcompile.passes.insert_reshards import InsertReshards
from spcompile.passes.lower import LowerToLocal
from spcompile.passes.lower_collectives import LowerCollectives
from spcompile.passes.parallelize_attention import ParallelizeAttention
from spcompile.passes.recognize_attention import RecognizeAttention
from spcompile.passes.recognize_loss import RecognizeLoss
from spcompile.passes.recognize_mask import RecognizeMask
from spcompile.passes.split_dropout import SplitDropout
from spcompile.passes_api import Pass

PIPELINE: tuple[Pass, ...] = (
    # GLOBAL stage: what the graph means.
    RecognizeAttention(),  # first: all else depends on knowing where attention is
    RecognizeMask(),  # reads the dense masks that recognize-attention left as biases
    RecognizeLoss(),  # means over tokens must be sums and counts before tokens are split
    SplitDropout(),  # behind recognize-attention, which looks for the dropout of eager attention
    ChooseAttention(),  # reads masks and head counts; the order of the sequence follows from it
    AnnotateSharding(),  # on the final global ops, since it holds their factors
    InsertReshards(),  # decides with the whole graph annotated
    LowerToLocal(),  # the only change of shapes
    # LOCAL stage: one rank's graph.
    ParallelizeAttention(),  # while gathers of keys and values still stand beside their attention
    # SCHEDULE stage: forward and backward graphs after autograd.
    BucketCollectives(),  # while an all-reduce is still one node
    LowerCollectives(),  # last: Inductor sees only functional collectives
)
