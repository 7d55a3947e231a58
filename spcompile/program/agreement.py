"""Do all ranks do the same? Compared before a compile, after it, and before every call on CPU meshes.

Ranks exchange 64-bit hashes over the mesh's own groups; only if they differ do they exchange texts, through the store,
and every rank raises the same error. So a rank that recompiles while another runs is named at once, and nobody hangs.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from spcompile.diagnostics import RanksDisagree
from spcompile.machine.mesh import RuntimeMesh
from spcompile.torch_private import RestartAnalysis, no_python_dispatcher, unset_fake_temporarily

TIMEOUT = timedelta(seconds=30)
STOPPED = "stopped with "
_LEGAL = "the same model, options and input shapes everywhere"


class Agreement:
    """Comparisons between the ranks of one mesh, numbered alike on all of them."""

    def __init__(self, mesh: RuntimeMesh) -> None:
        self._mesh = mesh
        self._count = 0

    @property
    def count(self) -> int:
        """How many comparisons there were: equal on all ranks, also where a compile failed on one of them."""
        return self._count

    @property
    def checks_calls(self) -> bool:
        """Whether every call is compared too: not on accelerators, where it would wait for the device."""
        return self._mesh.device_mesh.device_type == "cpu"

    def require(self, text: str, *, but_over: str | None = None) -> None:
        """Every rank must call this, with the same text as all ranks at its place of axis `but_over`.

        Raises:
            RanksDisagree: the same error on all ranks.
        """
        texts = self._compare(text, but_over)
        if texts is not None:
            raise RanksDisagree(_explain(texts), legal=_LEGAL)

    def everywhere(self, question: str, answer: bool) -> bool:
        """Whether the answer is yes on all ranks, each of which must ask the same question.

        Raises:
            RanksDisagree: a rank does something else at its place; the same error on all ranks.
        """
        texts = self._compare(f"{question} {'yes' if answer else 'no'}")
        if texts is None:
            return answer
        if all(text.startswith(question) for text in texts.values()):
            return False
        raise RanksDisagree(_explain(texts), legal=_LEGAL)

    def _compare(self, text: str, but_over: str | None = None) -> dict[int, str] | None:
        """The texts of all ranks, if they are not equal."""
        self._count += 1
        # AOTAutograd compiles under a fake mode; this communicates for real. And under the Python dispatcher, which
        # gloo's threads would inherit: they would wait for the GIL that a checked collective holds (level DETAIL).
        with unset_fake_temporarily(), no_python_dispatcher():
            return None if self._hashes_equal(text, but_over) else self._exchange(text)

    @contextlib.contextmanager
    def shared_errors(self) -> Iterator[None]:
        """Ranks on which the block does not end well tell the others, which wait for them at their next comparison.

        Raises:
            RanksDisagree: on all ranks, if not all of them failed with the same text.
        """
        try:
            yield
        except (RanksDisagree, RestartAnalysis):
            raise
        except Exception as error:
            self.require(f"{STOPPED}{error}")
            raise

    def _hashes_equal(self, text: str, but_over: str | None) -> bool:
        digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)
        mesh = self._mesh.device_mesh
        mine = torch.tensor([digest], dtype=torch.int64, device=mesh.device_type)
        for axis, size in self._mesh.shape.axes:
            if size == 1 or axis == but_over:
                continue
            parts = [torch.empty_like(mine) for _ in range(size)]
            dist.all_gather(parts, mine, group=mesh.get_group(axis))
            found = torch.cat(parts)
            # Zero marks a difference already seen along an earlier axis, so that all ranks of the mesh learn of it.
            agreed = bool((found == found[0]).all()) and int(found[0]) != 0
            mine = found[:1] if agreed else torch.zeros_like(mine)
        return int(mine) == digest

    def _exchange(self, text: str) -> dict[int, str]:
        store = dist.distributed_c10d._get_default_store()
        prefix = f"spcompile/{self._mesh.key}/{self._count}"
        store.set(f"{prefix}/{dist.get_rank()}", text)
        texts: dict[int, str] = {}
        for rank in sorted(self._mesh.device_mesh.mesh.flatten().tolist()):
            key = f"{prefix}/{rank}"
            store.wait([key], TIMEOUT)
            texts[rank] = store.get(key).decode()
        return texts


def _list_texts(texts: dict[int, str]) -> str:
    return "\n" + "\n".join(f"  rank {rank}: {text}" for rank, text in texts.items())


def _explain(texts: dict[int, str]) -> str:
    """The error's text; it depends on nothing else, since ranks that wait do not know what the others compare."""
    if any(text.startswith(STOPPED) for text in texts.values()):
        return _list_texts({rank: text if text.startswith(STOPPED) else "went on" for rank, text in texts.items()})
    if any("\n" in text for text in texts.values()):
        return first_difference(texts)
    return _list_texts(texts)


def first_difference(texts: dict[int, str]) -> str:
    """The ranks whose graph differs from the first rank's, and the first line that does."""
    reference_rank, reference = next(iter(texts.items()))
    found = []
    for rank, text in texts.items():
        if text == reference:
            continue
        pairs = zip(reference.splitlines(), text.splitlines(), strict=False)
        number, ours, theirs = next(((i, a, b) for i, (a, b) in enumerate(pairs, 1) if a != b), (0, "", "(length)"))
        found.append(f"line {number}:\n  rank {reference_rank}: {ours}\n  rank {rank}: {theirs}")
    return "the compiled graphs differ at " + "\n".join(found)
