"""Predictions and scores against torchmetrics, and equality of bits on one and two processes."""

import pytest
import torch
import torch.distributed as distributed
import torch.multiprocessing as processes
from torch import nn
from torchmetrics.functional.classification import multiclass_accuracy

from soups.evaluation import ensemble, ood_mean, predict, score


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 4)
    )


def batches(count: int = 23) -> list[tuple[torch.Tensor, torch.Tensor]]:
    source = torch.Generator().manual_seed(1)
    images, labels = torch.randn(count, 3, 2, 2, generator=source), torch.randint(4, (count,), generator=source)
    return list(zip(images.split(5), labels.split(5), strict=True))


def test_scores_are_torchmetrics_and_cross_entropy() -> None:
    logits = predict(network(), batches())
    labels = torch.cat([target for _, target in batches()])
    found = score(logits, labels)
    assert found.count == 23
    assert found.accuracy == pytest.approx(float(multiclass_accuracy(logits, labels, 4, average="micro")))
    expected = -logits.double().log_softmax(1)[torch.arange(23), labels].mean()
    assert found.loss == pytest.approx(float(expected))


def test_predict_uses_evaluation_mode_and_restores_training() -> None:
    module = network().train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    first, second = predict(module, batches()), predict(module, batches())
    assert torch.equal(first, second) and module.training
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_the_ensemble_is_the_mean_of_logits() -> None:
    parts = [torch.randn(6, 3) for _ in range(5)]
    assert torch.equal(ensemble(parts), torch.stack(parts).double().mean(0).float())


def test_ood_mean_leaves_out_selection_and_test() -> None:
    assert ood_mean({"train": 1, "heldout": 1, "test": 1, "a": 0.5, "b": 0.25}) == 0.375


def _rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    torch.save(predict(network(), batches()), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_the_same_bits_and_count_each_sample_once(tmp_path) -> None:
    processes.spawn(_rank, args=(2, str(tmp_path)), nprocs=2)
    single = predict(network(), batches())
    for rank in range(2):
        assert torch.equal(torch.load(tmp_path / f"{rank}.pt", weights_only=True), single)
