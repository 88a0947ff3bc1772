"""Pairwise measures and decompositions against plain formulas, and predictions of several models at once."""

from importlib import import_module

import numpy as np
import pytest
import torch
from torch import nn

from soups.errors import ConfigError, WeightsError
from soups.evaluation.batched import predict_many
from soups.evaluation.diversity import (
    ambiguity,
    cosines,
    decompose,
    distances,
    error_correlation,
    linear_cka,
    locality,
)
from soups.evaluation.scores import predict
from soups.stores import DictStore


def logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_error_correlation_is_numpys() -> None:
    values, labels = logits(4, 60, 3), torch.arange(60) % 3
    found = error_correlation(list(values), labels)
    wrong = (values.argmax(2) != labels).double().numpy()
    assert np.allclose(found.numpy(), np.corrcoef(wrong))
    perfect = torch.nn.functional.one_hot(labels, 3).float()
    assert bool(error_correlation([perfect, values[0]], labels)[0].isnan().all())


def test_cosines_follow_from_distances() -> None:
    table = logits(5, 20).double()
    gaps = distances([DictStore({"w": row}, "m") for row in table])
    vectors = table - table[2]
    expected = torch.nn.functional.cosine_similarity(vectors[:, None], vectors[None], dim=2)
    found = cosines(gaps, base=2)
    others = [0, 1, 3, 4]
    assert torch.allclose(found[others][:, others], expected[others][:, others], atol=1e-9)
    assert bool(found[2].isnan().all())


def test_distances_in_stretches_of_tensors_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    table = logits(3, 4, 5).to(torch.float16)
    models = [DictStore({"w": one, "again": one, "count": torch.tensor(number)}) for number, one in enumerate(table)]
    expected = torch.cdist(table.double().flatten(1), table.double().flatten(1))
    assert torch.allclose(distances(models), expected, atol=1e-12), "a tied tensor counts once, an integer not at all"
    monkeypatch.setattr(import_module("soups.evaluation.diversity"), "_STRETCH", 3)
    assert torch.allclose(distances(models), expected, atol=1e-12)
    with pytest.raises(
        WeightsError, match=r"a and b cannot be compared: 1 mis-shaped \('w': expected \(2,\), found \(3,\)\)"
    ):
        distances([DictStore({"w": torch.zeros(2)}, "a"), DictStore({"w": torch.zeros(3)}, "b")])


def test_the_ambiguity_identity() -> None:
    values, labels = logits(5, 40, 3), torch.arange(40) % 3
    found = ambiguity(list(values), labels)
    assert found.ensemble == pytest.approx(found.members - found.ambiguity, rel=1e-12)
    target = torch.nn.functional.one_hot(labels, 3)
    assert found.ensemble == pytest.approx(float(((values.double().softmax(2).mean(0) - target) ** 2).sum(1).mean()))
    assert ambiguity([values[0], values[0]], labels).ambiguity == 0


def test_locality_is_soup_minus_ensemble() -> None:
    values, labels = logits(2, 3, 40, 3), torch.arange(40) % 3
    terms = decompose(values, labels)
    sizes = terms.bias + terms.variance / 3 + 2 / 3 * terms.covariance
    assert terms.ensemble == pytest.approx(sizes, rel=1e-9)
    as_good = values.double().softmax(-1).mean(dim=1).log()
    assert locality(terms, as_good, labels) == pytest.approx(0, abs=1e-12)
    target = torch.nn.functional.one_hot(labels, 3).double()
    perfect = locality(terms, (target * 50).expand(2, -1, -1), labels)
    assert perfect == pytest.approx(-terms.ensemble, abs=1e-9)


def test_cka_ignores_rotation_and_scale_and_sees_difference() -> None:
    x = logits(200, 8).double()
    rotation = torch.linalg.qr(logits(8, 8, seed=1).double()).Q
    assert linear_cka(x, 3 * x @ rotation + 5) == pytest.approx(1)
    assert linear_cka(x, logits(200, 8, seed=2)) < 0.2
    # The definition by centred Gram matrices.
    y = x[:, :3] ** 2
    centre = torch.eye(200).double() - 1 / 200
    k, m = centre @ (x @ x.T) @ centre, centre @ (y @ y.T) @ centre
    assert linear_cka(x, y) == pytest.approx(float((k * m).sum() / (k.norm() * m.norm())))
    with pytest.raises(ConfigError, match="same samples"):
        linear_cka(x, y[:5])
    with pytest.raises(ConfigError, match="equal for all samples"):
        linear_cka(x, torch.ones(200, 2))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.LazyLinear(5)
    )


def test_several_models_at_once_predict_like_each_alone() -> None:
    module = network()
    inputs, labels = logits(23, 3, 6, 6), torch.arange(23) % 5
    module(inputs)
    batches = list(zip(inputs.split(10), labels.split(10), strict=True))
    start = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    models = [
        {n: t + 0.1 * k * torch.ones_like(t) if t.is_floating_point() else t for n, t in start.items()}
        for k in range(4)
    ]
    module.train()
    together = predict_many(module, models, batches)
    assert together.shape == (4, 23, 5) and module.training
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in start.items()), "left as it was"
    for weights, found in zip(models, together, strict=True):
        module.load_state_dict(weights)
        assert torch.allclose(found, predict(module, batches), atol=1e-5)
    with pytest.raises(ConfigError, match="no models"):
        predict_many(module, [], batches)
    with pytest.raises(WeightsError, match="model number 1 does not fit"):
        predict_many(module, [start, {}], batches)


class Named(nn.Module):
    """Takes inputs by name and returns an object with logits, as Hugging Face models do."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 5)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor):
        class Output:
            logits = (self.table(input_ids) * attention_mask[..., None]).sum(1)

        return Output()


def test_several_models_take_named_inputs() -> None:
    module = Named()
    ids, mask = torch.arange(12).reshape(4, 3) % 7, torch.ones(4, 3)
    batches = [({"input_ids": ids, "attention_mask": mask}, torch.zeros(4, dtype=torch.long))]
    other = {"table.weight": logits(7, 5)}
    found = predict_many(module, [module.state_dict(), other], batches)
    assert torch.allclose(found[1], other["table.weight"][ids].sum(1), atol=1e-6)
