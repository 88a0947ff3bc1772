"""Predictions, gradients and races on a GPU give the CPU's numbers, on the CPU."""

import pytest
import torch

from soups.evaluation import HeldoutGradient, diagonal_fisher, predict
from soups.evaluation.batched import predict_many
from soups.recipes import learned
from soups.recipes.racing import in_order, network_samples
from tests.evaluation.test_scores import batches, network
from tests.recipes.test_learned import setting

pytestmark = pytest.mark.gpu


def test_predictions() -> None:
    wanted = predict(network(), batches())
    found = predict(network().cuda(), batches(), "cuda")
    assert not found.is_cuda and found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_predictions_of_several_models_at_once() -> None:
    module = network()
    start = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    models = [{n: t + 0.1 * k if t.is_floating_point() else t for n, t in start.items()} for k in range(4)]
    wanted = predict_many(module, models, batches())
    torch.testing.assert_close(predict_many(module.cuda(), models, batches(), "cuda"), wanted, rtol=1e-5, atol=1e-5)


def test_races() -> None:
    order = torch.randperm(23, generator=torch.Generator().manual_seed(0))
    found, wanted = (
        torch.cat(list(network_samples(module, in_order(batches(), order, 10), "loss", device)(network().state_dict())))
        for module, device in ((network().cuda(), "cuda"), (network(), "cpu"))
    )
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_the_learned_soup_and_the_fisher_information() -> None:
    module, pool, data = setting()
    gradient = HeldoutGradient(module, data)
    wanted = learned(pool, lambda weights: 7.0, gradient, epochs=3, seed=5)
    fisher = diagonal_fisher(module, pool[0].load(), data, samples=8)
    module.cuda()
    found = learned(pool, lambda weights: 7.0, HeldoutGradient(module, data, "cuda"), epochs=3, seed=5)
    assert found.coefficients == pytest.approx(wanted.coefficients, rel=1e-6)
    for name, tensor in wanted.weights.items():
        torch.testing.assert_close(found.weights[name], tensor, rtol=1e-6, atol=1e-9)
    for name, tensor in diagonal_fisher(module, pool[0].load(), data, "cuda", samples=8).items():
        torch.testing.assert_close(tensor, fisher[name], rtol=1e-5, atol=1e-9)
