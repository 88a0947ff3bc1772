"""Mixout while fine-tuning."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from soups.averaging.mixout import mixout
from soups.errors import ConfigError, WeightsError
from soups.seeding import generator

from .matrices import Choice, MixoutMatrix, find_matrices

KEY = "mixout_anchor"


class Mixout(Callback):
    """Randomly put the matrices of linear maps back to the pre-trained ones in every training batch (arXiv:1909.11299).

    The anchor is the module's weights when the fit begins; it is saved with checkpoints, so that a resumed run keeps it.
    One mask is drawn a batch and matrix, from the seed and the batch's number: a resumed run, activation checkpointing and
    all processes draw the same. Matrices that cannot be reached are named in a warning.

    Args:
        p: probability with which an element is put back; the paper uses 0.7 to 0.9.
        share: "column" shares a draw down each input column, as the published code does; "element" draws for each.
        layers: which modules are treated, by name and module. When None, linear layers, attention that keeps matrices of its
            own (`nn.MultiheadAttention`, XLNet), and matrices in other modules; never embeddings, convolutions, norms.
        seed: seed of the masks.

    Raises:
        ConfigError: p outside [0, 1), or an unknown `share`.
    """

    def __init__(
        self,
        p: float = 0.7,
        *,
        share: str = "column",
        layers: Choice | None = None,
        seed: int = 0,
    ) -> None:
        mixout(torch.zeros(1, 1), torch.zeros(1, 1), p, share=share)
        self.p, self.share, self.seed = p, share, seed
        self.layers = layers
        self._anchor: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        self._mixed: set[str] = set()
        self._names: list[str] = []
        self._batch = 0
        self._resumed = False
        self._warned = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget an earlier fit's anchor."""
        if stage == "fit":
            self._anchor, self._batch, self._resumed, self._warned = {}, 0, False, False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the anchor and hook into the modules that read the matrices."""
        matrices, missed = find_matrices(pl_module, self.layers)
        if not matrices:
            warnings.warn("Mixout found no trainable matrix of a linear map; it does nothing.", stacklevel=2)
        if missed:
            _leave_out(missed, "recurrent, bilinear and parametrized layers compute with copies of them")
        now = {matrix.name: matrix.owner._parameters[matrix.key] for matrix in matrices}
        if not self._resumed:
            self._anchor = {name: weight.detach().clone() for name, weight in now.items() if weight is not None}
        if absent := sorted(now.keys() - self._anchor.keys()):
            raise WeightsError(
                f"The checkpoint holds no Mixout anchor for {absent[:6]}: it was written with other layers. Resume with "
                f"the same layers, or start a new fit from its weights."
            )
        for name, weight in now.items():
            if hasattr(weight, "to_local"):
                raise ConfigError("Mixout does not support sharded parameters (DTensor). Use DDP.")
            if weight is not None:
                self._anchor[name] = self._anchor[name].to(weight.device)
        self._names = list(now)
        self._hook(pl_module, matrices)

    def _hook(self, module: nn.Module, matrices: list[MixoutMatrix]) -> None:
        # Torch's attention reads the matrix of its output layer without calling that layer.
        readers = {
            part: layer
            for layer in module.modules()
            if isinstance(layer, nn.MultiheadAttention)
            for part in layer.modules()
        }
        calls: dict[nn.Module, list[MixoutMatrix]] = {}
        for matrix in matrices:
            calls.setdefault(readers.get(matrix.owner, matrix.owner), []).append(matrix)
        for layer, used in calls.items():
            mixer = _Mixer(self, used)
            self._handles.append(layer.register_forward_pre_hook(mixer.enter))
            # always_call: the parameter comes back even if the forward pass fails
            self._handles.append(layer.register_forward_hook(mixer.leave, always_call=True))

    def mix(self, matrix: MixoutMatrix) -> bool:
        """Put the mixed matrix in place of the parameter; tell whether that was done."""
        owner, key = matrix.owner, matrix.key
        weight = owner._parameters.get(key)
        if weight is None or not owner.training or not torch.is_grad_enabled():
            return False
        draw = generator(self.seed, "mixout", matrix.name, self._batch, device=weight.device)
        anchor = self._anchor[matrix.name]
        if anchor.shape != weight.shape:
            raise WeightsError(
                f"{matrix.name!r} has shape {tuple(weight.shape)}, and had {tuple(anchor.shape)} when the fit began. Mixout "
                f"goes back to the weights of the beginning; exchange layers before the fit."
            )
        mixed = mixout(weight, anchor, self.p, share=self.share, inputs=matrix.inputs, generator=draw)
        owner.__dict__.setdefault("_mixout_order", list(owner._parameters))
        owner.__dict__.setdefault("_mixout_held", {})[key] = owner._parameters.pop(key)
        owner.__dict__[key] = mixed
        self._mixed.add(matrix.name)
        return True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draw new masks for the next batch; after the first, say which matrices were not reached."""
        self._batch += 1
        lost = [name for name in self._names if name not in self._mixed]
        if lost and not self._warned:
            _leave_out(
                lost, "the modules that hold them were not called in training mode; others read their parameters"
            )
        self._warned = True

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Take the hooks off."""
        self._detach()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take the hooks off."""
        self._detach()

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._mixed = [], set()

    def state_dict(self) -> dict[str, Any]:
        """Return the anchor and the number of batches, for a resumed run."""
        return {KEY: self._anchor, "batch": self._batch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the anchor of the run that is resumed."""
        self._anchor, self._batch, self._resumed = dict(state_dict[KEY]), int(state_dict["batch"]), True


class _Mixer:
    """The pair of hooks of one module: what its call has mixed, its return brings back."""

    def __init__(self, callback: Mixout, matrices: list[MixoutMatrix]) -> None:
        self._callback, self._matrices = callback, matrices
        self._calls: list[list[MixoutMatrix]] = []

    def enter(self, layer: nn.Module, _: Any) -> None:
        """Mix the matrices that this module reads."""
        done: list[MixoutMatrix] = []
        self._calls.append(done)
        for matrix in self._matrices:
            if self._callback.mix(matrix):
                done.append(matrix)

    def leave(self, layer: nn.Module, _: Any, __: Any) -> None:
        """Bring back the parameters that this call has mixed."""
        for matrix in self._calls.pop() if self._calls else []:
            _bring_back(matrix.owner, matrix.key)


def _bring_back(owner: nn.Module, key: str) -> None:
    held: dict[str, Any] = owner.__dict__["_mixout_held"]
    del owner.__dict__[key]
    there = {**owner._parameters, key: held.pop(key)}
    # the order of parameters stays what it was
    order = [name for name in owner.__dict__["_mixout_order"] if name in there]
    owner._parameters.clear()
    owner._parameters.update({name: there[name] for name in [*order, *(n for n in there if n not in order)]})
    if not held:
        del owner.__dict__["_mixout_held"], owner.__dict__["_mixout_order"]


def _leave_out(names: list[str], why: str) -> None:
    warnings.warn(
        f"Mixout leaves out {len(names)} matrices ({', '.join(names[:6])}{', …' if len(names) > 6 else ''}): {why}.",
        stacklevel=3,
    )
