"""State-dict algebra and its rules.

*Weights* are a mapping from tensor name to tensor, as `Module.state_dict()` returns. Every part of the package follows these
rules:

- Floating tensors are averaged by the reduction in `soups.reduction`, and written in the requested dtype.
- Integer and bool tensors (`num_batches_tracked`, token ids) are copied from the first model.
- Key sets are compared before any work. The error for a mismatch lists missing, unexpected and mis-shaped tensors.
- Tensors that share storage (tied weights) are averaged once and stay tied.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from soups.errors import WeightsError
from soups.reduction import Sum

Weights = Mapping[str, Tensor]


def is_averaged(tensor: Tensor) -> bool:
    """Tell whether a tensor is averaged: floating and complex tensors are, integer and bool tensors are not."""
    return tensor.is_floating_point() or tensor.is_complex()


def is_running_statistic(name: str) -> bool:
    """Tell whether a name is that of a running mean or variance, as in BatchNorm and similar layers.

    An average of running statistics has a meaning. An average of masks, tables, codebooks or spectral norm vectors has none.

    >>> is_running_statistic("net.1.running_var"), is_running_statistic("mask"), is_running_statistic("weight_u")
    (True, False, False)
    """
    return name.rpartition(".")[2] in ("running_mean", "running_var", "running_std", "moving_mean", "moving_var")


def tied_names(weights: Weights) -> dict[str, str]:
    """Map each repeated tensor name to the first name of the same memory.

    Two names are tied when they view the same memory with the same shape and strides.

    >>> w = torch.zeros(2)
    >>> tied_names({"embed.weight": w, "head.weight": w, "bias": torch.zeros(2)})
    {'head.weight': 'embed.weight'}
    """
    first: dict[tuple[object, ...], str] = {}
    tied: dict[str, str] = {}
    for name, tensor in weights.items():
        if tensor.numel() == 0 or tensor.device.type == "meta":
            continue
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if place in first:
            tied[name] = first[place]
        else:
            first[place] = name
    return tied


def describe_mismatch(expected: Weights, found: Weights, *, limit: int = 6) -> str:
    """Describe the differences in names, shapes and dtypes between two sets of weights; return "" if there are none.

    >>> describe_mismatch({"a": torch.zeros(2)}, {"a": torch.zeros(3), "b": torch.zeros(1)})
    "1 unexpected ('b'); 1 mis-shaped ('a': expected (2,), found (3,))"
    """
    missing = [repr(name) for name in expected if name not in found]
    unexpected = [repr(name) for name in found if name not in expected]
    common = [name for name in expected if name in found]
    shapes = [
        f"{name!r}: expected {tuple(expected[name].shape)}, found {tuple(found[name].shape)}"
        for name in common
        if expected[name].shape != found[name].shape
    ]
    dtypes = [
        f"{name!r}: expected {expected[name].dtype}, found {found[name].dtype}"
        for name in common
        if is_averaged(expected[name]) != is_averaged(found[name])
    ]
    parts: list[str] = []
    for what, items in (
        ("missing", missing),
        ("unexpected", unexpected),
        ("mis-shaped", shapes),
        ("of another kind", dtypes),
    ):
        if items:
            more = f", and {len(items) - limit} more" if len(items) > limit else ""
            parts.append(f"{len(items)} {what} ({', '.join(items[:limit])}{more})")
    return "; ".join(parts)


def check_same(expected: Weights, found: Weights, *, where: str) -> None:
    """Check that `found` has the names, shapes and kinds of `expected`.

    Args:
        expected: the reference weights.
        found: the weights to check.
        where: the file or model that `found` came from, for the message.

    Raises:
        WeightsError: the weights differ; the message lists every kind of mismatch.
    """
    if problem := describe_mismatch(expected, found):
        raise WeightsError(
            f"{where} does not fit the other weights: {problem}. Ingredients of one soup need the same architecture, "
            f"head included; leave this one out or fine-tune it again from the shared start."
        )


def check_finite(weights: Weights, *, where: str) -> None:
    """Check that no floating tensor holds NaN or infinity.

    Raises:
        WeightsError: a tensor is not finite; the message names the file, the first such tensor and its number of such elements.
    """
    for name, tensor in weights.items():
        if is_averaged(tensor) and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise WeightsError(
                f"{where}: tensor {name!r} holds {bad} non-finite values (NaN or infinity) of {tensor.numel()}. One such "
                f"model would spoil the whole average; leave it out or train it again (a lower learning rate helps)."
            )


def hash_weights(weights: Weights) -> str:
    """Return the SHA-256 (hex) of names, dtypes, shapes and bytes; independent of the order of names.

    >>> hash_weights({"a": torch.ones(1), "b": torch.ones(2)}) == hash_weights({"b": torch.ones(2), "a": torch.ones(1)})
    True
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hash_architecture(weights: Weights) -> str:
    """Return the SHA-256 (hex) of names, dtypes and shapes: equal for weights that can be averaged."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(f"{name}|{weights[name].dtype}|{tuple(weights[name].shape)}\n".encode())
    return digest.hexdigest()


class RunningSum:
    """A weighted sum of whole models. It gives the mean of the added models, and the mean with one more model.

    Sums and means are rounded by the rule of `soups.reduction`. Memory is one accumulator per tensor, for any number of models.
    Means have the dtypes, integer tensors and tied names of the first model. `factor` is a model's weight in the sum: 1 by
    default; -1 removes a model that was added.

    >>> total = RunningSum()
    >>> total.add({"w": torch.tensor([1.0])}); total.add({"w": torch.tensor([3.0])})
    >>> total.mean()["w"], total.mean_with({"w": torch.tensor([5.0])})["w"], total.count
    (tensor([2.]), tensor([3.]), 2)
    """

    def __init__(self) -> None:
        self.count = 0
        self.total = 0.0
        self._sums: dict[str, Sum] = {}
        self._first: dict[str, Tensor] = {}
        self._tied: dict[str, str] = {}

    def add(self, weights: Weights, *, where: str = "an ingredient", factor: float = 1.0) -> None:
        """Add one model's weights, `factor` times.

        Raises:
            WeightsError: names, shapes or kinds differ from the first model's; nothing is added then.
        """
        if self.count == 0:
            self._tied = tied_names(weights)
            self._first = dict(weights)
            averaged = [name for name, tensor in weights.items() if is_averaged(tensor) and name not in self._tied]
            self._sums = {name: Sum() for name in averaged}
        else:
            check_same(self._first, weights, where=where)
        for name, total in self._sums.items():
            total.add(weights[name], factor)
        self.count += 1
        self.total += factor

    def mean(self) -> dict[str, Tensor]:
        """Return the mean of the models added so far."""
        return self._divide(None, 0.0)

    def mean_with(self, weights: Weights, *, where: str = "an ingredient", factor: float = 1.0) -> dict[str, Tensor]:
        """Return the mean of the added models and `factor` times `weights`, without adding `weights`."""
        if self.count == 0:
            single = RunningSum()
            single.add(weights, where=where, factor=factor)
            return single.mean()
        check_same(self._first, weights, where=where)
        return self._divide(weights, factor)

    def _divide(self, extra: Weights | None, factor: float) -> dict[str, Tensor]:
        divisor = self.total + factor
        if self.count == 0 or divisor == 0:
            raise WeightsError("The mean of no models was asked for; add at least one ingredient.")
        result: dict[str, Tensor] = {}
        for name, first in self._first.items():
            if name in self._tied:
                result[name] = result[self._tied[name]]
            elif name in self._sums:
                total = self._sums[name]
                found = total.quotient(divisor) if extra is None else total.quotient_with(extra[name], factor, divisor)
                result[name] = found.to(first.dtype)
            else:
                result[name] = first.clone()
        return result


def mean(models: Iterable[Weights]) -> dict[str, Tensor]:
    """Return the uniform average of several models' weights, holding one model and one accumulator at a time.

    Uniform soup, Model soups (arXiv:2203.05482), section 2. The rules for dtypes, integer and tied tensors are the
    module's.

    Raises:
        WeightsError: no models, or models that differ in names, shapes or kinds.
    """
    total = RunningSum()
    for number, weights in enumerate(models):
        total.add(weights, where=f"model number {number}")
    return total.mean()
