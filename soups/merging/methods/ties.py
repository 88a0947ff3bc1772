"""TIES: trim, elect signs, disjoint mean; and what four public codes made of it.

Resolving interference when merging models (arXiv:2306.01708), section 4 and algorithm 1.

| preset | trims | kept of n | weights | zero sum of signs | reduce | λ |
|---|---|---|---|---|---|---|
| `ties` (paper) | the whole model | int(dn), equal ones too | after the election | nobody agrees | Σwτ / Σw | 1 |
| `ties.official` | the whole model | int(dn) + 1, equal ones too | none | the model's majority | mean over who agrees | 1 |
| `ties.adamerging` | the whole model | as official | none | as official | sum over who agrees | 0.3 |
| `ties.mergekit` | each tensor | exactly int(dn), at least 1 | before the election, and vote | plus | Σwτ / Σw | 1 |
| `ties.peft` | each tensor | exactly int(dn), also 0 | after the election | plus | Σwτ / how many agree | 1 |

When it fails: Over the whole model, trimming favours layers that moved far: a small but decisive head can be trimmed away
(`ties.peft` trims each tensor by itself). With few models there is little to elect.
"""

from __future__ import annotations

from soups.merging.method import PerModel
from soups.merging.stages import Elect, TaskVectors, mergekit_form
from soups.merging.transforms import Trim


def ties(*, density: PerModel = 0.2, weight: PerModel = 1.0, scale: float = 1.0) -> TaskVectors:
    """The paper's TIES.

    Args:
        density: the share of each task vector to keep, over the whole model.
        weight: one for all models or one for each; they weigh the mean and do not vote.
        scale: λ; the paper takes 1 without held-out data, else 0.8 to 2.5.
    """
    return TaskVectors(Trim(density), weight, Elect(), "mean", scale)


def ties_official(*, density: PerModel = 0.2, scale: float = 1.0) -> TaskVectors:
    """The authors' code: one element more is kept, and a tie between signs goes to the whole model's majority."""
    return TaskVectors(Trim(density, extra=1), 1.0, Elect(zero="majority"), "count", scale)


def ties_adamerging(*, density: PerModel = 0.2, scale: float = 0.3) -> TaskVectors:
    """The variant of AdaMerging, EMR and FusionBench: a sum in the place of the mean, λ = 0.3."""
    return TaskVectors(Trim(density, extra=1), 1.0, Elect(zero="majority"), "sum", scale)


def ties_mergekit(
    *,
    density: PerModel = 1.0,
    weight: PerModel = 1.0,
    scale: float = 1.0,
    normalize: bool = True,
    rescale: bool = False,
) -> TaskVectors:
    """mergekit's `ties`: tensors are trimmed one by one, and weights vote.

    Args:
        density: the share of each tensor's task vector to keep.
        weight: one for all models or one for each; a negative one turns its vote round.
        scale: mergekit's `lambda`.
        normalize: divide by the weights of those that agree.
        rescale: restore each task vector's L1 norm after trimming.
    """
    trim = Trim(density, within="tensor", exact=True)
    return mergekit_form(trim, weight=weight, scale=scale, normalize=normalize, rescale=rescale, elect=True)


def ties_peft(*, density: PerModel = 0.2, weight: PerModel = 1.0) -> TaskVectors:
    """PEFT's `ties`, on full weights: divides by how many agree, whatever their weights."""
    return TaskVectors(Trim(density, within="tensor", exact=True, least=0), weight, Elect(zero="plus"), "count")
