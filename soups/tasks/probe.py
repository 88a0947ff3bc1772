"""The linear probe: the best head on the frozen pretrained network, and the start that all ingredients share.

Fine-tuning from a probed head (LP-FT, arXiv:2202.10054) keeps the members close to each other; with a fresh random head
each, their average is no better than chance (arXiv:2203.05482, appendix).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from soups.errors import DataError
from soups.evaluation import Batch, Inputs, candidates_of, forward
from soups.tasks.network import Network

# Inverse strengths of the L2 penalty; the held-out split chooses.
STRENGTHS = (0.001, 0.01, 0.1, 1.0)


@dataclass(frozen=True)
class Probe:
    """What the probe chose: the inverse L2 strength and its held-out accuracy in [0, 1]."""

    strength: float
    heldout_accuracy: float


@torch.inference_mode()
def head_inputs(network: Network, batches: Iterable[Batch], device: torch.device) -> tuple[np.ndarray, np.ndarray]:
    """Return what enters the head, float32 (N, features), and the labels (N,), for the network in evaluation mode.

    Where the head reads every token (Hugging Face decoders), the features are those of the last token, which give the
    logits. Of a pair of texts they are the first one's minus the second one's: a linear reward of that difference is the
    difference of the rewards.
    """
    features: list[Tensor] = []
    labels: list[Tensor] = []
    entering: list[Tensor] = []

    def keep(_module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        entering.append(inputs[0])

    module = network.module.to(device).eval()
    hook = network.linear().register_forward_pre_hook(keep)
    try:
        for inputs, targets in batches:
            entering.clear()
            forward(module, inputs, device)
            features.append(_of_each_sample(entering[-1], inputs).float().cpu())
            labels.append(targets)
    finally:
        hook.remove()
    return torch.cat(features).numpy(), torch.cat(labels).numpy()


def _of_each_sample(features: Tensor, inputs: Inputs) -> Tensor:
    """Return features (B, F) from what entered the head: (B, …), (B, tokens, F), or those of a sample's two texts (2B, …)."""
    candidates = candidates_of(inputs)
    if features.ndim == 3 and not isinstance(inputs, Tensor) and "attention_mask" in inputs:
        mask = inputs["attention_mask"]
        last = (mask if candidates is None else mask.flatten(0, 1)).sum(dim=1) - 1
        features = features[torch.arange(len(features), device=features.device), last.to(features.device)]
    features = features.flatten(1)
    if candidates is None:
        return features
    if candidates != 2:
        raise DataError(f"A linear probe of rewards needs pairs of texts, not {candidates} texts a sample.")
    return features[0::2] - features[1::2]


def linear_probe(
    network: Network,
    train: Iterable[Batch],
    heldout: Iterable[Batch],
    num_classes: int,
    device: torch.device | None = None,
) -> Probe:
    """Fit the head by logistic regression on frozen features, in place.

    The penalty is the one of `STRENGTHS` with the best held-out accuracy (the strongest of several equal ones).
    Deterministic for given features. A head with one output is a reward: it is fitted to pairs of texts by the
    Bradley-Terry model, which is logistic regression without intercept on the difference of their features.

    Args:
        network: its head is replaced; everything else is left as it is.
        train, heldout: batches of the network's input and labels (B,), not augmented.
        num_classes: classes of the labels; the width of the head, but for rewards (two classes, one output).
        device: where to compute features.

    Raises:
        DataError: a class has no training sample.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    device = device or torch.device("cpu")
    inputs, labels = head_inputs(network, train, device)
    if missing := sorted(set(range(num_classes)) - set(labels.tolist())):
        raise DataError(f"The train split has no sample of class number {missing[0]}; every class needs at least one.")
    heldout_inputs, heldout_labels = head_inputs(network, heldout, device)
    # Features of unit scale make the penalty mean the same for every network; the scale is folded back into the head.
    is_reward = network.linear().out_features == 1
    centre = np.zeros_like(inputs[0]) if is_reward else inputs.mean(axis=0)
    scale = inputs.std(axis=0).mean() + 1e-12
    best: tuple[float, float, LogisticRegression] | None = None
    previous: tuple[np.ndarray, np.ndarray] | None = None
    for strength in STRENGTHS:
        # From the strongest penalty to the weakest, each fit begins where the last one ended.
        regression = LogisticRegression(
            C=strength, max_iter=300, tol=1e-3, warm_start=True, fit_intercept=not is_reward
        )
        if previous is not None:
            regression.coef_, regression.intercept_ = previous
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            regression.fit((inputs - centre) / scale, labels)
        previous = np.array(regression.coef_), np.array(regression.intercept_)
        accuracy = float(regression.score((heldout_inputs - centre) / scale, heldout_labels))
        if best is None or accuracy > best[1]:
            best = (strength, accuracy, regression)
    assert best is not None
    strength, accuracy, regression = best
    weight, bias = np.asarray(regression.coef_), np.asarray(regression.intercept_)
    if is_reward:  # scikit-learn's row is for class 1, the second text; the features are the first one's minus its
        weight, bias = -weight, 0 * bias
    elif num_classes == 2:  # scikit-learn keeps one row for two classes: split it evenly
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    weight = weight / scale
    bias = bias - weight @ centre
    head = network.linear()
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weight))
        if "bias" in dict(head.named_parameters()):
            head.bias.copy_(torch.from_numpy(bias))
    return Probe(strength, accuracy)
