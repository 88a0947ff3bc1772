"""`collect`: run a model over data and sum what merge methods ask for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from soups.errors import ConfigError, DataError, did_you_mean
from soups.seeding import generator
from soups.statistics.groups import Batch, digest_of, examples_of, map_tensors, regrouped, tensors_of
from soups.statistics.inputs import InputSums
from soups.statistics.likelihood import check_estimator, log_likelihoods
from soups.statistics.partial import Partial
from soups.statistics.sizes import check_budget
from soups.statistics.statistics import KINDS, Statistics
from soups.statistics.sums import Sums
from soups.weights import hash_weights

_FROM_INPUTS = ("gram", "second_moment", "frequency")
_BY_EXAMPLE = ("fisher", "gradient", "sensitivity")
_FROM_GRADIENTS = ("fisher", "kfac_out", "gradient", "sensitivity")


def collect(
    module: nn.Module,
    batches: Iterable[Batch],
    wanted: Sequence[str],
    *,
    forward: Callable[[nn.Module, Batch], Tensor] | None = None,
    mask: Callable[[Batch], Tensor | None] | Literal["none"] | None = None,
    labels: Callable[[Batch], Tensor | None] | None = None,
    fisher: str = "sampled",
    seed: int = 0,
    group: int = 8,
    device: torch.device | str = "cpu",
    budget: int | None = None,
    resume: Path | None = None,
    weights_hash: str | None = None,
    on_group: Callable[[int, int], None] = lambda number, examples: None,
) -> Statistics:
    """Sum statistics of a model over data.

    The module is in evaluation mode for the length of the call. Examples are put through it in groups of a fixed size, whatever
    the size of the batches, so that the bits do not depend on it. Sums are in float64; a group's matrix products are in the
    model's dtype, float32 at least. Under `torch.distributed` the ranks share the groups, and every rank returns all sums.

    Derivatives are of log p(y|x) of single examples (of sequences: summed over their tokens).

    Args:
        module: the network.
        batches: of inputs, or of inputs and labels: tensors, or dicts and lists of tensors, examples first.
        wanted: kinds of statistics: see `soups.statistics.statistics`.
        forward: from the module and a batch to logits; by default a dict is passed by name (labels left out), of a list the first
            element, and an output's `logits` are taken.
        mask: from a batch to the tokens that count, bool (examples, tokens); by default its `attention_mask`, so that padding is
            left out. "none" counts every row.
        labels: from a batch to its labels; by default its `labels`, or the second element of a list.
        fisher: the estimator: "true" (sum over all classes), "sampled" (a label drawn from the model) or "empirical" (the
            data's label); `kfac_out` follows it. `gradient` and `sensitivity` use the data's labels.
        seed: of the drawn labels, one stream an example.
        group: examples in a group.
        device: where the module is, and the batches go.
        budget: most bytes of sums; more is refused before any work. None: no limit.
        resume: a file where the sums so far are kept; a collection that was interrupted goes on from there.
        weights_hash: of the checkpoint that the module was loaded from, where its dtype or names differ from the module's
            (`soups.statistics.hash_store`); the module's own when None.
        on_group: told the number of each finished group, from 1, and the examples so far.

    Raises:
        ConfigError: unknown kinds or estimator; sums beyond the budget; layers whose rows a mask does not fit.
        DataError: no data, batches of another form, or no labels where they are needed.
        soups.errors.WeightsError: activations or gradients that are not finite.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> found = collect(layer, [torch.tensor([[1.0, 2.0], [3.0, 4.0]])], ["gram"])
    >>> found["gram/weight"].tolist(), found.count("gram/weight")
    ([[10.0, 14.0], [14.0, 20.0]], 2)
    """
    _check(wanted, fisher, group)
    name, masked = _mask_rule(mask)
    run = _Run(module, wanted, forward or _forward, masked, labels or _labels, fisher, seed, torch.device(device))
    check_budget(module, wanted, budget)
    rank, world = _ranks()
    weights_hash = weights_hash or hash_weights(module.state_dict())
    partial = Partial(resume, rank, [weights_hash, sorted(wanted), fisher, seed, group, world, name])
    sums, done, digest, examples = Sums(), 0, None, 0
    start = partial.restore(sums)
    with _prepared(module), InputSums(module, sums, wanted) as inputs:
        for number, part in enumerate(regrouped(batches, group)):
            digest = digest_of(part, digest)
            count = examples_of(part)
            if number >= start and number % world == rank:
                run.group(part, sums, inputs, examples)
                partial.keep(sums, number + 1)
            examples += count
            done = number + 1
            on_group(done, examples)
    if digest is None:
        raise DataError("There are no data to collect statistics from.")
    _share(sums, world)
    partial.remove()
    for name, first_name in _tied(module).items():
        sums.aliases |= {
            f"{kind}/{name}": f"{kind}/{first_name}" for kind in _BY_EXAMPLE if f"{kind}/{first_name}" in sums
        }
    return Statistics(
        sums.tensors, weights_hash=weights_hash, data=digest.hexdigest(), examples=examples, rows={name: count for name, count in sums.rows.items() if name.split("/", 1)[0] not in _BY_EXAMPLE},
        transposed=inputs.transposed, mask=name, estimator=fisher if {"fisher", "kfac_out"} & set(wanted) else None,
        aliases=sums.aliases, uncovered=inputs.uncovered(),
    )  # fmt: skip


class _Run:
    """One collection's settings, applied group by group."""

    def __init__(
        self,
        module: nn.Module,
        wanted: Sequence[str],
        forward: Callable[[nn.Module, Batch], Tensor],
        mask: Callable[[Batch], Tensor | None],
        labels: Callable[[Batch], Tensor | None],
        fisher: str,
        seed: int,
        device: torch.device,
    ) -> None:
        self.module, self.wanted, self.forward, self.mask, self.labels = module, set(wanted), forward, mask, labels
        self.fisher, self.seed, self.device = fisher, seed, device
        self.parameters = {name: one for name, one in module.named_parameters() if one.is_floating_point()}

    def group(self, part: Batch, sums: Sums, inputs: InputSums, first: int) -> None:
        """Add a group's statistics; `first` is the number of its first example."""
        part = map_tensors(part, lambda one: one.to(self.device))
        count = examples_of(part)
        if self.wanted & set(_FROM_INPUTS):
            with torch.no_grad(), inputs.summing(self.mask(part), count):
                self.forward(self.module, part)
        if self.wanted & set(_FROM_GRADIENTS):
            for number in range(count):
                self._example(map_tensors(part, lambda one, n=number: one[n : n + 1]), sums, inputs, first + number)

    def _example(self, one: Batch, sums: Sums, inputs: InputSums, number: int) -> None:
        source = generator(self.seed, "statistics", number)
        keep, labels = self.mask(one), self.labels(one)
        if self.wanted & {"fisher", "kfac_out"}:
            with torch.enable_grad(), inputs.watching_outputs("kfac_out" in self.wanted, keep) as outputs:
                logits = self.forward(self.module, one)
                found = list(log_likelihoods(logits, labels, self.fisher, keep, source))
                for place, (weight, value) in enumerate(found):
                    last = place == len(found) - 1
                    grown, by_output = self._derivatives(value, outputs.tensors(), retain=not last)
                    if "fisher" in self.wanted:
                        for name, gradient in grown.items():
                            square = gradient.double().square() if gradient.device.type != "mps" else gradient.square()
                            sums.add(f"fisher/{name}", weight * square, 0)
                    outputs.add(sums, by_output, weight, first=place == 0)
        if self.wanted & {"gradient", "sensitivity"}:
            with torch.enable_grad():
                logits = self.forward(self.module, one)
                ((_, value),) = log_likelihoods(logits, labels, "empirical", keep, source)
                grown, _ = self._derivatives(value, [], retain=False)
                for name, gradient in grown.items():
                    if "gradient" in self.wanted:
                        sums.add(f"gradient/{name}", -gradient, 0)
                    if "sensitivity" in self.wanted:
                        product = self.parameters[name].detach() * gradient
                        sums.add(f"sensitivity/{name}", product.abs().sum(), 0)

    def _derivatives(
        self, value: Tensor, outputs: Sequence[Tensor], *, retain: bool
    ) -> tuple[dict[str, Tensor], list[Tensor | None]]:
        """Return the derivatives by every parameter, and those by some outputs."""
        targets = [*self.parameters.values(), *outputs]
        found: list[Tensor | None] = list(torch.autograd.grad(value, targets, retain_graph=retain, allow_unused=True))
        by_parameter = {
            name: torch.zeros_like(one) if gradient is None else gradient
            for (name, one), gradient in zip(self.parameters.items(), found, strict=False)
        }
        return by_parameter, found[len(self.parameters) :]


def _tied(module: nn.Module) -> dict[str, str]:
    """Map each further name of a parameter to its first."""
    first = {id(one): name for name, one in module.named_parameters()}
    return {
        name: first[id(one)]
        for name, one in module.named_parameters(remove_duplicate=False)
        if id(one) in first and first[id(one)] != name
    }


def _mask_rule(mask: Callable[[Batch], Tensor | None] | str | None) -> tuple[str, Callable[[Batch], Tensor | None]]:
    """Return the name of a mask rule, by which parts are compared, and its function."""
    if mask is None:
        return "padding left out", _mask
    if isinstance(mask, str):
        if mask != "none":
            raise ConfigError(f"mask={mask!r} must be a function from a batch to its mask, or 'none'.")
        return "all rows", lambda batch: None
    return f"mask {getattr(mask, '__qualname__', type(mask).__qualname__)}", mask


def _check(wanted: Sequence[str], fisher: str, group: int) -> None:
    if not wanted:
        raise ConfigError(f"No kind of statistics was asked for. {did_you_mean('', KINDS)}")
    for kind in wanted:
        if kind not in KINDS:
            raise ConfigError(f"There is no kind of statistics {kind!r}: {did_you_mean(kind, KINDS)}")
    check_estimator(fisher)
    if group < 1:
        raise ConfigError(f"group={group} must be at least 1.")


def _forward(module: nn.Module, batch: Batch) -> Tensor:
    if isinstance(batch, Mapping):
        named = cast("Mapping[str, Any]", batch)
        output = module(**{key: value for key, value in named.items() if key not in ("labels", "label")})
    else:
        output = module(batch if isinstance(batch, Tensor) else batch[0])
    found: Any = getattr(output, "logits", output)
    if not isinstance(found, Tensor):
        candidates = tensors_of(found) if isinstance(found, list | tuple | Mapping) else []
        if len(candidates) != 1:
            found = getattr(output, "last_hidden_state", None)
            if found is None:
                raise DataError(
                    f"The model returns a {type(output).__name__} without `logits`. Say which tensor counts: "
                    f"collect(…, forward=lambda module, batch: …)."
                )
        else:
            found = candidates[0]
    return found


def _mask(batch: Batch) -> Tensor | None:
    found: Any = cast("Mapping[str, Any]", batch).get("attention_mask") if isinstance(batch, Mapping) else None
    return found.bool() if isinstance(found, Tensor) and found.ndim == 2 else None


def _labels(batch: Batch) -> Tensor | None:
    if isinstance(batch, Mapping):
        named = cast("Mapping[str, Any]", batch)
        found: Any = named.get("labels", named.get("label"))
    else:
        found = batch[1] if isinstance(batch, list | tuple) and len(cast("Sequence[Any]", batch)) > 1 else None
    return found if isinstance(found, Tensor) else None


@contextlib.contextmanager
def _prepared(module: nn.Module) -> Generator[None]:
    """Within the block the module is in evaluation mode and every floating parameter wants a gradient."""
    training = {one: one.training for one in module.modules()}
    wanting = {one: one.requires_grad for one in module.parameters()}
    module.eval()
    for one in module.parameters():
        if one.is_floating_point():
            one.requires_grad_(True)
    try:
        yield
    finally:
        for one, value in training.items():
            one.training = value
        for one, value in wanting.items():
            one.requires_grad_(value)


def _ranks() -> tuple[int, int]:
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _share(sums: Sums, world: int) -> None:
    """Add up the sums of all ranks; a rank without a group has none of its own."""
    if world == 1:
        return
    known: list[Any] = [None] * world
    shapes = {name: (tuple(tensor.shape), sums.rows[name]) for name, tensor in sums.tensors.items()}
    torch.distributed.all_gather_object(known, shapes)
    for name in dict.fromkeys(name for one in known for name in one):
        shape = next(one[name][0] for one in known if name in one)
        tensor = sums.tensors.get(name, torch.zeros(shape, dtype=torch.float64))
        torch.distributed.all_reduce(tensor)
        sums.tensors[name] = tensor
        sums.rows[name] = sum(one[name][1] for one in known if name in one)
