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

    Loss, every output, the gradient of every parameter and the new values of buffers are compared: those of one rank's
    graph before autograd, and those of the final forward and backward graphs. Gradients are of the model's loss, which
    is its first scalar output; without one, of random projections of all outputs. The model and its inputs are left as
    they are: parameters, buffers, `.grad`, attributes, and what containers and objects in them hold.

    The plain model runs with `scaled_dot_product_attention` by its formula, not by a kernel that fuses it: in rows
    that a large number of a mask leaves no key those have other gradients.

    model: with real weights; float64 shows most. It is not converted.
    tolerance: of errors relative to the largest element of a tensor. By default 1e-10 for float64 and 1e-5 for float32.
        Where that is not enough, and in half precision, a tensor may differ by twice what it changes when every number
        of the plain model moves by a unit in the last place of its own dtype, for which that runs five times.
    options: those of the backend, but `mesh`.

    Raises:
        SpcompileError: what `explain` raises, an illegal tolerance, and weights on `meta`.
    """
    from spcompile.diagnostics import IllegalOption
    from spcompile.options import Options
    from spcompile.passes import PIPELINE
    from spcompile.program.plugins import with_plugins
    from spcompile.program.trace import mesh_shape
    from spcompile.report.compare import compare_with_plain

    if tolerance is not None and not (isinstance(tolerance, (int, float)) and 0 <= tolerance < float("inf")):
        raise IllegalOption(f"tolerance={tolerance!r}", legal="None, or a finite number that is not negative")
    shape, chosen = mesh_shape(mesh), Options.parse(options)
    return compare_with_plain(model, example_inputs, shape, chosen, with_plugins(PIPELINE, chosen), tolerance)
