"""Whether a module keeps its weight as (out, in), like `Linear`, or as (in, out), like transformers' `Conv1D`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cached_property

from soups.errors import WeightsError
from soups.stores.names import Architecture
from soups.stores.names.rules import template
from soups.stores.store import Store


class Layouts:
    """Decides the layout of square matrices, whose shape does not tell it.

    PEFT records the layout of the last targeted module only. The evidence here is, in this order: a name (a convolution's
    matrix is a `Conv1D`'s), modules of the same name in other places, modules beside it, all modules, and what PEFT
    recorded; transformers is asked where these disagree.

    Args:
        base: the base model, whose biases tell which axis the outputs are.
        recorded: PEFT's `fan_in_fan_out`.
        architecture: asked for what transformers knows; may be slow.
    """

    def __init__(self, base: Store, *, recorded: bool, architecture: Callable[[], Architecture | None]) -> None:
        self._base, self._recorded, self._architecture = base, recorded, architecture
        self._seen: dict[str, bool] = {}

    def see(self, module: str, *, transposed: bool) -> None:
        """Take note of a module whose layout its shape tells."""
        self._seen[module] = transposed

    @cached_property
    def _from_biases(self) -> Mapping[str, bool]:
        names = set(self._base)
        found: dict[str, bool] = {}
        for name in names:
            module = name.removesuffix(".weight")
            if module == name or f"{module}.bias" not in names:
                continue
            shape, bias = self._base.meta(name).shape, self._base.meta(f"{module}.bias").shape
            if len(shape) == 2 and len(bias) == 1 and shape[0] != shape[1] and bias[0] in shape:
                found[module] = bias[0] == shape[1]
        return found

    def transposed(self, module: str) -> bool:
        """Tell whether a square matrix is kept as (in, out).

        Raises:
            WeightsError: nothing tells.
        """
        parent, _, leaf = module.rpartition(".")
        if re.search(r"conv", leaf, re.IGNORECASE):
            return True
        evidence = {**self._from_biases, **self._seen}
        same = {kind for name, kind in evidence.items() if name.rpartition(".")[2] == leaf and not leaf.isdigit()}
        if len(same) == 1:
            return same.pop()
        beside = {
            kind for name, kind in evidence.items() if template(name.rpartition(".")[0])[0] == template(parent)[0]
        }
        if not same and len(beside) == 1 and self._recorded in beside:
            return beside.pop()
        every = set(evidence.values())
        if not same and not beside and every <= {self._recorded}:
            return self._recorded
        known = self._architecture()
        if known is not None:
            for known_kind, modules in ((False, known.linear), (True, known.transposed)):
                if any(
                    module == name or module.endswith(f".{name}") or name.endswith(f".{module}") for name in modules
                ):
                    return known_kind
        raise WeightsError(
            f"{self._base.location}: {module!r} is square, and the other modules and the adapter's fan_in_fan_out do not agree "
            f"on whether it is kept as (out, in) or as (in, out). Name a model folder with a config.json as the base, or "
            f"merge the adapter with PEFT."
        )
