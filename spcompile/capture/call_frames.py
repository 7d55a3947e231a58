"""The frames of Python between a call of what torch.compile returned and what Dynamo runs, or traces, for it."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import types

import torch

from spcompile.diagnostics import is_own_file
from spcompile.torch_private import enters_dynamo, is_compiled_call

TORCH_FOLDER = os.path.join(os.path.dirname(torch.__file__), "")
_LAYERS = os.path.join(TORCH_FOLDER, "nn", "modules", "")  # of torch, but as a user's: they compute


def calls_above() -> list[types.FrameType]:
    """The frames that led from a compiled model's call to the one that Dynamo traces, innermost first.

    Without torch's own. They run uncompiled, or are the parts of a broken frame in front of a resumed one.
    """
    frame: types.FrameType | None = sys._getframe()
    while frame is not None and not enters_dynamo(frame.f_code):
        frame = frame.f_back
    found = []
    while frame is not None and not is_compiled_call(frame.f_code):
        if not frame.f_code.co_filename.startswith(TORCH_FOLDER):
            found.append(frame)
        frame = frame.f_back
    return found if frame is not None else []


def runs_whole_call() -> bool:
    """Whether the program that calls this is all of a call of something compiled: no code above it runs plainly."""
    frame: types.FrameType | None = sys._getframe(1)
    running = 0
    while frame is not None and not is_compiled_call(frame.f_code):
        running += not _calls_on(frame.f_code.co_filename)
        frame = frame.f_back
    return running <= 1  # the frame that has become the program


@functools.lru_cache(maxsize=4096)
def _calls_on(file: str) -> bool:
    """Whether code of a file only calls on."""
    if file in (torch.nn.modules.module.__file__, contextlib.__file__):
        return True
    return is_own_file(file) or (file.startswith(TORCH_FOLDER) and not file.startswith(_LAYERS))
