"""`spcompile calibrate`: measure this machine for `accelerator=`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from spcompile.command.arguments import MOST_PROCESSES, require_between, require_place_for_file
from spcompile.diagnostics import IllegalOption


def calibrate(
    *,
    output: Annotated[Path, Parameter(name=["--output", "-o"])],
    nproc: int | None = None,
    check: bool = False,
) -> int:
    """Measure products, attention, memory and collectives here, for --gpu of plan, compare and timeline.

    Args:
        output: The file to write, as machine.json.
        nproc: Processes that measure together. Default: one for each GPU, else 2.
        check: Also run steps of models:llama in several ways, and print their times beside the predicted ones.
    """
    require_between("--nproc", nproc, 2, MOST_PROCESSES)
    require_place_for_file("--output", output)
    if output.suffix != ".json":
        raise IllegalOption(f"--output {str(output)!r}", legal="a name that ends with .json, by which --gpu knows it")

    import torch

    from spcompile.command.calibrate_check import check_text, checked_rows
    from spcompile.command.calibrate_ranks import calibrate_rank
    from spcompile.command.train import on_processes
    from spcompile.machine.measured import read_measured

    ranks = nproc or max(2, torch.cuda.device_count())
    found = on_processes(ranks, calibrate_rank)[0]
    output.write_text(found.to_json(), encoding="utf-8")
    read_measured(str(output))
    print(f"{output}: {found.name}, torch {found.torch}. Use it as --gpu {output}")
    if check:
        print(check_text(checked_rows(str(output), ranks)))
    return 0
