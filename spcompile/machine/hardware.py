"""Figures of accelerators and links, each with its source: `hardware.json`, read once."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

HARDWARE: dict[str, Any] = json.loads(resources.files("spcompile.machine").joinpath("hardware.json").read_text("utf-8"))
