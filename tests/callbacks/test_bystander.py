"""Training with any of our callbacks is training without it, to the last bit: every callback, every mode, a zoo of modules."""

from __future__ import annotations

import random
import warnings

import numpy as np
import pytest
import torch

from soups.callbacks import EMA, LAWA, SWA, Averages, Mixout, PostHocEMA, Trajectory
from tests.callbacks.zoo import ZOO, Teacher


def forward(module, batch):
    return module(batch[0])


CALLBACKS = {
    "ema": lambda folder: [EMA(decay=0.9)],
    "average": lambda folder: [EMA(decay=0.9, validate="average")],
    "both": lambda folder: [EMA(decay=0.9, validate="both", log_distance=True)],
    "live": lambda folder: [EMA(decay=0.9, validate="both", buffers="live", background=True)],
    "reestimate": lambda folder: [
        SWA(start="0st", every="2st", validate="both", buffers="reestimate", forward=forward)
    ],
    "in training_step": lambda folder: [LAWA(k=2, every="2st", buffers="reestimate", validate="average")],
    "many": lambda folder: [
        Averages(ema=EMA(half_life="5st", validate="both"), lawa=LAWA(k=2, every="3st", validate="both")),
        SWA(start="1ep", validate="both"),
        PostHocEMA(snapshot_every="1ep", folder=folder / "posthoc"),
        Trajectory(folder=folder / "trajectory"),
        Mixout(p=0.0),
    ],
}


def equal(one, other, path=""):
    """Compare nested states; tensors and arrays by their values, NaN equal to NaN."""
    if isinstance(one, torch.Tensor):
        assert isinstance(other, torch.Tensor) and one.dtype == other.dtype and one.shape == other.shape, path
        assert torch.equal(one, other) or torch.equal(one.isnan(), other.isnan()), path
        assert torch.equal(one.nan_to_num(7), other.nan_to_num(7)), path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            equal(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, list | tuple) or type(one).__name__ == "deque":
        assert len(one) == len(other), path
        for number, (left, right) in enumerate(zip(one, other, strict=True)):
            equal(left, right, f"{path}[{number}]")
    elif isinstance(one, np.ndarray):
        assert (one == other).all(), path
    elif isinstance(one, str | int | float | bool | type(None)):
        assert one == other or one != one, path


def run(kind, callbacks, folder, toy, seen):
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    module = kind()
    watch = toy.pl.Callback()
    metrics = []
    watch.on_validation_end = lambda trainer, _: metrics.append(
        {k: float(v) for k, v in trainer.callback_metrics.items()}
    )
    trainer = toy.trainer(folder, *callbacks, watch, val_check_interval=3, num_sanity_val_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module)
    seen["metrics"] = metrics
    return {
        "losses": module.losses,
        "weights": {name: tensor.clone() for name, tensor in toy.nn.Module.state_dict(module).items()},
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "attributes": {
            name: value
            for name, value in vars(module).items()
            if isinstance(value, int | float | list | dict | str) or type(value).__name__ == "deque"
            if not name.startswith("_")
            and name not in ("prepare_data_per_node", "allow_zero_length_dataloader_with_multiple_devices")
        },
        "random": [torch.get_rng_state(), np.random.get_state()[1], list(random.getstate()[1])],
    }


def test_a_teacher_too_large_to_be_copied_at_first(tmp_path, toy, monkeypatch):
    class Other(Teacher):
        def on_validation_epoch_end(self):
            super().on_validation_end()

        def on_validation_end(self):
            pass

    wanted = run(Other, [], tmp_path, toy, {})
    monkeypatch.setattr("soups.callbacks.state.BUDGET", 0)
    equal(run(Other, [EMA(decay=0.9, validate="both")], tmp_path, toy, {}), wanted)


def test_a_large_tensor_that_only_the_averages_evaluation_writes_is_named(tmp_path, toy, monkeypatch):
    class Conditional(Teacher):
        calls = 0

        def on_validation_epoch_end(self):
            Conditional.calls += 1
            if Conditional.calls % 2 == 0:  # the raw weights' evaluation comes first
                self.teacher[2].weight.data.mul_(2)

        def on_validation_end(self):
            pass

    monkeypatch.setattr("soups.callbacks.state.BUDGET", 0)
    module = Conditional()
    trainer = toy.trainer(tmp_path, EMA(decay=0.9, validate="both"), max_epochs=1, num_sanity_val_steps=0)
    with pytest.warns(UserWarning, match=r"average 'ema' was evaluated, a hook wrote into .*teacher\.2\.weight"):
        trainer.fit(module)


@pytest.fixture(scope="module")
def alone():
    return {}


@pytest.mark.parametrize("callbacks", CALLBACKS, ids=list(CALLBACKS))
@pytest.mark.parametrize("kind", ZOO, ids=[kind.__name__ for kind in ZOO])
def test_training_with_the_callback_is_training_without_it(tmp_path, toy, kind, callbacks, alone):
    if callbacks == "in training_step" and kind.__name__ == "Gan":
        pytest.skip("refused: with manual optimization training_step would train")
    if callbacks in ("average", "in training_step") and getattr(kind, "on_metric", False):
        pytest.skip("the scheduler follows the metric that the user asked to be the average's")
    if kind not in alone:
        seen = {}
        alone[kind] = run(kind, [], tmp_path, toy, seen), seen["metrics"]
    wanted, metrics = alone[kind]
    seen = {}
    found = run(kind, CALLBACKS[callbacks](tmp_path), tmp_path, toy, seen)
    equal(found, wanted)
    if callbacks not in ("average", "in training_step"):
        for row, plain in zip(seen["metrics"], metrics, strict=True):
            equal({name: row[name] for name in plain}, plain, "metrics")
