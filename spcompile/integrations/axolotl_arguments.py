"""What the plugin for Axolotl adds to the keys of its YAML file; Axolotl joins it to its own model."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field


class SequenceParallelArguments(BaseModel):
    """The key `spcompile`."""

    spcompile: dict[str, Any] | None = Field(
        default=None, description="mesh: sizes of the axes dp, tp, cp, the first one outermost; options of the backend"
    )
