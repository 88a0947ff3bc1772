"""Mixout while fine-tuning."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from soups.averaging.checkpoint import plain_name
from soups.averaging.mixout import mixout
from soups.errors import ConfigError, WeightsError
from soups.seeding import generator

KEY = "mixout_anchor"


class Mixout(Callback):
    """Randomly put weights of linear layers back to the pre-trained ones in every training batch (arXiv:1909.11299).

    The anchor is the module's weights when the fit begins; it is saved with checkpoints, so that a resumed run keeps it.
    One mask is drawn a batch and tensor, from the seed and the batch's number: a resumed run, activation checkpointing and
    all processes draw the same.

    Args:
        p: probability with which an element is put back; the paper uses 0.7 to 0.9.
        share: "column" shares a draw down each input column, as the published code does; "element" draws for each.
        layers: which modules are treated, by name and module; every `nn.Linear` when None.
        seed: seed of the masks.

    Raises:
        ConfigError: p outside [0, 1), or an unknown `share`.
    """

    def __init__(
        self,
        p: float = 0.7,
        *,
        share: str = "column",
        layers: Callable[[str, nn.Module], bool] | None = None,
        seed: int = 0,
    ) -> None:
        mixout(torch.zeros(1, 1), torch.zeros(1, 1), p, share=share)
        self.p, self.share, self.seed = p, share, seed
        self.layers = layers
        self._anchor: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        self._batch = 0
        self._resumed = False

    def _chosen(self, module: pl.LightningModule) -> dict[str, nn.Module]:
        found: dict[str, nn.Module] = {}
        for name, layer in module.named_modules():
            wanted = self.layers(name, layer) if self.layers is not None else isinstance(layer, nn.Linear)
            weight = layer._parameters.get("weight")
            if wanted and weight is not None and weight.requires_grad:
                found[plain_name(name)] = layer
        return found

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget an earlier fit's anchor."""
        if stage == "fit":
            self._anchor, self._batch, self._resumed = {}, 0, False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the anchor and hook into the chosen layers."""
        chosen = self._chosen(pl_module)
        if not chosen:
            warnings.warn("Mixout found no trainable linear layer; it does nothing.", stacklevel=2)
        if not self._resumed:
            self._anchor = {
                name: layer._parameters["weight"].detach().clone()  # type: ignore[union-attr]
                for name, layer in chosen.items()
            }
        if missing := sorted(chosen.keys() - self._anchor.keys()):
            raise WeightsError(
                f"The checkpoint holds no Mixout anchor for {missing[:6]}: it was written with other layers. Resume with "
                f"the same layers, or start a new fit from its weights."
            )
        for name, layer in chosen.items():
            weight = layer._parameters["weight"]
            if hasattr(weight, "to_local"):
                raise ConfigError("Mixout does not support sharded parameters (DTensor). Use DDP.")
            self._anchor[name] = self._anchor[name].to(weight.device)  # type: ignore[union-attr]
            self._handles.append(layer.register_forward_pre_hook(self._mixer(name)))
            # always_call: the parameter comes back even if the forward pass fails
            self._handles.append(layer.register_forward_hook(self._unmix, always_call=True))

    def _mixer(self, name: str) -> Callable[[nn.Module, Any], None]:
        def mix(layer: nn.Module, _: Any) -> None:
            weight = layer._parameters["weight"]
            if not layer.training or not torch.is_grad_enabled() or weight is None:
                return
            draw = generator(self.seed, "mixout", name, self._batch, device=weight.device)
            mixed = mixout(weight, self._anchor[name], self.p, share=self.share, generator=draw)
            layer.__dict__["_mixout_weight"] = layer._parameters.pop("weight")
            layer.__dict__["weight"] = mixed

        return mix

    def _unmix(self, layer: nn.Module, _: Any, __: Any) -> None:
        if "_mixout_weight" in layer.__dict__:
            del layer.__dict__["weight"]
            rest = dict(layer._parameters)
            layer._parameters.clear()
            # the order of parameters stays what it was
            layer._parameters["weight"] = layer.__dict__.pop("_mixout_weight")
            layer._parameters.update(rest)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draw new masks for the next batch."""
        self._batch += 1

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Take the hooks off."""
        self._detach()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take the hooks off."""
        self._detach()

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def state_dict(self) -> dict[str, Any]:
        """Return the anchor and the number of batches, for a resumed run."""
        return {KEY: self._anchor, "batch": self._batch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the anchor of the run that is resumed."""
        self._anchor, self._batch, self._resumed = dict(state_dict[KEY]), int(state_dict["batch"]), True
