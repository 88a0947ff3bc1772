"""The averaging callbacks, for `from soups.callbacks import EMA, SWA, LAWA, PostHocEMA, Mixout, Averages, Trajectory`.

They live in the top-level package `callbacks`, beside this one. That is a common name: a project may have a `callbacks` of
its own, so ours is loaded by its place on disk, and under its own name only where that name is not taken.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from callbacks import EMA as EMA
    from callbacks import LAWA as LAWA
    from callbacks import SWA as SWA
    from callbacks import Averages as Averages
    from callbacks import Averaging as Averaging
    from callbacks import Mixout as Mixout
    from callbacks import PostHocEMA as PostHocEMA
    from callbacks import Trajectory as Trajectory

__all__ = ["EMA", "LAWA", "SWA", "Averages", "Averaging", "Mixout", "PostHocEMA", "Trajectory"]

_OURS = Path(__file__).resolve().parent.parent / "callbacks" / "__init__.py"


def _load() -> ModuleType:
    try:
        spec = importlib.util.find_spec("callbacks")
    except (ImportError, ValueError):
        spec = None
    if spec is not None and spec.origin is not None and Path(spec.origin).resolve() == _OURS:
        return importlib.import_module("callbacks")
    alias = "soups_callbacks"
    if alias in sys.modules:
        return sys.modules[alias]
    spec = importlib.util.spec_from_file_location(alias, _OURS, submodule_search_locations=[str(_OURS.parent)])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[alias] = module
    spec.loader.exec_module(module)
    return module


_module = _load()
for _name in __all__:
    globals()[_name] = getattr(_module, _name)
