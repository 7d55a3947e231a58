"""The passes. PIPELINE is the one place where their order is written."""

from __future__ import annotations

from spcompile.passes.meaning.recognize_attention import RecognizeAttention
from spcompile.passes.meaning.recognize_likelihood import RecognizeLikelihood
from spcompile.passes.meaning.recognize_linear_loss import RecognizeLinearLoss
from spcompile.passes.meaning.recognize_loss import RecognizeLoss
from spcompile.passes.meaning.recognize_mask import RecognizeMask
from spcompile.passes.meaning.recognize_softmax import RecognizeSoftmax
from spcompile.passes.meaning.split_dropout import SplitDropout
from spcompile.passes.meaning.split_transforms import SplitTransforms
from spcompile.passes.meaning.widen_sums import WidenSums
from spcompile.passes.placement.annotate_sharding import AnnotateSharding
from spcompile.passes.placement.cancel_collectives import CancelCollectives
from spcompile.passes.placement.choose_attention import ChooseAttention
from spcompile.passes.placement.hoist_shard import HoistShard
from spcompile.passes.placement.insert_reshards import InsertReshards
from spcompile.passes.placement.lower import LowerToLocal
from spcompile.passes.placement.parallelize_attention import ParallelizeAttention
from spcompile.passes.placement.share_tile_tables import ShareTileTables
from spcompile.passes.placement.sink_all_gather import SinkAllGather
from spcompile.passes.placement.sink_all_reduce import SinkAllReduce
from spcompile.passes.placement.split_all_gather import SplitAllGather
from spcompile.passes.placement.split_all_reduce import SplitAllReduce
from spcompile.passes.placement.split_all_to_alls import SplitAllToAlls
from spcompile.passes.placement.split_projections import SplitProjections
from spcompile.passes.schedule.bucket_collectives import BucketCollectives
from spcompile.passes.schedule.lower_collectives import LowerCollectives
from spcompile.passes.schedule.overlap_collectives import OverlapCollectives
from spcompile.passes.schedule.pipeline_matmuls import PipelineMatmuls
from spcompile.passes.schedule.place_host_copies import PlaceHostCopies
from spcompile.passes.schedule.tile_rows import TileRows
from spcompile.passes_api import Pass

PIPELINE: tuple[Pass, ...] = (
    # GLOBAL stage: what the graph means.
    RecognizeSoftmax(),  # first: attention is found around a softmax
    RecognizeAttention(),  # all else depends on knowing where attention is
    RecognizeMask(),  # reads the dense masks that recognize-attention left as biases
    RecognizeLikelihood(),  # makes cross entropies for recognize-loss
    RecognizeLoss(),  # means over tokens must be sums and counts before tokens are split
    WidenSums(),  # what recognize-loss left, and sums that were written by hand
    RecognizeLinearLoss(),  # the losses that these three left, with sums in float32
    SplitDropout(),  # behind recognize-attention, which looks for the dropout of eager attention
    SplitTransforms(),  # anywhere before placement
    # Axis dp: entries of the batch, of which each rank has its own.
    AnnotateSharding("dp"),  # reads what the losses sum over
    InsertReshards("dp"),  # losses and gradients of weights are summed
    LowerToLocal("dp"),  # shapes change: one rank's entries
    # Axis cp: the sequence.
    ChooseAttention(),  # reads masks and head counts; the order of the sequence follows from it
    AnnotateSharding("cp"),  # on the final global ops, since it holds their factors
    InsertReshards("cp"),  # decides with the whole graph annotated
    LowerToLocal("cp"),  # shapes change: one rank of cp, the whole of tp
    # The same once more for tp, on what cp left.
    SplitProjections(),  # a fused projection has one factor where its parts have heads
    AnnotateSharding("tp"),  # on the final products
    InsertReshards("tp"),  # Megatron without sequence parallelism: AllReduces
    SinkAllReduce(),  # while a sum's completion is one node
    SplitAllReduce(),  # makes AllGathers that can move
    SinkAllGather(),  # down, as far as the sequence passes
    SplitAllGather(),  # what passes no further as it is split may pass as it could be
    HoistShard(),  # up, from where sunk gathers met whole operands
    CancelCollectives(),  # when all have moved
    LowerToLocal("tp"),  # shapes change: one rank
    # LOCAL stage: one rank's graph.
    SplitAllToAlls(),  # needs to see what leads to q, to k and to v, and what they are to become
    ParallelizeAttention(),  # the rest, while gathers of keys and values still stand beside their attention
    ShareTileTables(),  # when it is settled which attention runs where
    # SCHEDULE stage: forward and backward graphs after autograd.
    TileRows(),  # while products read what they read in the joint graph
    BucketCollectives(),  # while an all-reduce is still one node
    PipelineMatmuls(),  # while a gather or a scatter is still one node; gathers of parameters are in buckets
    LowerCollectives(),  # Inductor sees only functional collectives
    OverlapCollectives(),  # nothing may change the order that it finds
    PlaceHostCopies(),  # puts copies into that order
)
