"""Sums in float64 with their counts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from soups.errors import WeightsError


class Sums:
    """Named sums in float64, and over how many rows each is.

    On devices without float64 the sums are on the CPU. `aliases` maps a name to another whose sum it shares.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.aliases: dict[str, str] = {}
        self.rows: dict[str, int] = {}

    def add(self, name: str, value: Tensor, rows: int) -> None:
        """Add a value of some rows.

        Raises:
            WeightsError: the value is not finite.
        """
        value = value.detach()
        if not bool(torch.isfinite(value).all()):
            raise WeightsError(
                f"{name}: the sum over this batch is not finite. The model's activations or gradients hold NaN or infinity; "
                f"check the data and the weights, or collect in float32 instead of half precision."
            )
        value = value.double() if value.device.type != "mps" else value.cpu().double()
        if name in self.tensors:
            self.tensors[name] += value
        else:
            self.tensors[name] = value.clone()
        self.rows[name] = self.rows.get(name, 0) + rows

    def share(self, name: str, first: str) -> None:
        """Drop a sum that is equal to another and will stay so."""
        self.aliases[name] = first
        for numbers in (self.tensors, self.rows):
            numbers.pop(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors
