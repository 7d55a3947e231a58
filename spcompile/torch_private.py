"""Private names of torch, each with the version it was read from.

Those of process groups are in torch_private_groups.py, those of torch.func in torch_private_func.py. No other file
imports private names.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
import torch.distributed._functional_collectives  # torch 2.13: Meta kernels of torch.ops._c10d_functional
import torch.distributed._symmetric_memory  # torch 2.13: torch.ops.symm_mem

# torch 2.13: torch/_dispatch/python.py
from torch._dispatch.python import no_python_dispatcher

# torch 2.13: torch/_dynamo/eval_frame.py. What torch.compile returns is made here.
from torch._dynamo import eval_frame

# torch 2.13: torch/_functorch/aot_autograd.py, partitioners.py; torch/_dynamo/backends/common.py
from torch._dynamo.backends.common import aot_autograd

# torch 2.13: torch/_dynamo/convert_frame.py. Where Dynamo is entered from a frame.
from torch._dynamo.convert_frame import CatchErrorsWrapper

# torch 2.13: torch/_dynamo/eval_frame.py. The programs that Dynamo keeps for code.
from torch._dynamo.eval_frame import _debug_get_cache_entry_list

# torch 2.13: torch/_dynamo/exc.py. Asks Dynamo to trace again, as with numbers in place of symbolic floats.
# And ends a graph.
from torch._dynamo.exc import RestartAnalysis, TensorifyScalarRestartAnalysis, unimplemented

# torch 2.13: torch/_dynamo/symbolic_convert.py. What traces a frame, and which floats are to be numbers in it.
from torch._dynamo.symbolic_convert import InstructionTranslator, TensorifyState

# torch 2.13: torch/_dynamo/variables. What Dynamo makes of a logger, of a constant, and of a tensor.
from torch._dynamo.variables.constant import ConstantVariable
from torch._dynamo.variables.misc import LoggingLoggerVariable
from torch._dynamo.variables.tensor import TensorVariable

# torch 2.13: torch/_dynamo/variables/torch_function.py. Where Dynamo keeps function modes while it compiles a frame.
from torch._dynamo.variables.torch_function import torch_function_mode_stack_state_mgr

# torch 2.13: torch/_functorch/_aot_autograd/autograd_cache.py, schemas.py. Its key of a graph, and its results.
# graph_compile.py: what it writes of graphs for its logs.
from torch._functorch._aot_autograd import autograd_cache, graph_compile
from torch._functorch._aot_autograd.schemas import AOTConfig
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition

# torch 2.13: torch/_guards.py. The context that Dynamo holds while a backend runs.
from torch._guards import TracingContext, detect_fake_mode

# torch 2.13: torch/_inductor/custom_graph_pass.py
from torch._inductor.custom_graph_pass import CustomGraphPass, CustomPartitionerFn, get_hash_for_files

# torch 2.13: torch/_inductor/decomposition.py. What compile_fx hands to AOTAutograd.
from torch._inductor.decomposition import select_decomp_table as inductor_decompositions

# torch 2.13: torch/_inductor/fx_passes/control_dependencies.py
from torch._inductor.fx_passes.control_dependencies import preserve_node_ordering

# torch 2.13: torch/_inductor/runtime/cache_dir_utils.py
from torch._inductor.runtime.cache_dir_utils import cache_dir as inductor_cache_dir

# torch 2.13: torch/_logging/_internal.py. Where TORCH_TRACE goes.
from torch._logging._internal import trace_log, trace_structured

# torch 2.13: torch/_subclasses/fake_tensor.py
from torch._subclasses.fake_tensor import unset_fake_temporarily

# torch 2.13: torch/_subclasses/functional_tensor.py
from torch._subclasses.functional_tensor import (
    FunctionalTensor,
    FunctionalTensorMode,
    disable_functional_mode,
)

# torch 2.13: torch/fx/_lazy_graph_module.py
from torch.fx._lazy_graph_module import _LazyGraphModule as LazyGraphModule

# torch 2.13: torch/nn/modules/transformer.py. What nn.TransformerEncoder asks of its mask.
from torch.nn.modules.transformer import _detect_is_causal_mask as detect_is_causal_mask
from torch.utils._ordered_set import OrderedSet  # torch 2.13
from torch.utils._python_dispatch import _disable_current_modes as disable_modes  # torch 2.13

if TYPE_CHECKING:
    import torch.fx as fx

fused_all_gather_matmul = torch.ops.symm_mem.fused_all_gather_matmul
fused_matmul_reduce_scatter = torch.ops.symm_mem.fused_matmul_reduce_scatter
# torch 2.13: torch/csrc/autograd/init.cpp. What Dynamo writes for `x.data`.
read_data: Callable[..., Any] = torch._C._autograd._get_data_attr  # type: ignore[attr-defined]

RESUMED = "torch_dynamo_resume_in_"  # the functions that Dynamo makes of what is behind a graph break
NODES_ABOVE = 16  # views and conversions between an output and the compiled node that made it are fewer

__all__ = [
    "RESUMED",
    "CompiledCall",
    "ConstantVariable",
    "CustomGraphPass",
    "CustomPartitionerFn",
    "FunctionalTensor",
    "FunctionalTensorMode",
    "LazyGraphModule",
    "LoggingLoggerVariable",
    "OrderedSet",
    "RestartAnalysis",
    "TensorVariable",
    "TensorifyState",
    "TracingContext",
    "aot_autograd",
    "around_backward",
    "autograd_cache_key",
    "autograd_result",
    "compile_fx",
    "compile_fx_inner",
    "compiler_stance",
    "detect_fake_mode",
    "detect_is_causal_mask",
    "disable_functional_mode",
    "disable_modes",
    "enters_dynamo",
    "fused_all_gather_matmul",
    "fused_matmul_reduce_scatter",
    "get_hash_for_files",
    "graph_compile",
    "inductor_cache_dir",
    "inductor_decompositions",
    "is_compiled_call",
    "load_autograd_result",
    "make_boxed_func",
    "min_cut_rematerialization_partition",
    "no_python_dispatcher",
    "on_compiled_calls",
    "preserve_node_ordering",
    "read_data",
    "trace_again",
    "trace_log",
    "trace_structured",
    "traced_frame",
    "traced_function",
    "under_function_modes",
    "unimplemented",
    "unset_fake_temporarily",
]


def compile_fx(*args: Any, **kwargs: Any) -> Any:
    """Of torch 2.13: torch/_inductor/compile_fx.py. Imported where code is made: `explain` and `plan` make none."""
    from torch._inductor.compile_fx import compile_fx as run

    return run(*args, **kwargs)


def compile_fx_inner(*args: Any, **kwargs: Any) -> Any:
    """Of torch 2.13: torch/_inductor/compile_fx.py. Imported where code is made, as `compile_fx`."""
    from torch._inductor.compile_fx import compile_fx_inner as run

    return run(*args, **kwargs)


def traced_function() -> str:
    """What Dynamo, which is calling a backend, traces: the class of a model, or the name of a function."""
    frame = traced_frame()
    if frame is None:
        return "a graph"
    code = frame.f_code
    return str(getattr(code, "co_qualname", code.co_name)).removesuffix(".forward")


def enters_dynamo(code: types.CodeType) -> bool:
    """Whether this is torch's code between a frame and Dynamo, which is to compile it."""
    return code is CatchErrorsWrapper.__call__.__code__


def traced_frame() -> Any:
    """What Dynamo, which is calling a backend, knows of the frame it traces: f_code, f_globals, f_locals, closure.

    None where nothing is traced.
    """
    try:
        return InstructionTranslator.current_tx()
    except AttributeError:
        return None


@contextlib.contextmanager
def under_function_modes() -> Iterator[None]:
    """What runs while Dynamo compiles a frame runs under the torch-function modes of the frame, as a default device.

    Dynamo takes them away meanwhile and keeps them in one place, which a compile inside of a compile overwrites.
    """
    kept = torch_function_mode_stack_state_mgr.stack
    try:
        with torch_function_mode_stack_state_mgr.temp_restore_stack():
            yield
    finally:
        torch_function_mode_stack_state_mgr.stack = kept


def trace_again(reason: str) -> NoReturn:
    """Let Dynamo, which is calling a backend, trace the frame once more, from nothing.

    Without its log of speculations, which says where the last trace went: this one may go elsewhere.

    Raises:
        RestartAnalysis: of the kind that Dynamo lets through from a backend.
    """
    tracer = InstructionTranslator.current_tx()
    tracer.speculation_log.clear()
    raise TensorifyScalarRestartAnalysis(restart_reason=reason)


def autograd_cache_key(gm: fx.GraphModule, inputs: Sequence[Any]) -> str:
    """The key that autograd's cache gives a Dynamo graph: code, inputs without their values, versions, all settings.

    Raises:
        Exception: the graph, or a setting, has no key.
    """
    config = AOTConfig(None, None, None, None, num_params_buffers=0, aot_id=0, keep_inference_input_mutations=True)
    return autograd_cache.autograd_cache_key(gm, inputs, config)[0]


def autograd_result(compiled: Callable[..., Any]) -> Any:
    """What autograd's cache keeps of a compiled graph, with names of entries of Inductor's cache; None for nothing."""
    found: Any = compiled
    while found is not None:
        serialize = getattr(found, "serialize", None)
        if serialize is not None:
            return serialize()
        found = getattr(found, "__wrapped__", None)
    return None


def load_autograd_result(result: Any) -> Callable[..., Any]:
    """The compiled graph again, without tracing.

    Raises:
        Exception: Inductor's cache has no longer what the result names.
    """
    run = result.wrap_post_compile([], result.sanitized_aot_config, autograd_cache.create_fx_config())

    def call(*args: Any) -> Any:
        return run(list(args))

    return call


class CompiledCall(NamedTuple):
    """A call of what torch.compile returned. options: those of the backend."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    options: Mapping[str, Any] | None

    @property
    def name(self) -> str:
        """The class of a model, or the name of a function."""
        owner = getattr(self.function, "__self__", None)
        if isinstance(owner, torch.nn.Module):
            return type(owner).__qualname__
        return str(getattr(self.function, "__qualname__", self.function))

    def programs(self) -> int:
        """How many programs Dynamo keeps for the code that is called."""
        owner = getattr(self.function, "__self__", None)
        function: Any = owner.forward if isinstance(owner, torch.nn.Module) else self.function
        found = [function, inspect.unwrap(function), getattr(function, "_torchdynamo_inline", None)]
        codes = {code for f in found if isinstance(code := getattr(f, "__code__", None), types.CodeType)}
        return max((len(_debug_get_cache_entry_list(code)) for code in codes), default=0)


def on_compiled_calls(
    backend: Callable[..., Any],
    begins: Callable[[CompiledCall], None],
    ends: Callable[[CompiledCall, BaseException | None], None],
    around: Callable[[], contextlib.AbstractContextManager[None]],
) -> None:
    """From now on what torch.compile makes for `backend` says when it is called, and how that ended.

    It says so whether Dynamo then runs a program, makes one, or runs plain code. What `begins` or `ends` raises ends
    the call; `ends` gets the error that the call ended in. What runs between the two, Dynamo's tracing included, runs
    inside of an `around`.
    """
    context = eval_frame.OptimizeContext
    make = context.__init__

    @functools.wraps(make)
    def make_and_watch(self: Any, callback: Any, *args: Any, **kwargs: Any) -> None:
        make(self, callback, *args, **kwargs)
        function, options = _backend_and_options(eval_frame.innermost_backend(callback))
        if function is not backend:
            return

        def first() -> Callable[[], None]:
            begins(_current_call(options))
            return _nothing

        def settings() -> Callable[[], None]:
            context = around()
            context.__enter__()
            return functools.partial(context.__exit__, None, None, None)  # type: ignore[return-value]

        def last() -> Callable[[], None]:
            call, before = _current_call(options), sys.exc_info()[1]

            def cleanup() -> None:
                error = sys.exc_info()[1]
                ends(call, error if error is not before else None)

            return cleanup

        # The first may end the call before others of the list have changed anything, the last after they are undone.
        self.enter_exit_hooks[:] = [first, settings, *self.enter_exit_hooks, last]

    context.__init__ = make_and_watch  # type: ignore[method-assign]


def _backend_and_options(chosen: Any) -> tuple[Any, Mapping[str, Any] | None]:
    """Without what torch.compile, or a `functools.partial` of the user's, puts around a backend to hold its options."""
    function, options = getattr(chosen, "compiler_fn", chosen), getattr(chosen, "kwargs", {}).get("options")
    while isinstance(function, functools.partial):
        options = function.keywords.get("options") if options is None else options
        function = function.func
    return function, options


def _nothing() -> None:
    return None


def is_compiled_call(code: types.CodeType) -> bool:
    """Whether this is torch's code around every call of what torch.compile returned."""
    return code.co_name == "compile_wrapper" and code.co_filename == eval_frame.__file__


def _current_call(options: Mapping[str, Any] | None) -> CompiledCall:
    frame = sys._getframe(1)
    while frame is not None and not is_compiled_call(frame.f_code):
        frame = frame.f_back  # type: ignore[assignment]
    given = frame.f_locals if frame is not None else {}
    return CompiledCall(given.get("fn", "a function"), given.get("args", ()), given.get("kwargs", {}), options)


def compiler_stance() -> str:
    """What `torch.compiler.set_stance` was told last, as it is written."""
    stance = eval_frame._stance
    if stance.backend is not None:
        return f"{stance.stance!r}, force_backend={stance.backend!r}"
    return stance.stance if stance.stance == "default" else repr(stance.stance)


def around_backward(output: torch.Tensor, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Any:
    """The node that runs the compiled backward of an output of AOTAutograd; None without one.

    Its class, one for each compiled graph, gets `wrap(backward)` in place of its backward, once.
    """
    waiting, seen = [output.grad_fn], set[Any]()
    while waiting and len(seen) < NODES_ABOVE:
        node: Any = waiting.pop(0)
        if node is None or node in seen:
            continue
        seen.add(node)
        compiled = getattr(node, "_forward_cls", None)
        if compiled is not None and compiled.__name__ == "CompiledFunction":
            if not hasattr(compiled, "_spx_backward"):
                compiled._spx_backward = compiled.backward
                compiled.backward = staticmethod(wrap(compiled.backward))
            return node
        waiting += [before for before, _ in node.next_functions]
    return None
