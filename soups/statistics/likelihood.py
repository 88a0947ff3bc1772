"""Log-likelihoods of one example, for the estimators of the Fisher information."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from soups.errors import ConfigError, DataError, did_you_mean

Estimator = Literal["true", "sampled", "empirical"]
ESTIMATORS = ("true", "sampled", "empirical")
IGNORED = -100
"""The label of a position that has none, as in torch."""


def check_estimator(name: str) -> None:
    """Check the name of an estimator.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in ESTIMATORS:
        raise ConfigError(f"There is no Fisher estimator {name!r}: {did_you_mean(name, ESTIMATORS)}")


def log_likelihoods(
    outputs: Tensor, labels: Tensor | None, estimator: str, keep: Tensor | None, source: torch.Generator
) -> Iterator[tuple[float, Tensor]]:
    """Yield (weight, log p(y|x)) of one example, whose weighted squared derivatives are the estimate.

    "true" yields every class with its probability; "sampled" one label drawn from the model's own distribution; "empirical" the
    data's label. The outputs of a sequence are a distribution a token, and log p is their sum. One output is the mean of a normal
    distribution of variance 1.

    Args:
        outputs: logits (1, classes) or (1, tokens, classes), or one output (1, 1).
        labels: int64 (1,) or (1, tokens), where `IGNORED` has no label; float (1,) for one output.
        estimator: "true", "sampled" or "empirical".
        keep: bool (1, tokens): the tokens that count; all when None.
        source: of the draws.

    Raises:
        ConfigError: "true" for a sequence.
        DataError: "empirical" without labels, or labels that do not fit the outputs.
    """
    outputs = outputs.float() if outputs.dtype in (torch.float16, torch.bfloat16) else outputs
    if estimator == "empirical" and labels is None:
        raise DataError("The empirical Fisher information needs labels, and the batches hold none; use 'sampled'.")
    if outputs.ndim == 2 and outputs.shape[1] == 1:
        yield 1.0, _normal(outputs, labels, estimator, source)
        return
    if outputs.ndim not in (2, 3):
        raise DataError(f"Outputs of shape {tuple(outputs.shape)} are neither (N, classes) nor (N, tokens, classes).")
    logs = outputs.log_softmax(-1)
    if estimator == "empirical" and labels is not None and labels.numel() != logs[..., 0].numel():
        raise DataError(f"{labels.numel()} labels were given for {logs[..., 0].numel()} distributions of an example.")
    if outputs.ndim == 3 and keep is not None and keep.shape == outputs.shape[:2]:
        logs = logs[keep]
        labels = labels[keep] if estimator == "empirical" and labels is not None else None
    logs = logs.reshape(-1, outputs.shape[-1])
    if estimator == "true":
        if outputs.ndim == 3:
            raise ConfigError(
                "The true Fisher information of a sequence sums over every sequence of tokens; use 'sampled' or 'empirical'."
            )
        for label, probability in enumerate(logs[0].detach().exp().tolist()):
            yield probability, logs[0, label]
        return
    if estimator == "sampled":
        probabilities = logs.detach().double().exp().cpu()
        drawn = torch.multinomial(probabilities, 1, generator=source).reshape(-1).to(logs.device)
        yield 1.0, logs[torch.arange(len(logs), device=logs.device), drawn].sum()
        return
    assert labels is not None
    targets = labels.reshape(-1).to(logs.device)
    yield 1.0, -functional.nll_loss(logs, targets, ignore_index=IGNORED, reduction="sum")


def _normal(outputs: Tensor, labels: Tensor | None, estimator: str, source: torch.Generator) -> Tensor:
    mean = outputs.reshape(())
    if estimator == "true":  # E[(y − mean)²] = 1, so the squared derivative of the mean itself
        return mean
    if estimator == "sampled":
        target = mean.detach() + torch.randn((), generator=source, dtype=torch.float64).to(mean)
    else:
        assert labels is not None
        target = labels.reshape(()).to(mean)
    return -0.5 * (target - mean).square()
