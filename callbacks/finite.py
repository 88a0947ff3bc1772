"""Tell when an average holds values that are not finite."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from soups.averaging.mean import Mean
from soups.weights import Weights


def _bad(tensor: Tensor) -> bool:
    # One pass without a temporary; the sum of a healthy tensor can only overflow in float16, so it is taken in float32.
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    total = tensor.sum(dtype=torch.float64 if tensor.dtype == torch.float64 else torch.float32)
    return not bool(torch.isfinite(total)) and not bool(torch.isfinite(tensor).all())


class Finite:
    """Remembers whether one average was warned of, so that it is once."""

    def __init__(self) -> None:
        self._checked = 0
        self._warned = False

    @torch.no_grad()
    def check(self, name: str, mean: Mean, weights: Weights, step: int) -> None:
        """Warn if the average holds NaN or infinity in an element where the weights have a finite value, or are NaN.

        Args:
            name: the average's name.
            mean: the average.
            weights: the raw weights.
            step: optimizer steps so far.
        """
        if self._warned or self._checked == mean.count:
            return
        self._checked = mean.count
        for key, tensor in mean.value().items():
            if not tensor.is_floating_point() and not tensor.is_complex():
                continue
            if not _bad(tensor):
                continue
            raw = weights[key].detach().to(tensor.device) if key in weights else tensor
            wrong = ~torch.isfinite(tensor) & (torch.isfinite(raw) | torch.isnan(raw) | torch.isnan(tensor))
            if not bool(wrong.any()):
                continue  # infinite where the weights are: a mask
            self._warned = True
            cause = (
                "so do the raw weights: training has diverged"
                if not bool(torch.isfinite(raw).all())
                else "the raw weights are finite again, but an average never forgets one bad point"
            )
            warnings.warn(
                f"The average {name!r} holds {int(wrong.sum())} values that are not finite in {key!r} after {step} steps; "
                f"{cause}. Start again from a checkpoint before it happened (a lower learning rate or clipped gradients help).",
                stacklevel=3,
            )
            return
