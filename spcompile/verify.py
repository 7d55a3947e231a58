"""`spcompile.verify`: all ranks in this process against the plain model. Imports nothing until it is called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from spcompile.report.verify_report import Report


def verify(
    model: nn.Module,
    example_inputs: Mapping[str, Any] | Sequence[Any],
    mesh: Mapping[str, int] | DeviceMesh,
    *,
    tolerance: float | None = None,
    **options: Any,
) -> Report:
    """Compare the sharded program, run for all ranks in one process, with the plain model.

    Loss, every output and the gradient of every parameter are compared: those of one rank's graph before autograd, and
    those of the final forward and backward graphs. Gradients are of the model's loss, which is its first scalar output;
    without one, of random projections of all outputs. The model, its `.grad` and its buffers are left as they are.

    model: with real weights; float64 shows most. It is not converted.
    tolerance: of errors relative to the largest element of a tensor. By default 1e-10 for float64 and 1e-5 for float32;
        in half precision each tensor may differ by what a unit in the last place of all parameters and inputs makes
        of it, for which the plain model runs five times.
    options: those of the backend, but `mesh`.

    Raises:
        SpcompileError: what `explain` raises, an illegal tolerance, and weights on `meta`.
    """
    from spcompile.diagnostics import IllegalOption
    from spcompile.options import Options
    from spcompile.passes import PIPELINE
    from spcompile.program.trace import mesh_shape
    from spcompile.report.compare import compare_with_plain

    if tolerance is not None and not (isinstance(tolerance, (int, float)) and 0 <= tolerance < float("inf")):
        raise IllegalOption(f"tolerance={tolerance!r}", legal="None, or a finite number that is not negative")
    return compare_with_plain(model, example_inputs, mesh_shape(mesh), Options.parse(options), PIPELINE, tolerance)
