"""AOTAutograd writes every graph out as Python for its logs, also where no log is on. That is left out here."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from spcompile.torch_private import graph_compile, trace_log


@contextlib.contextmanager
def without_log_texts() -> Iterator[None]:
    """Inside of this AOTAutograd writes no texts of its graphs, unless a log of torch's asks for them."""
    if logs_graphs():
        yield
        return
    joint, halves = graph_compile._log_joint_graph, graph_compile._log_fw_bw_graphs
    graph_compile._log_joint_graph = lambda *_: None
    graph_compile._log_fw_bw_graphs = lambda *_: (None, None)
    try:
        yield
    finally:
        graph_compile._log_joint_graph, graph_compile._log_fw_bw_graphs = joint, halves


def logs_graphs() -> bool:
    """Whether TORCH_LOGS or TORCH_TRACE asks for graphs of AOTAutograd."""
    logs = (graph_compile.aot_joint_log, graph_compile.aot_graphs_log)
    return is_traced() or any(log.isEnabledFor(logging.INFO) for log in logs)


def is_traced() -> bool:
    """Whether TORCH_TRACE is set. One handler is always there; without it that has no folder to write to."""
    return any(getattr(handler, "root_dir", handler) is not None for handler in trace_log.handlers)
