"""Averages whose update is a step towards the weights, with a number for its length."""

# torch's foreach functions carry an underscore but are what torch.optim itself is made of.
# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Unpack

import torch
from torch import Tensor

from soups.averaging.mean import Mean, MeanOptions
from soups.averaging.rounding import noise_like, round_stochastically_
from soups.seeding import derive_seed, generator
from soups.weights import Weights

# Elements that are rounded at once on a GPU; some five temporaries of four bytes each, 80 MiB.
AT_ONCE = 1 << 22


class Lerp(Mean):
    """An average whose update is a ← a + w (θ - a), with w a number: running mean, exponential, power function."""

    revisits = False

    def __init__(self, **keep: Unpack[MeanOptions]) -> None:
        super().__init__(**keep)
        self._weight = 1.0
        self._weights: dict[torch.dtype, Tensor] = {}
        self._generators: dict[str, torch.Generator] = {}

    @abstractmethod
    def _next_weight(self) -> float:
        """Return the weight w of the next point; `self.count` points were taken before it."""

    def _begin(self) -> None:
        self._weight = 1.0 if self.count == 0 else self._next_weight()
        self._weights = {}
        self._generators = {}

    def _apply(self, index: int, views: dict[str, list[Tensor]], theta: list[Tensor]) -> None:
        mean = views["mean"]
        if mean[0].dtype == torch.bfloat16:
            self._apply_rounded(index, mean, theta)
        elif self._weight == 1.0:
            torch._foreach_copy_(mean, theta)
        elif mean[0].device.type == "cpu":
            torch._foreach_lerp_(mean, theta, [self._tensor(mean[0].dtype)] * len(mean))
        else:
            torch._foreach_lerp_(mean, theta, self._weight)

    def _fused_weight(self, index: int) -> Tensor | None:
        views = self._views[index]
        if not self.fused or self._weight == 1.0 or views is None:
            return None
        first = views["mean"][0]
        if first.device.type != "cpu" or first.dtype == torch.bfloat16:
            return None
        return self._tensor(first.dtype)

    def _tensor(self, dtype: torch.dtype) -> Tensor:
        """Return the weight as a tensor: on CPU torch's lerp of a tensor is a tenth faster than that of a number."""
        if dtype not in self._weights:
            self._weights[dtype] = torch.tensor(self._weight, dtype=dtype)
        return self._weights[dtype]

    def _apply_rounded(self, index: int, mean: list[Tensor], theta: list[Tensor]) -> None:
        assert self._pass is not None
        names = [name for name, _ in self._pass.entries[index]]
        if mean[0].device.type != "cpu":
            self._apply_rounded_at_once(names, mean, theta)
            return
        for name, target, source in zip(names, mean, theta, strict=True):
            # Seeded by the number of the update and the tensor's name: a resumed run, every rank and every grouping
            # draw the same bits. The parts of a large tensor share one generator, in order.
            if name not in self._generators:
                self._generators[name] = generator(self.seed, "rounding", self._before, name, device=target.device)
            moved = source if self._weight == 1.0 else torch.lerp(target.float(), source, self._weight)
            round_stochastically_(target, moved, noise_like(moved, self._generators[name]))

    def _apply_rounded_at_once(self, names: list[str], mean: list[Tensor], theta: list[Tensor]) -> None:
        """Do the same to many tensors side by side: on a GPU each operation on each tensor would be a launch of its own."""
        draw = torch.Generator(mean[0].device)
        for batch in _batches([tensor.numel() for tensor in mean]):
            targets = [mean[n] for n in batch]
            sizes = [target.numel() for target in targets]
            moved = torch.cat([theta[n].reshape(-1) for n in batch])
            if self._weight != 1.0:
                moved = torch.cat([target.reshape(-1) for target in targets]).float().lerp_(moved, self._weight)
            noise = torch.empty_like(moved, dtype=torch.int32)
            for n, part in zip(batch, noise.split(sizes), strict=True):
                draw.manual_seed(derive_seed(self.seed, "rounding", self._before, names[n]))
                part.random_(0, 1 << 16, generator=draw)
            rounded = torch.empty_like(moved, dtype=torch.bfloat16)
            round_stochastically_(rounded, moved, noise)
            parts = [part.view(target.shape) for part, target in zip(rounded.split(sizes), targets, strict=True)]
            torch._foreach_copy_(targets, parts)


def _batches(sizes: list[int]) -> Iterator[list[int]]:
    """Cut numbers of elements into stretches of about `AT_ONCE` elements; yield their places."""
    batch: list[int] = []
    filled = 0
    for place, size in enumerate(sizes):
        batch.append(place)
        filled += size
        if filled >= AT_ONCE:
            yield batch
            batch, filled = [], 0
    if batch:
        yield batch


@torch.no_grad()
def lerp_(average: Weights, weights: Weights, weight: float) -> None:
    """Move `average` towards `weights` in place: a ← a + weight (θ - a)."""
    for name, tensor in average.items():
        if tensor.is_floating_point() or tensor.is_complex():
            tensor.lerp_(weights[name].detach().to(tensor.device, tensor.dtype), weight)
