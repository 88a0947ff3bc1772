"""The tensors of a module that are averaged, where they are kept, and how they change when the module does."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from operator import is_
from typing import Any, NamedTuple

from torch import Tensor, nn

from soups.stores.averages import plain_name
from soups.weights import is_averaged, is_running_statistic

from .sharding import any_sharded, local

# Where a tensor is: the dictionary of its owner, and its key there.
Cell = tuple[dict[str, Any], str]


class TensorChange(NamedTuple):
    """How the tensors of a module have changed.

    Attributes:
        renamed: old name to new name; the parameter is the same object.
        joined: names of tensors that are new, or new objects under an old name.
        gone: names of tensors that are no longer there.
    """

    renamed: dict[str, str]
    joined: list[str]
    gone: list[str]

    def __str__(self) -> str:
        parts = [("joined", self.joined), ("gone", self.gone)]
        parts.append(("renamed", [f"{old} → {new}" for old, new in self.renamed.items()]))
        return "; ".join(
            f"{what}: {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
            for what, names in parts
            if names
        )


class Tensors:
    """Trainable parameters and running statistics of a module, tied ones once, by plain name.

    Args:
        module: the module. Parameters are looked up in it anew at every use, so that exchanged ones are seen.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.cells: dict[str, Cell] = {}
        self.frozen: dict[str, Cell] = {}
        self.buffers: set[str] = set()
        self._objects: dict[str, Tensor] = {}
        self._shapes: dict[str, Any] = {}
        self._lazy: list[str] = []
        self._layout: list[tuple[dict[str, Any], list[str], list[Any]]] = []
        self._find()

    def _find(self) -> None:
        tracked = {id(tensor) for tensor in self._objects.values()}
        self.cells, self.frozen, self.buffers, self._layout = {}, {}, set(), []
        seen: set[int] = set()
        for prefix, layer in self.module.named_modules():
            for held in (layer._modules, layer._parameters):
                self._layout.append((held, list(held), list(held.values())))
            for key, parameter in layer._parameters.items():
                if parameter is None or id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                name = plain_name(f"{prefix}.{key}" if prefix else key)
                # One that was frozen after it was averaged is averaged still.
                trained = parameter.requires_grad or id(parameter) in tracked
                (self.cells if trained else self.frozen)[name] = (layer._parameters, key)
            for key, buffer in layer._buffers.items():
                if buffer is None or key in layer._non_persistent_buffers_set or id(buffer) in seen:
                    continue
                if is_running_statistic(key) and is_averaged(buffer):
                    seen.add(id(buffer))
                    name = plain_name(f"{prefix}.{key}" if prefix else key)
                    self.cells[name] = (layer._buffers, key)
                    self.buffers.add(name)
        self._remember()

    def _remember(self) -> None:
        self._objects = self.originals()
        self._shapes = {name: tensor.shape for name, tensor in self._objects.items() if not _lazy(tensor)}
        self._lazy = [name for name, tensor in self._objects.items() if _lazy(tensor)]

    def originals(self) -> dict[str, Tensor]:
        """Return the module's tensors by name, DTensors whole."""
        return {name: cell[key] for name, (cell, key) in self.cells.items()}

    def weights(self) -> dict[str, Tensor]:
        """Return the tensors as they are now, this process's shards."""
        return {name: local(cell[key]) for name, (cell, key) in self.cells.items()}

    def thaw(self, name: str) -> Tensor:
        """Count a parameter, frozen until now, among those that are averaged; return it."""
        if name in self.frozen:
            self.cells[name] = self.frozen.pop(name)
            self._remember()
        cell, key = self.cells[name]
        return cell[key]

    def thawed(self) -> list[str]:
        """Name the parameters that were frozen and are trainable now."""
        return [name for name, (cell, key) in self.frozen.items() if key in cell and cell[key].requires_grad]

    # Changes --------------------------------------------------------------------------------------------------------

    def _same(self) -> bool:
        for held, keys, values in self._layout:
            if len(held) != len(values) or not all(map(is_, held.values(), values)) or list(held) != keys:
                return False
        # The parameters are the same objects. Statistics may be new ones, and lazy tensors get their shapes late.
        for name in (*self.buffers, *self._lazy):
            cell, key = self.cells[name]
            tensor = cell.get(key)
            if tensor is None or _lazy(tensor) or tensor.shape != self._shapes.get(name):
                return False
        return True

    def follow(self) -> TensorChange | None:
        """Look at the module again if its layers, parameters or shapes have changed; return how, or None if nothing did."""
        # Sharded modules exchange their parameters themselves, for whole ones and back, in every forward pass.
        if any_sharded(self._objects) or self._same():
            return None
        before, shapes = self._objects, self._shapes
        names = {id(tensor): name for name, tensor in before.items()}
        self._find()
        renamed: dict[str, str] = {}
        joined: list[str] = []
        for name, tensor in self._objects.items():
            old = names.get(id(tensor))
            if old is None and name in self.buffers and name in before:
                old = name  # statistics may be written as new tensors at every step
            if old is None or shapes.get(old) != tensor.shape:
                joined.append(name)
            elif old != name:
                renamed[old] = name
        kept = self._objects.keys() - set(joined) - set(renamed.values())
        gone = [name for name in before if name not in kept and name not in renamed and name not in joined]
        change = TensorChange(renamed, joined, gone)
        return change if any(change) else None


def _lazy(tensor: Tensor) -> bool:
    return nn.parameter.is_lazy(tensor)
