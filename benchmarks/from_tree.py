"""Makes `spcompile` importable from the source tree where it is not installed: import it first."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if importlib.util.find_spec("spcompile") is None:
    sys.path.insert(0, str(ROOT))
if importlib.util.find_spec("spcompile.passes") is None:
    # As pyproject.toml maps them.
    for name in ("passes", "models"):
        folder = ROOT / name
        spec = importlib.util.spec_from_file_location(
            f"spcompile.{name}", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[f"spcompile.{name}"] = module
        spec.loader.exec_module(module)
