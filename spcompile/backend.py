"""The torch.compile backend: `torch.compile(model, backend="spcompile", options={...})`."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.fx as fx

from spcompile.capture.autocast import autocast_off
from spcompile.capture.dynamo_settings import as_in_one_graph, ignore_library_logging
from spcompile.capture.graph_breaks import counted, mark_part, model_call, model_part_of, options_of_part
from spcompile.capture.local_inputs import on_local_parts, over_local_parts
from spcompile.capture.module_buffer import relied_on, watched
from spcompile.capture.python_floats import without_symbolic_floats
from spcompile.collectives import gathers_on_gloo
from spcompile.diagnostics import IllegalOption, remark_lines
from spcompile.graph.axes import bind_axes, groups_of
from spcompile.graph.printer import compared_text
from spcompile.machine.mesh import RuntimeMesh, runtime_mesh
from spcompile.memory.planner import Wish
from spcompile.options import Options
from spcompile.passes import PIPELINE
from spcompile.program import observed, program_cache
from spcompile.program.agreement import Agreement
from spcompile.program.artifacts import Artifacts, from_cache, own_artifacts
from spcompile.program.build import Output, build
from spcompile.program.checked_calls import CheckedCalls, Inputs
from spcompile.program.collection import rare_collection
from spcompile.program.dump import Dump, own_dump
from spcompile.program.emit import Emission, as_it_is, emit
from spcompile.program.facts import Fact, Record
from spcompile.program.memory_remarks import require_memory
from spcompile.program.one_device import recognise
from spcompile.program.outputs import restore_outputs
from spcompile.program.pipeline import History, Snapshot
from spcompile.program.plain_calls import PlainCalls, Target
from spcompile.program.plugins import plugin_identities, with_plugins
from spcompile.program.program_cache import Finished
from spcompile.program.progress import shown_by
from spcompile.program.same_inputs import shape_text
from spcompile.program.shared_dump import SharedDump, shared_dump
from spcompile.program.whole_batch import over_whole_batch
from spcompile.schedule.channels import channels_of
from spcompile.torch_private import on_compiled_calls

log = logging.getLogger(__name__)
ignore_library_logging()  # torch.compile(..., backend="spcompile") imports this module before it traces


def spcompile(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    **others: Any,
) -> Callable[..., Any]:
    """Compile one Dynamo graph for this rank. Called by torch.compile; see Options for `options`.

    others: what torch.compile hands to backends besides, as `mode`: refused by name. `dynamic`, `fullgraph` and
        `disable` are Dynamo's, which obeys them before a backend is called.

    Raises:
        SpcompileError: before any collective of the model runs, with the same text on every rank.
    """
    with _PLAIN_CALLS.noting_errors(), rare_collection(), shown_by(_tell_progress):
        program = counted(_program(gm, example_inputs, options, others))
        return _PLAIN_CALLS.counted(program, is_part=model_part_of(gm) is not None)


def _tell_progress(what: str) -> None:
    """What a compile is at, on rank 0 only: in the log, which `TORCH_LOGS="spcompile"` shows."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        log.info("compiling: %s", what)


def _program(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Mapping[str, Any] | None, others: Mapping[str, Any]
) -> Callable[..., Any]:
    mesh = runtime_mesh((options or {}).get("mesh"), _device_type(example_inputs))
    # Over dp the frame is traced once more, where a float of the caller's is a number.
    without_symbolic_floats(gm, all_are_numbers=mesh is not None and mesh.shape.size("dp") > 1)
    if mesh is None:
        chosen = _options_of(options, others)
        log.info("SPR401 world size 1: compiled without sharding")
        return _alone(gm, example_inputs, chosen)
    agreement = _agreement(dist.group.WORLD, mesh)
    degree = mesh.shape.size("dp")
    with agreement.caller.inside("compiles") as refused, agreement.shared_errors():
        if refused is not None:
            raise refused
        chosen = _options_of(options, others)
        with_plugins(PIPELINE, chosen)  # what is wrong with one is told before anything is compared
        _require_no_cuda_graphs(chosen)
        mark_part(gm, chosen, degree)
        whole = functools.partial(_over, mesh, options_of_part(gm, chosen), agreement)
        return over_whole_batch(whole, degree)(gm, example_inputs)


def _options_of(options: Mapping[str, Any] | None, others: Mapping[str, Any]) -> Options:
    for name, value in others.items():
        if value is not None:
            legal = 'options={"compiler": "inductor" or "eager", ...}; settings of Inductor in torch._inductor.config'
            raise IllegalOption(f"{name}={value!r}: not supported by this backend", legal=legal)
    return Options.parse(options)


def _require_no_cuda_graphs(chosen: Options) -> None:
    """Rings ask for their group, and at times for an answer on the host, whenever they run: no capture repeats that."""
    if chosen.compiler == "inductor" and torch._inductor.config.triton.cudagraphs:
        found = "torch._inductor.config.triton.cudagraphs=True on several ranks"
        raise IllegalOption(found, legal="False: a sharded step is not captured in CUDA graphs")


def _over(
    mesh: RuntimeMesh, chosen: Options, agreement: Agreement, gm: fx.GraphModule, inputs: Sequence[Any]
) -> Callable[..., Any]:
    agreement.require(_what_is_compiled(gm, inputs, chosen))
    return _compile(gm, inputs, chosen, mesh, agreement, shared_dump(chosen.dump, mesh, agreement))


def _alone(gm: fx.GraphModule, inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    wish = _memory_wish(options, _device_type(inputs), 1)
    dump = own_dump(options.dump)
    artifacts = own_artifacts()
    history = _history_for(dump, artifacts)
    pipeline = with_plugins(PIPELINE, options)
    program = recognise(gm, inputs, options, pipeline, history, always=wish.is_bounded)
    if program is None:
        return plain(gm, inputs, options.compiler, dump)
    for remark in remark_lines(program.ctx.remarks.rows):
        log.info("%s", remark)
    emission = Emission(program, bind=lambda graph: None, wish=wish)
    if dump is not None:
        emission.finished = dump.python
    with autocast_off():
        compiled = emit(emission, options.compiler)
    if dump is not None:
        dump.require_written()
    if artifacts is not None:
        artifacts.plan(program.ctx, emission.memory)
    require_memory(emission.memory, program.ctx.mesh)
    observed.announce(program, emission)
    program.forget_inputs()
    return watched(compiled, relied_on(program.captured.graph), inputs)


def _memory_wish(options: Options, device_type: str, world: int) -> Wish:
    """Without a budget of the user's a step may take what the accelerator has; a CPU's memory has no limit."""
    wish = Wish.of(options, world)
    return replace(wish, bytes=None) if options.memory == "auto" and device_type == "cpu" else wish


def plain(
    gm: fx.GraphModule, example_inputs: Sequence[Any], compiler: str, dump: Dump | None = None
) -> Callable[..., Any]:
    """Compile without sharding."""
    compiled = as_it_is(gm, example_inputs, compiler, dump.final if dump is not None else None)
    if dump is not None:
        dump.require_written()
    return compiled


def _compile(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    options: Options,
    mesh: RuntimeMesh,
    agreement: Agreement,
    dump: SharedDump | None,
) -> Callable[..., Any]:
    given = inputs
    named = Inputs.of(gm)
    gm, inputs = over_local_parts(gm, given)
    key = program_cache.key_of(gm, inputs, options, _machine(mesh), with_plugins(PIPELINE, options))
    if not agreement.everywhere("may store its program:", key is not None):
        key = None  # as where one rank dumps: all compile the backward at the same time
    number = agreement.count
    finished, compiled = _cached(key, mesh, agreement) or _made(gm, inputs, options, mesh, agreement, key, dump)
    for remark in finished.remarks:
        log.info("%s", remark)
    whole = restore_outputs(compiled, finished.outputs, mesh, as_dtensors=options.outputs == "sharded")
    run = watched(on_local_parts(whole, given), finished.relied, inputs)
    if options.compare == "compile":
        return run
    return CheckedCalls(run, named, number, agreement, options, finished.draws_random_numbers).__call__


def _history_for(dump: Dump | None, artifacts: Artifacts | None) -> History:
    """Tells of every graph what asks for it."""
    asking = [one.snapshot for one in (dump, artifacts) if one is not None]

    def tell(snapshot: Snapshot) -> None:
        for told in asking:
            told(snapshot)

    return History(on_snapshot=tell if asking else None, keep_texts=bool(asking))


def _machine(mesh: RuntimeMesh) -> dict[str, str]:
    groups = {axis: mesh.group_name(axis) for axis, _ in mesh.shape.axes}
    return {"mesh": str(mesh.shape), "device": mesh.device_mesh.device_type, "groups": str(groups)}


def _cached(key: str | None, mesh: RuntimeMesh, agreement: Agreement) -> tuple[Finished, Callable[..., Any]] | None:
    """A program that every rank has found, and whose code names groups that exist; else all ranks compile."""
    found = program_cache.load(key, mesh.coordinate) if key is not None else None
    if not agreement.everywhere("found a finished program:", found is not None):
        return None
    assert found is not None
    finished = found[0]
    agreement.require(_compiled(finished.text))
    from_cache(finished.remarks)
    groups = {name: mesh.group_name(name) for name in finished.groups}  # those of parts and channels are made here
    return found if agreement.everywhere("its process groups exist:", groups == finished.groups) else None


def _made(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    options: Options,
    mesh: RuntimeMesh,
    agreement: Agreement,
    key: str | None,
    dump: SharedDump | None,
) -> tuple[Finished, Callable[..., Any]]:
    """Compile, and store the program under `key`, unless nothing of it is sharded: then it is the plain graph's."""
    artifacts = own_artifacts()
    history = _history_for(dump, artifacts)
    program = build(gm, inputs, mesh.shape, options, with_plugins(PIPELINE, options), history)
    if dump is not None:
        dump.require_written()
    remarks = program.ctx.remarks.rows
    finished = Finished(
        program.outputs,
        relied_on(program.captured.graph),
        program.draws_random_numbers,
        remark_lines(remarks),
    )
    if not program.is_sharded:
        as_they_are = [Output(place) for place in range(len(program.outputs))]
        return replace(finished, outputs=as_they_are, relied=[]), plain(gm, inputs, options.compiler)

    def bind(graph: fx.Graph) -> None:
        channels = channels_of(graph)
        groups = {name: mesh.group_name(name) for name in groups_of(graph, channels)}
        finished.groups |= groups
        bind_axes(graph, groups, channels)
        if mesh.device_mesh.device_type == "cpu":
            gathers_on_gloo(graph)

    def agree(phase: str, final: fx.GraphModule) -> None:
        if dump is not None:
            dump.python(phase, final)
            dump.require_written()
        if artifacts is not None:
            artifacts.schedule(phase, final, program.ctx)
        text = compared_text(final)
        finished.text += text
        agreement.require(_compiled(text))

    wish = _memory_wish(options, mesh.device_mesh.device_type, mesh.shape.world_size)
    emission = Emission(program, bind=bind, finished=agree, wish=wish, keep=key is not None)
    with autocast_off():
        compiled = emit(emission, options.compiler)
    if artifacts is not None:
        artifacts.plan(program.ctx, emission.memory)
    require_memory(emission.memory, mesh.shape)
    observed.announce(program, emission)
    program.forget_inputs()
    finished.remarks = remark_lines(remarks)
    finished.result = emission.result
    if key is not None:
        program_cache.store(key, mesh.coordinate, finished)
    return finished, compiled


@functools.cache
def _agreement(world: Any, mesh: RuntimeMesh) -> Agreement:
    return Agreement(mesh)


def _what_is_compiled(gm: fx.GraphModule, inputs: Sequence[Any], options: Options) -> Record:
    """What a rank compiles: what callers pass, then what modules own, then the options."""
    named = Inputs.of(gm)
    facts = [Fact(f"input {named.names[i]}", shape_text(inputs[i])) for i in named.passed]
    facts += [Fact(f"parameter {named.names[i]}", shape_text(inputs[i])) for i in named.state]
    facts += [Fact(f"option {name}", f"{name}={value}") for name, value in options.compared().items()]
    facts += [
        Fact(f"plugin {name}", f"sources {hashed}", legal="the same plugins, of the same version, on every rank")
        for name, hashed in plugin_identities().items()
    ]
    return Record(f"compiles {named.graph}", tuple(facts))


def _compiled(text: str) -> Record:
    return Record("has compiled", (Fact("the compiled graphs", text),))


def _target_of(options: Mapping[str, Any] | None, device_type: str) -> Target | None:
    mesh = runtime_mesh((options or {}).get("mesh"), device_type)
    return None if mesh is None else Target(mesh.shape, _agreement(dist.group.WORLD, mesh), Options.parse(options))


def _device_type(inputs: Sequence[Any]) -> str:
    return next((x.device.type for x in inputs if isinstance(x, torch.Tensor)), "cpu")


@contextlib.contextmanager
def _around_calls() -> Iterator[None]:
    with as_in_one_graph(), model_call():
        yield


_PLAIN_CALLS = PlainCalls(_target_of)
on_compiled_calls(spcompile, _PLAIN_CALLS.begins, _PLAIN_CALLS.ends, around=_around_calls)
