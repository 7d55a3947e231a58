"""What `node.meta` holds: every key that this package writes or reads, and what its value is.

A test finds the keys in the sources and compares them with these tables. docs/node-meta.md lists who writes and who
reads each. Keys of CUSTOM live one level deeper, in `meta["custom"]`, which torch carries through its own traces.
"""

from __future__ import annotations

from collections.abc import Mapping

META: Mapping[str, str] = {
    "val": "torch's: the example value, a fake tensor or a symbolic number; of several results a tuple",
    "example_value": "Dynamo's: the same, in the graph that Dynamo gives",
    "grapharg": "Dynamo's, of a placeholder: where the input comes from, and the tensor itself",
    "stack_trace": "torch's: the user's lines; where it is missing `spx_origin` must stand",
    "nn_module_stack": "torch's: the modules around a call",
    "fwd_nn_module_stack": "autograd's, of backward nodes: `nn_module_stack` of the forward node",
    "from_node": "torch's: the nodes of earlier graphs that this one was traced from",
    "recompute": "torch's: the tag of a checkpointed region, which the partitioner obeys",
    "ac_graph_id": "torch's: which checkpointed region a node is in",
    "custom": "torch's: marks that survive tracing; the keys below",
    "spx_origin": "what made a node that has no line of the user's",
    "trainable": "of a placeholder: it requires a gradient",
    "state": "of a placeholder: a parameter or buffer of the model, no input of the call",
    "module_buffer": "of a placeholder: the buffer whose values may be read when the model is compiled",
    "layout": "GLOBAL graphs: the spaces of a value's dims, the call's choice, the places on each axis",
    "sharding": "axis -> state, as text for printing",
    "parts": "of a placeholder: axis -> S where each rank has its own part",
    "axis": "of a bound collective: the mesh axis in whose place a process group's name stands",
    "verified": "the call that the verifier checked last, so that it is not checked again unchanged",
    "spx_place": "SCHEDULE graphs: a node's place in autograd's order",
    "spx_tiles": "of the output of a SCHEDULE graph: into how many tiles of rows the plan of memory cuts wide parts",
    "spx_tile": "of rows that tile-rows cut out of a value",
    "part": "of the output of a Dynamo graph: which part it is of a model that is not one graph",
    "own": "dp, of an input with entries of the batch: its example value on one rank; of the output: the shapes there",
}

CUSTOM: Mapping[str, str] = {
    "spx_flex_attention": "a node of a FlexAttention call that was written out",
    "spx_no_change": "x - x.detach(), with which a custom function has its own gradient; dropped behind autograd",
    "spx_seen_by_autograd": "captured graphs: a node among calls without gradients that has its own all the same",
    "spx_unread_attention": "of a softmax of an attention that stays written out: the dim of its query rows",
    "spx_scores": "the same where it may be no attention",
    "spx_rows_without_keys": "an attention whose documents are the rows without keys, and all others",
    "spx_averages_rows_of_one_number": "an attention whose rows without keys are dealt with",
    "spx_made": "a node that large numbers of a mask were told apart by: remarks are about the mask itself",
    "spx_attention": "the strategy that choose-attention chose",
    "spx_bias_rows": "whether the bias of an attention has query rows",
    "spx_own_part": "LOCAL graphs: axes on which each rank makes its own part of a value from what all ranks hold",
}
