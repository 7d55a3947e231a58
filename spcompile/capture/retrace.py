"""From the Dynamo graph to the GLOBAL stage: a pure, single-device graph of pre-dispatch ATen ops.

Re-tracing before dispatch keeps `linear`, `layer_norm`, `scaled_dot_product_attention` and `cross_entropy_loss` one
node each, with the user's source line. Mutations are functionalised, so every later pass may assume a pure graph.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from spcompile.capture.autocast import ENTER, EXIT, Regions, autocast_off, cast, make_explicit, without_cache
from spcompile.capture.bool_writes import write_out_bool_writes
from spcompile.capture.custom_functions import APPLY, OwnGradients, own_gradients_of, with_own_gradient
from spcompile.capture.flex_attention import without_block_sizes, written_out
from spcompile.capture.func_transforms import without_levels
from spcompile.capture.gradient_hooks import hooks_as_functions
from spcompile.capture.module_buffer import KEY, ModuleBuffer, may_be_read
from spcompile.capture.module_moves import is_list_of_numbers, set_to_itself
from spcompile.capture.plain_forms import write_in_plain_forms
from spcompile.capture.quiet_writes import SEEN, QuietWrites, settle_kept_gradients
from spcompile.diagnostics import CaptureFailed, source_of
from spcompile.graph.dtypes import takes_gradient
from spcompile.graph.sizes import same_shape
from spcompile.torch_private import FunctionalTensor, TracingContext, detect_fake_mode, read_data

aten = torch.ops.aten

OWN = "own"  # meta of an input with the batch: its example value on one rank; of the output: the shapes there
# Views that ask for strides become reshapes: later passes may change strides, never meaning.
_RESHAPES = (aten.view.default, aten._unsafe_view.default)
_NO_MEANING = (aten._assert_tensor_metadata.default, aten.alias.default)


class _KeepOrigin(fx.Interpreter):
    """Runs a Dynamo graph so that traced nodes inherit stack_trace and nn_module_stack.

    Opens checkpointed regions and custom autograd functions, writes FlexAttention out, and switches autocast.
    """

    def __init__(self, gm: fx.GraphModule, counter: list[int], own_gradients: OwnGradients) -> None:
        super().__init__(gm)
        self._regions = counter
        self._own_gradients = own_gradients
        self._autocast = Regions()
        self.at: fx.Node | None = None

    def run(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().run(*args, **kwargs)
        finally:
            self._autocast.close()

    def run_node(self, n: fx.Node) -> Any:
        self.at = n
        kept = set_to_itself(n)
        return super().run_node(n) if kept is None else self.env[kept]

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is torch.ops.higher_order.tag_activation_checkpoint:
            return self._checkpointed(args)
        if target is APPLY:
            forward, backward, *operands = args
            outputs, saved = _KeepOrigin(forward, self._regions, self._own_gradients).run(*operands)
            return with_own_gradient(operands, outputs, saved, self._own_gradients[backward])
        if target is torch.ops.higher_order.flex_attention:
            q, k, v, *rest = args
            q, k, v = cast(q), cast(k), cast(v)  # as autocast does, and then leaves the inside of the call alone
            with autocast_off():
                return written_out(q, k, v, *rest, **kwargs)
        if target is ENTER:
            return self._autocast.enter(*args)
        if target is EXIT:
            return self._autocast.exit(*args)
        if target is read_data:
            return args[0].detach()  # which a trace sees
        if target is torch.nn.functional.dropout:
            return _dropout(*args, **kwargs)
        if target is torch.Tensor and is_list_of_numbers(args):
            return torch.tensor(args[0], dtype=torch.get_default_dtype())
        return super().call_function(target, args, kwargs)

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target == "fill_diagonal_" and args[0].ndim == 2:
            return _fill_diagonal(*args, **kwargs)
        return super().call_method(target, args, kwargs)

    def _checkpointed(self, args: tuple[Any, ...]) -> Any:
        """Inline the child graph of torch.utils.checkpoint; its nodes carry the tags the partitioner reads."""
        child, *operands = args
        self._regions[0] += 1
        for node in child.graph.nodes:
            node.meta["recompute"] = torch.utils.checkpoint.CheckpointPolicy.PREFER_RECOMPUTE
            node.meta["ac_graph_id"] = self._regions[0]
        return _KeepOrigin(child, self._regions, self._own_gradients).run(*operands)


def _fill_diagonal(x: torch.Tensor, fill_value: float, wrap: bool = False) -> torch.Tensor:
    """X [A, B] with its diagonal overwritten: as a view of x, where torch takes strides."""
    if wrap and x.shape[0] > x.shape[1] + 1:
        return x.fill_diagonal_(fill_value, wrap)
    x.diagonal().fill_(fill_value)
    return x


def _dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """Dropout whose result may be written to, as the plain one's: it is its operand where nothing is dropped.

    Functionalisation for export refuses writes to results of dropout, since it does not know whether that is so.
    """
    if not training or p == 0:
        return x
    dropped = torch.nn.functional.dropout(x, p, training, inplace)
    return dropped if inplace else dropped.clone()


def capture(gm: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
    """Trace `gm` on the fakes of `inputs`.

    Returns a GraphModule with the same placeholders, in order and by name, whose nodes all have `meta["val"]`.

    Raises:
        CaptureFailed: an op cannot be traced; names the user's line.
    """

    def run(*args: Any) -> Any:
        with QuietWrites():
            wrapped = [FunctionalTensor.to_functional(a) if isinstance(a, torch.Tensor) else a for a in args]
            interpreter = _KeepOrigin(without_block_sizes(gm), [0], own_gradients)
            try:
                outputs = interpreter.run(*wrapped)
            except RuntimeError as error:
                is_of_data = isinstance(error, torch._subclasses.fake_tensor.DataDependentOutputException)
                if not is_of_data and type(error) is not RuntimeError:  # Dynamo's own may ask for another trace
                    raise
                where = source_of(interpreter.at) if interpreter.at is not None else None
                raise CaptureFailed(str(error).partition("While executing")[0].strip(), where=where) from error
            outputs = pytree.tree_map_only(FunctionalTensor, _unwrap, outputs)
            mutated = [_unwrap(w) if isinstance(w, FunctionalTensor) else w for w in wrapped]
        for given, new in zip(args, mutated, strict=True):
            if isinstance(given, torch.Tensor) and new is not given:
                with torch.no_grad() if given.requires_grad and given.is_leaf else nullcontext():
                    given.copy_(new)  # without a gradient, as a model can write to a parameter's data alone
        return outputs

    fake_mode, fakes = fake_inputs(inputs)
    gm = hooks_as_functions(without_levels(gm, fake_mode))
    own_gradients = own_gradients_of(gm, fake_mode)
    with fake_mode, without_cache(), fx.traceback.preserve_node_meta():
        captured = make_fx(run, pre_dispatch=True)(*fakes)
    _name_placeholders(captured, gm, inputs)
    make_explicit(captured)
    write_out_bool_writes(captured)
    write_in_plain_forms(captured)
    normalise(captured)
    _read_before_writing(captured.graph)
    settle_kept_gradients(captured.graph)
    for node in captured.graph.nodes:
        if node.op == "call_function" and not node.meta.get("stack_trace"):
            node.meta["spx_origin"] = "capture"  # code that was made by exec has no lines
    return captured


def fake_inputs(inputs: Sequence[Any]) -> tuple[Any, list[Any]]:
    """(fake mode, inputs as fakes of it): Dynamo's own mode and symbols inside a compile, else a new static one.

    Dynamo hands a backend real parameters and real inputs; which of their sizes are symbols is in its tracing context.
    """
    context = TracingContext.try_get()
    mode = context.fake_mode if context is not None else detect_fake_mode(list(inputs))
    mode = mode or FakeTensorMode()

    def convert(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or (isinstance(value, FakeTensor) and value.fake_mode is mode):
            return value
        symbolic = context.tensor_to_context.get(value) if context is not None else None
        if symbolic is None:
            return mode.from_tensor(value, static_shapes=True)
        return mode.from_tensor(value, symbolic_context=symbolic, source=symbolic.tensor_source, trace=False)

    with mode:
        return mode, [convert(value) for value in inputs]


def _unwrap(tensor: Any) -> Any:
    torch._sync(tensor)
    return torch._from_functional_tensor(tensor.elem)


def _name_placeholders(captured: fx.GraphModule, original: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Give the placeholders the names Dynamo chose, and note which are trainable and which are state."""
    names = [n for n in original.graph.nodes if n.op == "placeholder"]
    nodes = [n for n in captured.graph.nodes if n.op == "placeholder"]
    written = {n.args[0] for n in captured.graph.find_nodes(op="call_function", target=aten.copy_.default)}
    for node, source, given in zip(nodes, names, inputs, strict=True):
        node.meta["trainable"] = isinstance(given, torch.Tensor) and given.requires_grad
        node.meta["state"] = is_state(source)
        if node.meta["state"] and may_be_read(given) and node not in written:
            node.meta[KEY] = ModuleBuffer(weakref.ref(given))
        node._rename(source.name)
        node.target = node.name
        for key in ("grapharg", "tensor_dict", OWN):
            if key in source.meta:
                node.meta[key] = source.meta[key]
    ends = [next(iter(graph.find_nodes(op="output"))) for graph in (original.graph, captured.graph)]
    ends[1].meta |= {key: ends[0].meta[key] for key in (OWN,) if key in ends[0].meta}


def is_state(placeholder: fx.Node) -> bool:
    """Whether Dynamo read this input from a module: what a caller passes may be another at every call."""
    source = getattr(placeholder.meta.get("grapharg"), "source", None)
    kind = getattr(source, "guard_source", None)
    return kind is not None and (kind.is_unspecialized_nn_module() or kind.is_specialized_nn_module())


def normalise(gm: fx.GraphModule) -> None:
    """Remove nodes without meaning, turn views into reshapes and grad-mode switches into detach."""
    graph = gm.graph
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is aten.lift_fresh_copy.default:
            _fold_constant(gm, node)
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _RESHAPES:
            node.target = aten.reshape.default
        elif node.target is aten.copy.default and not _is_output(node):
            _replace_copy(node)
        elif node.target is aten.broadcast_tensors.default:
            _broadcast_one_by_one(node)
        elif node.target is aten.type_as.default:
            node.target, node.args = aten.to.dtype, (node.args[0], node.meta["val"].dtype)
        elif node.target in _NO_MEANING or (node.target is aten.clone.default and not _is_needed(node)):
            if node.args and node.users:
                node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    _detach_no_grad_regions(graph)
    graph.eliminate_dead_code()
    gm.recompile()


def _fold_constant(gm: fx.GraphModule, node: fx.Node) -> None:
    """`torch.tensor(8)` and `torch.tensor([])` in a forward become `full`, so that readers see the number."""
    source = node.args[0]
    value = getattr(gm, str(source.target)) if isinstance(source, fx.Node) and source.op == "get_attr" else None
    if not isinstance(value, torch.Tensor) or value.numel() > 1:
        return
    number = value.item() if value.numel() == 1 else 0
    with gm.graph.inserting_before(node):
        full = gm.graph.call_function(
            aten.full.default, (list(value.shape), number), {"dtype": value.dtype, "device": value.device}
        )
    full.meta = dict(node.meta)
    node.replace_all_uses_with(full)
    gm.graph.erase_node(node)


def _replace_copy(node: fx.Node) -> None:
    """copy(x, y), what is left of `x.copy_(y)`, is y in the shape and dtype of x. As it stands it has no derivative.

    In this order, as autograd has it: the gradient of what was repeated is added up in y's dtype.
    """
    target, value = node.args[:2]
    assert isinstance(value, fx.Node)
    with node.graph.inserting_before(node):
        if not same_shape(value.meta["val"], node.meta["val"]):
            example = node.meta["val"].to(value.meta["val"].dtype)
            value = node.graph.call_function(aten.expand_as.default, (value, target))
            value.meta = {**node.meta, "val": example}
        if value.meta["val"].dtype != node.meta["val"].dtype:
            value = node.graph.call_function(aten.to.dtype, (value, node.meta["val"].dtype))
            value.meta = dict(node.meta)
    node.replace_all_uses_with(value)
    node.graph.erase_node(node)


def _broadcast_one_by_one(node: fx.Node) -> None:
    """Losses call broadcast_tensors on what is equally large for the most part: such an operand is its own result."""
    operands: Any = node.args[0]
    for user in list(node.users):
        value = operands[user.args[1]]
        largest = next((x for x in operands if same_shape(x.meta["val"], user.meta["val"])), None)
        if largest is None:
            continue
        if not same_shape(value.meta["val"], user.meta["val"]):
            with node.graph.inserting_before(user):
                value = node.graph.call_function(aten.expand_as.default, (value, largest))
            value.meta = dict(user.meta)
        user.replace_all_uses_with(value)
        node.graph.erase_node(user)
    if not node.users:
        node.graph.erase_node(node)


def _read_before_writing(graph: fx.Graph) -> None:
    """Give the readers of an input that is written to at the end a copy: what autograd saved must not change.

    So are the statistics of a batch norm, which its kernel saves before it writes them itself.
    """
    written = [n.args[0] for n in graph.find_nodes(op="call_function", target=aten.copy_.default)]
    first = next(n for n in graph.nodes if n.op != "placeholder")
    for value in written:
        readers = [user for user in value.users if user.target is not aten.copy_.default]
        if readers and takes_gradient(value.meta["val"]):
            with graph.inserting_before(first):
                copy = graph.call_function(aten.clone.default, (value,))
            copy.meta = {**readers[0].meta, "val": value.meta["val"]}
            for reader in readers:
                reader.replace_input_with(value, copy)


def _is_needed(clone: fx.Node) -> bool:
    """Whether a copy keeps an output from being another value's memory; what dropout gives is nobody else's."""
    source = clone.args[0]
    return _is_output(clone) and not (isinstance(source, fx.Node) and source.target is aten.dropout.default)


def _is_output(node: fx.Node) -> bool:
    return any(user.op == "output" for user in node.users)


def _detach_no_grad_regions(graph: fx.Graph) -> None:
    """Replace `_set_grad_enabled` switches by a detach on every value that leaves a no_grad region.

    Without the switches a pass may insert a node anywhere without losing its gradient.
    """
    enabled, region = True, dict[fx.Node, None]()  # in order: names of new nodes are alike on every rank
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is torch._C._set_grad_enabled:
            enabled = bool(node.args[0])
            graph.erase_node(node)
        elif node.op == "call_function" and not enabled and SEEN not in node.meta.get("custom", {}):
            region[node] = None
    for node in region:
        value = node.meta.get("val")
        outside = [user for user in node.users if user not in region]
        if not outside or not takes_gradient(value):
            continue
        with graph.inserting_after(node):
            detached = graph.call_function(aten.detach.default, (node,))
        detached.meta = {**node.meta}
        for user in outside:
            user.replace_input_with(node, detached)
