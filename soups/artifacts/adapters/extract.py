"""`extract_adapter`: what a full fine-tune changed, as a LoRA adapter of its base."""

from __future__ import annotations

import os
import re
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from soups.artifacts.adapters.factors import Pair, factored
from soups.artifacts.adapters.writing import write_adapter
from soups.errors import ConfigError, WeightsError
from soups.stores.folder import folder_of
from soups.stores.names import Architecture, architecture_of, reconcile
from soups.stores.names.rules import is_embedding, is_head
from soups.stores.opening import Checkpoint, open_store
from soups.stores.store import Store

_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class Extracted:
    """An adapter that was extracted.

    Attributes:
        path: its folder.
        ranks: the rank of each module.
        kept: the share of Σσ² of each module's change that the adapter keeps, 1 for all of it.
        saved: the modules that it holds in full.
    """

    path: Path
    ranks: dict[str, int]
    kept: dict[str, float]
    saved: tuple[str, ...]


def extract_adapter(
    model: Checkpoint,
    base: Checkpoint,
    out: str | os.PathLike[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    save_heads: bool = True,
    overwrite: bool = False,
) -> Extracted:
    """Write the difference of a fine-tuned model and its base as a LoRA adapter that PEFT loads.

    Each matrix and kernel that changed gets the best factors of its difference, by singular values. What has no factors
    (norms, biases), embeddings and output heads are saved in full, as PEFT's `modules_to_save`.

    Args:
        model: the fine-tuned model.
        base: the model that it started from.
        out: the folder to make.
        rank: the most columns of a module's factors.
        energy: the share of Σσ² of each module's change to keep, at most 1: the rank follows, up to `rank`.
        save_heads: save embeddings and output heads in full; False gives them factors too.
        overwrite: replace an adapter that is at `out`.

    Raises:
        ConfigError: neither rank nor energy, or one out of range.
        WeightsError: the models do not fit each other, or do not differ.
        StorageError: a model cannot be read, or `out` cannot be written.
    """
    if rank is None and energy is None:
        raise ConfigError("Say how much to keep: a rank (16, say), an energy (0.99, say), or both.")
    if (rank is not None and rank < 1) or (energy is not None and not 0 < energy <= 1):
        raise ConfigError(f"rank={rank} must be at least 1, and energy={energy} above 0 and at most 1.")
    with ExitStack() as stack:
        stores = {"base": stack.enter_context(open_store(base)), "model": stack.enter_context(open_store(model))}
        folders = {name: folder for name, store in stores.items() if (folder := folder_of(store)) is not None}
        shown = reconcile(stores, "base", folders).stores
        folder = folders.get("base")
        return _Extraction(shown["model"], shown["base"], architecture_of(folder), rank, energy, save_heads).write(
            Path(out), str(folder) if folder else None, overwrite=overwrite
        )


class _Extraction:
    def __init__(
        self,
        model: Store,
        base: Store,
        architecture: Architecture | None,
        rank: int | None,
        energy: float | None,
        save_heads: bool,
    ) -> None:
        self._model, self._base, self._architecture = model, base, architecture
        self._rank, self._energy, self._save_heads = rank, energy, save_heads
        self._names = set(base)
        missing = sorted(self._names - set(model))
        if missing:
            raise WeightsError(
                f"{model.location} lacks {len(missing)} tensors of {base.location}, {missing[0]!r} among them. Name the model "
                f"that the fine-tuning started from as the base."
            )
        self.pairs: dict[str, Pair] = {}
        self.kept: dict[str, float] = {}
        self.wholes: dict[str, Tensor] = {}
        self.saved: dict[str, None] = {}
        self.biases: dict[str, Tensor] = {}

    def write(self, out: Path, base: str | None, *, overwrite: bool) -> Extracted:
        """Extract, and write the adapter."""
        tied = {**self._model.tied(), **self._base.tied()}
        for name in self._model:
            if name not in tied and self._model.meta(name).dtype.is_floating_point:
                self._visit(name)
        self._complete()
        stacked = [module for module in self.pairs if _EXPERT.search(f"{module}.")]
        for module in stacked:  # PEFT stacks experts, so that they need one rank
            self.pairs[module] = _padded(self.pairs[module], max(self.pairs[one].rank for one in stacked))
        if not self.pairs and not self.wholes:
            raise WeightsError(
                f"{self._model.location} and {self._base.location} do not differ; there is nothing to extract."
            )
        path = write_adapter(
            out,
            self.pairs,
            wholes=self.wholes,
            modules_to_save=list(self.saved),
            bias="lora_only" if self.biases else "none",
            base=base,
            overwrite=overwrite,
        )
        kept = {module: share for module, share in self.kept.items() if module in self.pairs}
        return Extracted(path, {name: pair.rank for name, pair in self.pairs.items()}, kept, tuple(self.saved))

    def _visit(self, name: str) -> None:
        tensor = self._model.read(name)
        module, _, leaf = self._in_module(name).rpartition(".")
        known = name in self._names and tensor.shape == self._base.meta(name).shape
        change = tensor.float() - self._base.read(name).float() if known else None
        if change is not None and not bool(change.any()):
            return
        if not module:
            raise WeightsError(
                f"{self._model.location}: {leaf!r} changed and belongs to no module, so that an adapter cannot hold it."
            )
        if change is not None and leaf == "weight" and self._has_factors(module, name, change):
            self._factor(module, name, change)
        elif leaf == "bias" and known:
            self.biases[module] = tensor
        else:
            self.saved[module] = None

    def _complete(self) -> None:
        """Save whole modules whole, and biases with the factors of their weights."""
        for module in list(self.biases):
            if module not in self.pairs:
                self.saved[module] = None
        for module in list(self.saved):
            if any(module.startswith(f"{outer}.") for outer in self.saved):
                del self.saved[module]
        for name in self._model:
            inner = self._in_module(name)
            if any(inner.startswith(f"{module}.") for module in self.saved):
                self.wholes[inner] = self._model.read(name)
        self._keep_ties()
        inside = [one for one in self.pairs if any(f"{one}.".startswith(f"{module}.") for module in self.saved)]
        for module in inside:
            del self.pairs[module]
        self.biases = {module: tensor for module, tensor in self.biases.items() if module in self.pairs}
        self.wholes |= {f"{module}.base_layer.bias": tensor for module, tensor in self.biases.items()}

    def _keep_ties(self) -> None:
        """Save what is tied to a saved tensor as well: a wrapped module is a copy, and PEFT would leave the other as it was."""
        ties = {self._in_module(name): self._in_module(first) for name, first in self._model.tied().items()}
        ties |= dict(self._architecture.ties) if self._architecture else {}
        for name, first in ties.items():
            if first in self.wholes and name not in self.wholes:
                self.wholes[name] = self.wholes[first].clone()  # PEFT looks for both names in the file
                self.saved[name.rpartition(".")[0]] = None

    def _has_factors(self, module: str, name: str, change: Tensor) -> bool:
        if change.ndim < 2:
            return False
        if is_embedding(name) or is_head(name):
            return not self._save_heads
        if self._architecture is not None and module in self._architecture.modules:
            known = self._architecture
            return module in known.linear | known.transposed | known.convolutions
        if re.search(r"embed|position|relative_attention_bias", name):
            return False
        return change.ndim == 2 or change.shape[1] > 1  # a kernel of one input is that of a grouped convolution

    def _in_module(self, name: str) -> str:
        """Return a tensor's name in the module that PEFT wraps, where the library knows it."""
        if self._architecture is None:
            return name
        found = self._architecture.renames(name)
        prefixed = f"{self._architecture.prefix}.{found}"
        return next((one for one in (found, prefixed) if one in self._architecture.names), name)

    def _factor(self, module: str, name: str, change: Tensor) -> None:
        embedding = is_embedding(name) and change.ndim == 2
        if embedding or self._is_transposed(module):
            change = change.T
        out, inner = change.shape[0], change.shape[1:]
        like = Pair(torch.empty(1, *inner), torch.empty(out, 1, *[1] * (len(inner) - 1)), embedding=embedding)
        matrix = change.flatten(1)
        pair = factored(matrix, like, self._rank, self._energy)
        total = float(matrix.double().square().sum())
        self.kept[module] = min(1.0, float(pair.product().double().square().sum()) / total)
        self.pairs[module] = pair

    def _is_transposed(self, module: str) -> bool:
        return self._architecture is not None and module in self._architecture.transposed


def _padded(pair: Pair, rank: int) -> Pair:
    """Return factors with columns of zeros up to a rank."""
    more = rank - pair.rank
    a = torch.cat([pair.a, pair.a.new_zeros(more, *pair.a.shape[1:])])
    return Pair(
        a, torch.cat([pair.b, pair.b.new_zeros(pair.b.shape[0], more, *pair.b.shape[2:])], dim=1), pair.embedding
    )
