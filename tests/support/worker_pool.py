"""Real processes on gloo, forked once per world size from one that has imported torch, and reused by all tests.

    results = pool.run(function, *arguments)    # function(*arguments) on every rank; one result per rank

`function` lives at the top level of a test module: workers load that file. Arguments and results travel by pickle, so
tensors arrive as copies. A job that fails or hangs costs a restart of the pool, and the error shows every rank's
traceback, or the stack where it hangs.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib.util
import inspect
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

STARTUP_SECONDS = 120.0
HANG_SECONDS = 400.0  # a compile of a deep model on a busy machine takes minutes
# Imported once, by the process that all ranks of all pools are forked from. Where transformers is missing it goes on.
IMPORTED = ["torch._dynamo", "torch.distributed.tensor", "spcompile.backend", "transformers"]
GRACE_SECONDS = 3.0  # how long the other ranks may still take after one has failed


class JobFailed(AssertionError):
    """A rank raised, died or did not answer in time."""


class WorkerPool:
    """`world_size` processes that form one gloo process group. Started by the first job."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._workers: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        self._folder: Path | None = None

    def run(self, function: Callable[..., Any], *arguments: Any, timeout: float = HANG_SECONDS) -> list[Any]:
        """Call `function(*arguments)` on all ranks at once; returns its results in rank order.

        `timeout` is in seconds.

        Raises:
            JobFailed: with the traceback, or the stack at the time limit, of every rank that failed.
        """
        if "." in function.__qualname__:
            raise ValueError(f"{function.__qualname__} is not at the top level of its module")
        if not self._workers:
            self._start()
        source = (function.__module__, inspect.getfile(function), function.__qualname__)
        payload = pickle.dumps((source, pickle.dumps(arguments)))
        for pipe in self._pipes:
            with contextlib.suppress(BrokenPipeError):  # a dead worker is reported by _collect
                pipe.send_bytes(payload)
        return self._collect(f"{function.__qualname__} on {self.world_size} ranks", timeout)

    def close(self) -> None:
        """End the workers; the next job starts new ones."""
        for worker in self._workers:
            worker.kill()
            worker.join()
        for pipe in self._pipes:
            pipe.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._workers, self._pipes, self._folder = [], [], None

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        self._folder = Path(tempfile.mkdtemp(prefix="spcompile-pool-"))
        for rank in range(self.world_size):
            here, there = context.Pipe()
            arguments = (rank, self.world_size, str(self._folder), there)
            worker = context.Process(target=_serve, args=arguments, daemon=True, name=f"rank{rank}")
            with environment_of_ranks():
                worker.start()
            there.close()
            self._workers.append(worker)
            self._pipes.append(here)
        self._collect(f"start of {self.world_size} ranks", STARTUP_SECONDS)

    def _collect(self, job: str, timeout: float) -> list[Any]:
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        waiting = dict(enumerate(self._pipes))
        deadline = time.monotonic() + timeout
        while waiting and (remaining := deadline - time.monotonic()) > 0:
            ready = wait(list(waiting.values()), timeout=remaining)
            for rank in [rank for rank, pipe in waiting.items() if pipe in ready]:
                try:
                    good, value = pickle.loads(waiting.pop(rank).recv_bytes())
                except (EOFError, ConnectionResetError):
                    self._workers[rank].join()
                    good, value = False, f"the process died with exit code {self._workers[rank].exitcode}"
                (results if good else failures)[rank] = value
                if not good:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if waiting:
            reason = "had no answer, since another rank failed" if failures else f"had no answer in {timeout:g} s"
            failures |= {rank: f"{reason}; it was at\n{stack}" for rank, stack in self._stacks(list(waiting)).items()}
        if failures:
            self.close()
            texts = [f"rank {rank}: {text}" for rank, text in sorted(failures.items())]
            raise JobFailed(f"{job}\n" + "\n".join(texts))
        return [results[rank] for rank in range(self.world_size)]

    def _stacks(self, ranks: list[int]) -> dict[int, str]:
        """Where the threads of these ranks are now."""
        for rank in ranks:
            os.kill(self._workers[rank].pid or 0, signal.SIGUSR1)
        time.sleep(0.5)
        assert self._folder is not None
        return {rank: _stack_file(self._folder, rank).read_text() for rank in ranks}


@contextlib.contextmanager
def environment_of_ranks() -> Iterator[None]:
    """What torch reads when it is imported, for the process that ranks are forked from."""
    before = dict(os.environ)
    os.environ.update(TORCH_DISTRIBUTED_DEBUG="DETAIL", OMP_NUM_THREADS="1")
    os.environ.pop("TORCHINDUCTOR_AUTOGRAD_CACHE", None)  # it would overrule a test that wants the cache
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _stack_file(folder: Path, rank: int) -> Path:
    return folder / f"stack{rank}.txt"


def _serve(rank: int, world_size: int, folder: str, pipe: Connection) -> None:
    """A worker's whole life: join the process group, then answer one job after another."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    stack_file = _stack_file(Path(folder), rank).open("w")
    faulthandler.register(signal.SIGUSR1, file=stack_file, all_threads=True)

    import torch
    import torch.distributed as dist

    gc.freeze()  # the garbage collector, which each compile runs, need not look at what was imported
    torch.set_num_threads(1)
    torch._functorch.config.enable_autograd_cache = False
    store = f"file://{folder}/store"
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=STARTUP_SECONDS)
    )
    _answer(pipe, True, None)
    while True:
        try:
            source, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            function = load_function(*source)
            torch._dynamo.reset()
            torch.manual_seed(0)
            good, value = True, function(*pickle.loads(arguments))
        except BaseException:
            good, value = False, traceback.format_exc()
        _answer(pipe, good, value)


def _answer(pipe: Connection, good: bool, value: Any) -> None:
    try:
        payload = pickle.dumps((good, value))
    except Exception:
        payload = pickle.dumps((False, traceback.format_exc()))
    pipe.send_bytes(payload)


def load_function(module_name: str, file: str, name: str) -> Any:
    """The function, out of the file that pytest loaded it from, under the same module name, so that pickle finds it."""
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        spec.loader.exec_module(module)
    return getattr(sys.modules[module_name], name)
