"""Held-out predictions of an ingredient are made once: by the last validation where it saw the finished weights."""

from typing import Any

import pytest
import torch

from soups.evaluation import predict
from soups.fitting import ingredient as module
from soups.fitting import read_configuration
from soups.fitting.ingredient import fine_tune
from soups.fitting.run import Run, run_of
from soups.fitting.task import evaluation_batches
from soups.stores.pool import Ingredient
from tests.launch.conftest import compose_settings


@pytest.fixture
def predictions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Count the evaluations that follow a fit."""
    counted: list[str] = []

    def count(*arguments: Any) -> torch.Tensor:
        counted.append("predict")
        return predict(*arguments)

    monkeypatch.setattr(module, "predict", count)
    return counted


def stored(run: Run, record: Ingredient) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the held-out logits that the pool keeps, and those that the pool's weights give."""
    kept = run.pool.predictions(record.weights, run.splits.heldout.digest())
    assert kept is not None
    network = run.network
    network.module.load_state_dict(run.pool.weights(record.fingerprint))
    batches = evaluation_batches(run.splits.heldout, network, run.asked.loader.size, run.layout.loader)
    return kept, predict(network.module, batches)


@pytest.mark.parametrize(
    ("more", "evaluations"),
    [
        (["trainer.max_epochs=2", "trainer.check_val_every_n_epoch=1"], 0),
        (["trainer.max_epochs=2", "trainer.check_val_every_n_epoch=2", "trainer.threads=1"], 0),
        (["trainer.max_epochs=3", "trainer.check_val_every_n_epoch=2"], 1),  # the last epoch came after it
        (["trainer.max_epochs=1", "trainer.check_val_every_n_epoch=1", "+trainer.limit_val_batches=0"], 1),
        (["trainer.max_epochs=1", "trainer.check_val_every_n_epoch=1", "loader.eval_batch_size=5",
          "+trainer.limit_val_batches=2"], 1),  # it saw a part
        (["trainer.max_epochs=1", "trainer.check_val_every_n_epoch=1", "callbacks=[ema]", "ingredient.weights=ema"], 1),
    ],
)  # fmt: skip
def test_the_last_validation_is_not_repeated(
    more: list[str], evaluations: int, overrides: list[str], predictions: list[str]
) -> None:
    run = run_of(read_configuration(compose_settings([*overrides, "start.epochs=0", *more])))
    record = fine_tune(run, show_progress=False)
    assert len(predictions) == evaluations
    kept, computed = stored(run, record)
    assert kept.shape == computed.shape and torch.allclose(kept, computed, atol=1e-5)
    assert len(kept.unique()) > len(kept)
