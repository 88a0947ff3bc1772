"""Our configuration groups in every Hydra program: `+soup=greedy`, `callbacks=[ema,lawa]`, `hydra/launcher=ray_local`.

They come last in the search path: what a program has of its own under the same name wins. Only the groups that make sense
anywhere are there (`soups/conf`), so that a program's `model` or `data` is never one of ours.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class SoupsSearchPath(SearchPathPlugin):
    """Append `soups/conf`."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the folder, found without importing the package."""
        spec = find_spec("soups")
        assert spec is not None
        assert spec.origin is not None
        search_path.append("soups", f"file://{Path(spec.origin).parent / 'conf'}")
