"""The weight of a feature in an average of networks, by the share of members that have it and by their depth."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from soups.seeding import generator

PROBABILITIES = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


def layerwise(
    layers: int, probabilities: Sequence[float], members: int = 64, features: int = 40, seed: int = 0, steps: int = 800
) -> dict[str, list[float]]:
    """Measure with which weight a feature that each member has with probability p enters their average.

    Members are linear networks of `layers` layers, one path a feature, f(x) = Σⱼ xⱼ Πₗ wₗⱼ, all from one start near zero and
    trained by gradient descent on a target that needs every feature; but a feature that a member's data lack is zero there, and
    is never learned. The paper argues that the ensemble then weights a feature by p, and the weight average by p to the
    power of the number of layers.

    Args:
        layers: L.
        probabilities: the p.
        members: M networks.
        features: for each p.
        seed: of the draw of features.
        steps: of gradient descent, with a rate of 0.2.

    Returns:
        For each p: the measured weight in the ensemble and in the weight average, each relative to that of a member that
        has the feature.
    """
    random = generator(seed, "features", layers)
    chance = torch.tensor(probabilities, dtype=torch.float64).repeat_interleave(features)
    present = torch.rand(members, len(chance), generator=random, dtype=torch.float64) < chance
    weights = torch.full((layers, members, len(chance)), 0.02, dtype=torch.float64)
    for _ in range(steps):
        product = weights.prod(dim=0)
        # Unit-variance independent features: the loss is Σⱼ (1 − Πₗ wₗⱼ)²/2 over those that the member's data have.
        error = (product - 1) * present
        weights = weights - 0.2 * torch.stack(
            [
                error * weights[[other for other in range(layers) if other != layer]].prod(dim=0)
                for layer in range(layers)
            ]
        )
    full = float(weights.prod(dim=0)[present].mean())
    ensemble = weights.prod(dim=0).mean(dim=0).view(len(probabilities), features).mean(dim=1) / full
    averaged = weights.mean(dim=1).prod(dim=0).view(len(probabilities), features).mean(dim=1) / full
    return {"ensemble": ensemble.tolist(), "average": averaged.tolist()}
