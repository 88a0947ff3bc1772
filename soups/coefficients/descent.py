"""Fitting coefficients by gradient descent; a fit that was interrupted is continued to the same bits."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from soups.coefficients.mixture import Mixture
from soups.coefficients.objectives import Objective
from soups.errors import ConfigError, StorageError, did_you_mean
from soups.seeding import generator
from soups.stores import SafetensorsStore, write_safetensors

OPTIMISERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}
Order = Callable[[int], Sequence[int]]
"""From the number of a pass over the batches to the order of the batches in it."""


@dataclass(frozen=True)
class State:
    """A file that holds the state of a descent.

    Attributes:
        path: a `.safetensors` file; it is replaced as a whole.
        fingerprint: of everything that decides the result; the state of another descent is refused.
        every: steps between two states.
    """

    path: Path
    fingerprint: str
    every: int = 25


def shuffled(batches: int, seed: int) -> Order:
    """Return an order of batches that is drawn anew for each pass."""
    return lambda number: torch.randperm(batches, generator=generator(seed, "coefficients", number)).tolist()


def descend(
    mixture: Mixture,
    objective: Objective,
    *,
    steps: int,
    optimiser: str = "adam",
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    order: Order | None = None,
    seed: int = 0,
    penalty: Callable[[Tensor], Tensor] | None = None,
    state: State | None = None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> tuple[dict[str, Tensor], list[float]]:
    """Move a mixture's coefficients, and the objective's own parameters, against the gradient.

    Memory is the mixed weights, their gradient, and one tensor of one model, whatever the number of models.

    Args:
        mixture: its `free` parameters are moved in place.
        objective: the loss.
        steps: one batch each.
        optimiser: "adam", "adamw" or "sgd", of torch.
        lr: its learning rate.
        weight_decay: its weight decay.
        order: of the batches; shuffled with `seed` when None.
        seed: of the order.
        penalty: a function of the coefficients (rows, models) that is added to the loss.
        state: where to keep the state, and to continue from, if anywhere.
        on_step: told the number of each step, from 1, and its loss.

    Returns:
        The mixed weights at the end, and the loss before each step.

    Raises:
        ConfigError: an unknown optimiser, no steps, or a learning rate that is not positive.
        StorageError: the state is of another descent.
    """
    if optimiser not in OPTIMISERS:
        raise ConfigError(f"There is no optimiser {optimiser!r}: {did_you_mean(optimiser, OPTIMISERS)}")
    if steps < 1 or not lr > 0:
        raise ConfigError(f"steps={steps} must be at least 1 and lr={lr} positive.")
    order = order or shuffled(objective.batches, seed)
    parameters = {"coefficients": mixture.free, **objective.parameters}
    moved = OPTIMISERS[optimiser](list(parameters.values()), lr=lr, weight_decay=weight_decay)
    losses = _restore(state, parameters, moved) if state and state.path.exists() else []
    weights = mixture.weights()
    batches: Sequence[int] = []
    for step in range(len(losses), steps):
        number, position = divmod(step, objective.batches)
        if position == 0 or not batches:
            batches = order(number)
        slope = objective.gradient(weights, batches[position])
        moved.zero_grad()
        mixture.backward(slope.by_tensor)
        loss = slope.loss + (0.0 if penalty is None else mixture.penalise(penalty))
        for name, parameter in objective.parameters.items():
            parameter.grad = slope.by_parameter[name].to(parameter.dtype)
        moved.step()
        losses.append(loss)
        del slope
        mixture.weights(into=weights)
        if state and ((step + 1) % state.every == 0 or step + 1 == steps):
            _keep(state, parameters, moved, losses)
        on_step(step + 1, losses[-1])
    return weights, losses


def _keep(state: State, parameters: Mapping[str, Tensor], moved: torch.optim.Optimizer, losses: list[float]) -> None:
    tensors = {f"parameter/{name}": value.detach() for name, value in parameters.items()}
    moments = cast("dict[int, dict[str, Any]]", moved.state_dict()["state"])
    for number, values in moments.items():
        tensors |= {f"state/{number}/{name}": torch.as_tensor(value) for name, value in values.items()}
    tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
    state.path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(state.path, tensors, {"descent": json.dumps({"fingerprint": state.fingerprint})})


def _restore(state: State, parameters: Mapping[str, Tensor], moved: torch.optim.Optimizer) -> list[float]:
    with SafetensorsStore(state.path) as store:
        header = cast("Mapping[str, Any]", json.loads(store.metadata.get("descent", "{}")))
        if header.get("fingerprint") != state.fingerprint:
            raise StorageError(
                f"{state.path} belongs to a fit with other models, data or settings; remove it, or name another file."
            )
        tensors = {name: value.clone() for name, value in store.load().items()}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"parameter/{name}"])
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("state/"):
            _, number, part = name.split("/", 2)
            moments.setdefault(int(number), {})[part] = value
    whole = moved.state_dict()
    whole["state"] = moments
    moved.load_state_dict(whole)
    return [float(loss) for loss in tensors["losses"]]
