"""Stochastic weight averaging: the equal mean of the points of a trajectory.

Averaging Weights Leads to Wider Optima and Better Generalization (arXiv:1803.05407), equation 2:
a ← (a n + θ)/(n + 1). The learning-rate schedules of the paper are in `schedulers`, to be used or not.
"""

from __future__ import annotations

# torch's foreach functions carry an underscore but are what torch.optim itself is made of.
# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from soups.averaging.lerp import Lerp, lerp_
from soups.averaging.mean import MeanOptions, storage_dtype
from soups.errors import ConfigError
from soups.reduction import accumulation_dtype, divide_
from soups.weights import Weights


class SWA(Lerp):
    """Equal mean of all points, by the one reduction of the package (`soups.reduction`).

    What is kept is the sum of the points, in float64 for float32 weights and in float32 for 16-bit ones, so that `value()`
    has the bits that `recipes.uniform` and `merge("linear")` give for the same points. With `dtype="bfloat16"` a running
    mean is kept instead, in a quarter of the memory, and rounded stochastically at each update.

    Args:
        **keep: see `soups.averaging.mean.MeanOptions`; `dtype` is that of `value()`.

    Raises:
        ConfigError: `fused=True`; a sum reads and writes each element once already.

    >>> import torch
    >>> swa = SWA()
    >>> for value in (1.0, 2.0, 6.0):
    ...     swa.update({"w": torch.tensor([value])})
    >>> swa.value()["w"]
    tensor([3.])
    """

    kind = "SWA"

    def __init__(self, **keep: Unpack[MeanOptions]) -> None:
        super().__init__(**keep)
        if self.fused:
            raise ConfigError(
                "SWA keeps a sum of its points and has nothing to fuse; fused=True is for EMA and power-function averages."
            )
        # The plane "mean" then holds the sum; `value` divides it.
        self._summed = self.dtype != torch.bfloat16
        self._dtypes: dict[str, torch.dtype] = {}

    def _next_weight(self) -> float:
        return 1 / (self.count + 1)

    def _stored_dtype(self, weight: torch.dtype, plane: str) -> torch.dtype:
        if not self._summed:
            return super()._stored_dtype(weight, plane)
        asked = torch.float64 if self.dtype == torch.float64 else weight
        return accumulation_dtype(weight, asked)

    def _prepare(self, weights: Weights) -> None:
        super()._prepare(weights)
        self._dtypes = {name: storage_dtype(tensor.dtype, self.dtype) for name, tensor in weights.items()}

    def _apply(self, index: int, views: dict[str, list[Tensor]], theta: list[Tensor]) -> None:
        if not self._summed:
            super()._apply(index, views, theta)
        elif self._before == 0:
            torch._foreach_copy_(views["mean"], theta)
        else:
            torch._foreach_add_(views["mean"], theta)

    def value(self) -> dict[str, Tensor]:
        """Return the average: name to tensor, in the dtype that was asked for. The tensors are new ones.

        Raises:
            WeightsError: nothing has been averaged yet.
        """
        total = super().value()
        if not self._summed:
            return total
        return {name: divide_(tensor.clone(), self.count).to(self._dtypes[name]) for name, tensor in total.items()}

    @torch.no_grad()
    def admit(self, name: str, tensor: Tensor) -> None:
        """Let a tensor join that was constant until now: `count` times the constant is exact in the sum's dtype."""
        super().admit(name, tensor)
        if self._summed and self.count and self.covers(name):
            self._planes["mean"][name].mul_(self.count)
            self._dtypes[name] = storage_dtype(tensor.dtype, self.dtype)

    def follow(self, renamed: Mapping[str, str], joined: Weights, gone: Sequence[str]) -> None:
        """Go on with a module whose tensors have changed; see `Mean.follow`."""
        kept = {renamed.get(name, name): dtype for name, dtype in self._dtypes.items() if name not in gone}
        self._dtypes = kept
        super().follow(renamed, joined, gone)

    def state_dict(self) -> dict[str, Any]:
        """Return all that an exact restore needs: the mean in the plane "mean", for readers, and the sum in "sum"."""
        state = super().state_dict()
        if not self._summed or not self.count:
            return state
        return {**state, "planes": {"mean": self.value(), "sum": state["planes"]["mean"]}}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned. Where there is a mean and no sum, the sum is `count` times the mean.

        Raises:
            ConfigError: the state is of another kind of average.
        """
        super().load_state_dict(state)
        if not self._summed:
            self._planes.pop("sum", None)
            return
        means = self._planes.get("mean", {})
        self._dtypes = {name: tensor.dtype for name, tensor in means.items()}
        sums = self._planes.pop("sum", None)
        if sums is None:
            sums = {
                name: tensor.to(accumulation_dtype(tensor.dtype)).mul_(self.count) for name, tensor in means.items()
            }
        self._planes["mean"] = sums


def swa_update_(average: Weights, weights: Weights, count: int) -> None:
    """Update an equal average in place: the plain function behind `SWA`.

    Args:
        average: name to tensor; overwritten.
        weights: the same names and shapes; the new point.
        count: points taken in before this one.
    """
    lerp_(average, weights, 1 / (count + 1))
