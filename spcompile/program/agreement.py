"""Do all ranks do the same? Compared before a compile, after it, before every call and before the backward of one.

Ranks exchange 64-bit hashes over a group of their own; only if they differ do they exchange texts, through the store,
and every rank raises the same error. So a rank that recompiles while another runs is named at once, and nobody hangs.
On accelerators calls are compared by a thread, and the next call learns what it found: no step waits for its device.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import platform
import re
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from datetime import timedelta

import torch
import torch.distributed as dist

from spcompile.diagnostics import RanksDisagree, RanksMissing, SpcompileError
from spcompile.machine.mesh import RuntimeMesh
from spcompile.program.background import Background
from spcompile.program.facts import STOPPED, Fact, Record, agree, comparable_text, disagreement, wished
from spcompile.program.one_caller import OneCaller
from spcompile.program.own_group import OwnGroup
from spcompile.program.program_cache import sources
from spcompile.program.roll_call import roll_call_of
from spcompile.program.same_weights import ParameterSets
from spcompile.torch_private import RestartAnalysis, no_python_dispatcher, unset_fake_temporarily
from spcompile.torch_private_groups import default_store, group_timeout

log = logging.getLogger(__name__)
_TEXTS_ARRIVE = timedelta(seconds=30)
_COLLECTIVE = re.compile(
    r"gloo|nccl|DistBackendError|DistNetworkError|Connection (closed|reset)|collective|monitoredBarrier", re.I
)


class Agreement:
    """Comparisons between the ranks of one mesh, numbered alike on all of them."""

    def __init__(self, mesh: RuntimeMesh) -> None:
        self._mesh = mesh
        places, names = mesh.device_mesh.mesh, [name for name, _ in mesh.shape.axes]
        self.coordinates = {
            int(places[tuple(at)]): dict(zip(names, at.tolist(), strict=True))
            for at in torch.ones_like(places).nonzero()
        }
        self.roll_call = roll_call_of(dist.group.WORLD)
        timeout = functools.partial(group_timeout, self.device_type)
        self._group = OwnGroup(list(self.coordinates), self.roll_call, timeout)
        self._count = 0
        self._background = Background("spcompile agreement")
        self._pending: deque[tuple[bool, Future[bool]]] = deque()  # (of a call, not of its backward; what was found)
        self._wished = False
        self.caller = OneCaller()
        self.parameter_sets = ParameterSets()

    @property
    def count(self) -> int:
        """How many comparisons there were: equal on all ranks, also where a compile failed on one of them."""
        return self._count

    @property
    def device_type(self) -> str:
        """What the mesh runs on."""
        return self._mesh.device_mesh.device_type

    def require(self, record: Record) -> bool:
        """Every rank must call this, with the same record, but for facts that may differ. Whether a rank wishes.

        Raises:
            RanksDisagree, RanksMissing: the same error on all ranks.
        """
        self._settle(len(self._pending))
        if self._count == 0:
            self._compare(_versions(self._mesh))
        return self._compare(record)

    def require_call_later(self, record: Callable[[], Record]) -> None:
        """As `require`, in a thread, which also makes the record; what it finds is told at the next call.

        Raises:
            RanksDisagree, RanksMissing: found for an earlier call.
        """
        calls = [i for i, (is_call, _) in enumerate(self._pending, 1) if is_call]
        self._settle(calls[-1] if calls else 0)
        self._start(record, is_call=True)

    def require_backward_later(self, record: Callable[[], Record]) -> None:
        """As `require_call_later`, for a backward, which does not wait for what is found for its own call."""
        calls = [i for i, (is_call, _) in enumerate(self._pending) if is_call]
        self._settle(calls[-1] if calls else len(self._pending))
        self._start(record, is_call=False)

    def take_wish(self) -> bool:
        """Whether a rank has wished for something in what was compared later."""
        wished_before, self._wished = self._wished, False
        return wished_before

    def _start(self, record: Callable[[], Record], is_call: bool) -> None:
        self._pending.append((is_call, self._background.start(functools.partial(self._compare_later, record))))

    def _settle(self, count: int) -> None:
        for _ in range(count):
            self._wished |= self._pending.popleft()[1].result()

    def everywhere(self, question: str, answer: bool) -> bool:
        """Whether the answer is yes on all ranks, each of which must ask the same question.

        Raises:
            RanksDisagree: a rank does something else at its place; the same error on all ranks.
        """
        return not self.require(Record(question, wishes=not answer))

    @contextlib.contextmanager
    def shared_errors(self) -> Iterator[None]:
        """Ranks on which the block does not end well tell the others, which wait for them at their next comparison.

        Raises:
            RanksDisagree: on all ranks, if not all of them failed with the same text.
        """
        try:
            yield
        except (RanksDisagree, RanksMissing, RestartAnalysis):
            raise
        except Exception as error:
            self.require(Record(f"{STOPPED}{comparable_text(error)}"))
            raise

    def _compare_later(self, record: Callable[[], Record]) -> bool:
        try:
            return self._compare(record())
        except SpcompileError as error:
            log.error("%s", error)  # now, as the other threads may wait for a device that waits for ever
            raise

    def _compare(self, record: Record) -> bool:
        self._count += 1
        where = record.doing.partition("\n")[0].removeprefix("runs ")
        # AOTAutograd compiles under a fake mode; this communicates for real. And under the Python dispatcher, which
        # gloo's threads would inherit: they would wait for the GIL.
        with unset_fake_temporarily(), no_python_dispatcher():
            numbers = self._group.gather(record.numbers(), where, record.mark or f"{self._count} {where}")
            if agree(numbers, self.coordinates):
                return wished(numbers)
            found, legal = disagreement(self._exchange(record), self.coordinates)
        raise RanksDisagree(found, legal=legal)

    def failed_in(self, error: Exception, mark: str, where: str) -> None:
        """A rank's run of a program has failed: was it a collective, whose other ranks did not come?

        Raises:
            RanksMissing: it was.
        """
        roll_call = self.roll_call
        if _COLLECTIVE.search(f"{type(error).__name__} {error}"):
            roll_call.at(f"waits for the others inside {where}", mark)
            missing = roll_call.missing_if_any(self._group.ranks, where, mark, self._group.timeout())
            if missing is not None:
                raise missing from error
        roll_call.at(f"has stopped {where} with {type(error).__name__} {comparable_text(error):.300}")

    def _exchange(self, record: Record) -> dict[int, Record]:
        store = default_store()
        prefix = f"spcompile/texts/{self._group.name}/{self._count}"
        store.set(f"{prefix}/{dist.get_rank()}", record.to_json())
        records: dict[int, Record] = {}
        for rank in self._group.ranks:
            key = f"{prefix}/{rank}"
            store.wait([key], _TEXTS_ARRIVE)
            records[rank] = Record.from_json(store.get(key).decode())
        return records


def _versions(mesh: RuntimeMesh) -> Record:
    """What must be equal before anything else can be."""
    legal = "one environment for all ranks: the same Python, torch and spcompile"
    facts = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "spcompile": f"{sys.modules['spcompile'].__version__}, sources {sources()[:12]}",
    }
    same = tuple(Fact(name, version, legal=legal) for name, version in facts.items())
    shape = Fact("mesh", f"{mesh.shape} over ranks {mesh.device_mesh.mesh.tolist()}", legal="one mesh on all ranks")
    return Record("compares versions", (*same, shape))
