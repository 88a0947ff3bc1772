"""`merge_adapters`: several LoRA adapters of one base in, one adapter out."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from soups.artifacts.adapters.factors import Adapter, Pair, concatenated, factored, truncated
from soups.artifacts.adapters.writing import write_adapter
from soups.errors import ConfigError, StorageError, WeightsError, did_you_mean
from soups.merging import merge
from soups.merging.method import Method
from soups.merging.methods.dare import Drop
from soups.merging.methods.knots import KnOTS
from soups.merging.stages import Elect, TaskVectors
from soups.merging.transforms import Keep, Trim

Make = Callable[..., Method]


def _linear(weight: list[float], density: float, seed: int) -> Method:
    del density, seed
    return TaskVectors(Keep(), tuple(weight), None, "sum")


def _ties(weight: list[float], density: float, seed: int) -> Method:
    del seed
    return TaskVectors(Trim(density, within="tensor", exact=True), tuple(weight), Elect(zero="plus"), "count")


def _dare_linear(weight: list[float], density: float, seed: int) -> Method:
    return TaskVectors(Drop(density, seed=seed), tuple(weight), None, "sum")


def _dare_ties(weight: list[float], density: float, seed: int) -> Method:
    return TaskVectors(Drop(density, seed=seed), tuple(weight), Elect(zero="plus"), "count")


def _magnitude_prune(weight: list[float], density: float, seed: int) -> Method:
    del seed
    return TaskVectors(Trim(density, within="tensor", exact=True), tuple(weight), None, "sum")


_ELEMENTWISE: dict[str, Make] = {
    "linear": _linear,
    "ties": _ties,
    "dare_linear": _dare_linear,
    "dare_ties": _dare_ties,
    "magnitude_prune": _magnitude_prune,
}
ADAPTER_METHODS = (
    "cat", "svd", *_ELEMENTWISE, "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd", "knots",
)  # fmt: skip
"""Names of the ways to merge adapters."""


@dataclass(frozen=True)
class _Settings:
    method: str
    weights: list[float]
    density: float
    rank: int | None
    seed: int


def merge_adapters(
    adapters: Sequence[str | os.PathLike[str]],
    *,
    out: str | os.PathLike[str],
    method: str = "svd",
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Merge LoRA adapters of one base into an adapter that PEFT loads.

    | method | merges | rank of the result |
    |---|---|---|
    | `cat` | Σ wᵢ ΔWᵢ, exactly | Σ rᵢ |
    | `svd` | Σ wᵢ ΔWᵢ, then the best product of the rank | `rank`, or the largest rᵢ |
    | `linear`, `ties`, `dare_linear`, `dare_ties`, `magnitude_prune` | A and B apart, with √(wᵢsᵢ) on each, as PEFT does | the common rᵢ |
    | `ties_svd`, `dare_linear_svd`, `dare_ties_svd`, `magnitude_prune_svd` | ΔWᵢ, then as `svd` | as `svd` |
    | `knots` | ΔWᵢ in their common basis (arXiv:2410.19735), then as `svd` | as `svd` |

    A product of sums is not the sum of products: `linear` and its relatives give another model than the same merge of the
    models would; `cat` and `svd` do not. A module that some adapters do not change counts as unchanged by them in `knots`,
    `cat` and `svd`; the others are PEFT's and merge those that have it. Modules that were trained in full are taken over
    where one adapter alone has them, or all have the same.

    Args:
        adapters: the folders.
        out: the folder to make.
        method: how.
        weights: one for each adapter; 1/N by default.
        rank: the most columns of a product's factors, for the methods by SVD.
        density: the share of elements to keep, for the methods that leave some out.
        seed: of DARE's masks.
        overwrite: replace an adapter that is at `out`.

    Raises:
        ConfigError: an unknown method, or settings that do not go with it.
        StorageError: an adapter that is no product of two factors (DoRA), or a place that cannot be read or written.
        WeightsError: adapters of different bases, or of different ranks where PEFT's rule needs one.
    """
    settings = _checked(adapters, method, weights, rank, density, seed)
    with ExitStack() as stack:
        opened: list[Adapter] = []
        for place in adapters:
            adapter = Adapter(Path(place))
            stack.callback(adapter.close)
            if adapter.config.use_dora:
                raise StorageError(
                    f"{place} is a DoRA adapter, whose change is no product of two factors. Merge it into its base, and "
                    f"extract an adapter from the result (soups extract-lora)."
                )
            opened.append(adapter)
        places = list(dict.fromkeys(path for adapter in opened for path in adapter.paths()))
        pairs = (
            _whole(opened, places, settings)
            if method == "knots"
            else {path: _one(opened, path, settings) for path in places}
        )
        wholes = _wholes(opened)
        first = opened[0].config
        return write_adapter(
            Path(out),
            pairs,
            wholes=wholes,
            modules_to_save=list(dict.fromkeys(end for one in opened for end in one.config.modules_to_save)),
            bias=next((one.config.bias for one in opened if one.config.bias != "none"), "none"),
            base=first.base,
            task_type=first.task_type,
            overwrite=overwrite,
        )


def _checked(
    adapters: Sequence[Any],
    method: str,
    weights: Sequence[float] | None,
    rank: int | None,
    density: float | None,
    seed: int,
) -> _Settings:
    if not adapters:
        raise ConfigError("merge_adapters needs at least one adapter.")
    if method not in ADAPTER_METHODS:
        raise ConfigError(f"method {method!r} is unknown; {did_you_mean(method, ADAPTER_METHODS)}")
    if weights is not None and len(weights) != len(adapters):
        raise ConfigError(f"There are {len(adapters)} adapters and {len(weights)} weights. Give one weight for each.")
    if weights is not None and method == "knots":
        raise ConfigError("knots takes no weights: it averages the tasks that agree. Leave them out.")
    by_svd = method in ("svd", "knots") or method.endswith("_svd")
    if rank is not None and (not by_svd or rank < 1):
        raise ConfigError(f"rank={rank} does not go with {method!r}: it is for svd, knots and *_svd, and at least 1.")
    sparse = any(name in method for name in ("ties", "dare", "prune", "knots"))
    if density is not None and not sparse:
        raise ConfigError(f"density does not go with {method!r}, which keeps every element.")
    if density is not None and not 0 < density <= 1:
        raise ConfigError(f"density={density} is no share of the elements: it must be above 0 and at most 1.")
    count = len(adapters)
    default = 0.5 if "dare" in method else 0.2
    return _Settings(
        method,
        [float(one) for one in weights] if weights is not None else [1 / count] * count,
        density if density is not None else default,
        rank,
        seed,
    )


def _one(adapters: Sequence[Adapter], path: str, settings: _Settings) -> Pair:
    """Merge one module of the adapters that have it."""
    having = [(one, weight) for one, weight in zip(adapters, settings.weights, strict=True) if path in one.paths()]
    pairs, weights = [one.pair(path) for one, _ in having], [weight for _, weight in having]
    _check_alike(path, [one for one, _ in having], pairs)
    rank = settings.rank or max(pair.rank for pair in pairs)
    if settings.method in ("cat", "svd"):
        joined = concatenated(pairs, weights)
        return joined if settings.method == "cat" else truncated(joined, rank)
    if settings.method in _ELEMENTWISE:
        return _by_factor(path, [one for one, _ in having], pairs, weights, settings)
    make = _ELEMENTWISE[settings.method.removesuffix("_svd")]
    deltas = [{path: pair.product()} for pair in pairs]
    merged = _merged(make(weights, settings.density, settings.seed), deltas)
    return factored(merged[path], pairs[0], rank)


def _by_factor(
    path: str, adapters: Sequence[Adapter], pairs: Sequence[Pair], weights: Sequence[float], settings: _Settings
) -> Pair:
    """Merge A and B apart: a weight and a scale go in equal parts to both, and a negative sign to A."""
    if len({pair.rank for pair in pairs}) > 1:
        raise WeightsError(
            f"{path!r} has ranks {[pair.rank for pair in pairs]}; {settings.method} adds factors element by element and needs "
            f"one rank. Use svd, cat, or {settings.method.removesuffix('_svd')}_svd."
        )
    scales = [one.config.scale(one.contents.factors[path].module) for one in adapters]
    shares = [weight * scale for weight, scale in zip(weights, scales, strict=True)]
    roots = [math.sqrt(abs(share)) for share in shares]
    make = _ELEMENTWISE[settings.method]
    plain = [pair.a / scale if scale else pair.a for pair, scale in zip(pairs, scales, strict=True)]
    signed = [math.copysign(root, share) for root, share in zip(roots, shares, strict=True)]
    a = _merged(make(signed, settings.density, settings.seed), [{f"{path}.A": one} for one in plain])
    b = _merged(make(roots, settings.density, settings.seed), [{f"{path}.B": pair.b} for pair in pairs])
    return Pair(a[f"{path}.A"], b[f"{path}.B"], embedding=pairs[0].embedding)


def _whole(adapters: Sequence[Adapter], places: Sequence[str], settings: _Settings) -> dict[str, Pair]:
    """Merge all modules at once, by a method that looks at the whole model."""
    likes: dict[str, Pair] = {}
    deltas: list[dict[str, Tensor]] = [{} for _ in adapters]
    for path in places:
        pairs = {number: one.pair(path) for number, one in enumerate(adapters) if path in one.paths()}
        _check_alike(path, [adapters[number] for number in pairs], list(pairs.values()))
        likes[path] = max(pairs.values(), key=lambda pair: pair.rank)
        nothing = torch.zeros(likes[path].b.shape[0], likes[path].a[0].numel())
        for number in range(len(adapters)):
            deltas[number][path] = pairs[number].product() if number in pairs else nothing
    merged = _merged(KnOTS(density=settings.density), deltas)
    return {path: factored(merged[path], like, settings.rank or like.rank) for path, like in likes.items()}


def _merged(method: Method, deltas: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    base = {name: torch.zeros_like(tensor) for name, tensor in deltas[0].items()}
    result = merge(method, list(deltas), base=base)
    assert isinstance(result, dict)  # no `out` was given
    return result


def _check_alike(path: str, adapters: Sequence[Adapter], pairs: Sequence[Pair]) -> None:
    shapes = {(pair.b.shape[0], *pair.a.shape[1:], pair.embedding) for pair in pairs}
    if len(shapes) > 1:
        found = ", ".join(
            f"{one.folder}: {(pair.b.shape[0], *pair.a.shape[1:])}" for one, pair in zip(adapters, pairs, strict=True)
        )
        raise WeightsError(f"{path!r} has different shapes ({found}). The adapters belong to different models.")


def _wholes(adapters: Sequence[Adapter]) -> dict[str, Tensor]:
    """Return the tensors that were trained in full.

    Raises:
        WeightsError: several adapters have one and differ.
    """
    found: dict[str, Tensor] = {}
    for adapter in adapters:
        for whole in adapter.contents.wholes.values():
            name = whole.key.removeprefix("base_model.model.")
            tensor = adapter.store.read(whole.key)
            if name in found and not torch.equal(found[name], tensor):
                raise WeightsError(
                    f"Several adapters trained {name!r} in full, {adapter.folder} among them, and a tensor is no product of "
                    f"factors. Merge each adapter into its base, and merge the models."
                )
            found[name] = tensor.clone()
    return found
