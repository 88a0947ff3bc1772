"""LoraHub: a few labelled examples choose how to mix adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from soups.coefficients.fitting import Fitted, fit, mean_magnitude
from soups.coefficients.mixture import Checkpoint, Mixture
from soups.errors import ConfigError
from soups.weights import Weights


def lorahub(
    adapters: Mapping[str, Checkpoint],
    loss: Callable[[Weights], float],
    examples: int,
    *,
    evaluations: int = 40,
    regularisation: float = 0.05,
    resume: Path | None = None,
) -> Fitted:
    """Search the weights of adapters: A = Σ wᵢ Aᵢ, B = Σ wᵢ Bᵢ (arXiv:2307.13269).

    w starts at 0, stays in [−1.5, 1.5], and minimises loss / examples + `regularisation` · mean |w| by COBYLA, which is what the
    authors' optimiser comes down to at this size. As in their code the summed loss is divided by the number of examples, so the
    regularisation counts for more with fewer batches.

    Args:
        adapters: adapter tensors by name (a PEFT folder's `adapter_model.safetensors`), of one rank and one set of targets.
        loss: from the mixed adapter's tensors to the sum of the batches' mean losses on the examples.
        examples: their number.
        evaluations: most calls of `loss`.
        regularisation: weight of the mean magnitude.
        resume: a file that keeps the trials.

    Raises:
        ConfigError: no examples.
        soups.errors.WeightsError: adapters of other ranks or targets.
    """
    if examples < 1:
        raise ConfigError(f"examples={examples} must be at least 1.")
    with Mixture(None, adapters, start=0.0) as mixture:
        return fit(
            mixture,
            lambda weights: -loss(weights) / examples,
            optimiser="cobyla",
            evaluations=evaluations,
            bounds=(-1.5, 1.5),
            penalty=lambda found: regularisation * mean_magnitude(found),
            resume=resume,
        )
