"""Dumps of all ranks of a mesh: no rank waits for one that cannot write, since all raise what one of them found."""

from __future__ import annotations

from spcompile.machine.mesh import RuntimeMesh
from spcompile.machine.shared_failure import raise_first
from spcompile.program.agreement import Agreement
from spcompile.program.dump import Dump, is_first


class SharedDump(Dump):
    """The dump of one compile: held by all ranks as soon as one of them writes."""

    def __init__(self, folder: str | None, mesh: RuntimeMesh, agreement: Agreement) -> None:
        super().__init__(folder)
        self._mesh, self._agreement = mesh, agreement

    def require_written(self) -> None:
        """Every rank must call this.

        Raises:
            IllegalOption: a rank could not write; the same error on all ranks.
        """
        if not self._agreement.everywhere("has written its dump:", self.failure is None):
            raise_first(self._mesh.device_mesh, self.failure)


def shared_dump(folder: str | None, mesh: RuntimeMesh, agreement: Agreement) -> SharedDump | None:
    """Start the dump of one compile; None where no rank dumps. What an older run left in the folder is removed.

    Raises:
        IllegalOption: a rank cannot write to its folder; the same error on all ranks.
    """
    if agreement.everywhere("dumps nothing:", folder is None):
        return None
    dump = SharedDump(folder, mesh, agreement)
    if agreement.everywhere("has dumped nothing yet:", folder is None or is_first(folder)):
        dump.remove_older()
        dump.require_written()  # no rank writes before all have removed what is old
    dump.start()
    dump.require_written()
    return dump
