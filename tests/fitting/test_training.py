"""Every setting of a fit reaches the fit: augmentation, task, seed, batch size, callbacks; with values known beforehand."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from soups.fitting import FitSpec, Layout
from soups.fitting.schema import checked
from soups.fitting.training import train
from soups.tasks.data import Splits
from soups.tasks.images import ImageInput, TensorImages
from soups.tasks.network import Network

COUNT = 16
SEEN: list[Tensor] = []


class Half(nn.Module):
    """Logits from the mean brightness of the left half: weight (2, 1). Notes what it is fed in training."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(1, 2, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.head.training:
            SEEN.append(inputs.detach().clone())
        values = self.norm(inputs)[..., : inputs.shape[-1] // 2]
        return self.head(values.mean(dim=(1, 2, 3))[:, None])


def network(num_classes: int, pretrained: bool = True) -> Network:
    del num_classes, pretrained
    return Network(Half(), ImageInput((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), "head")


def splits() -> Splits:
    """Bright on the left, dark on the right: a mirrored image is another one."""
    pixels = torch.zeros(COUNT, 3, 4, 4, dtype=torch.uint8)
    pixels[..., :2] = 255
    samples = TensorImages(pixels, torch.arange(COUNT) % 2)
    return Splits(samples, samples, samples, ("a", "b"))


def spec(**changes: Any) -> FitSpec:
    plain = {
        "model": {"_target_": "tests.fitting.test_training.network"},
        "data": {"_target_": "tests.fitting.test_training.splits"}, "seed": 0, "augment": None,
        "task": {"label_smoothing": 0.0, "freeze_batchnorm": True, "channels_last": False},
        "optimizer": {"name": "sgd", "lr": 1e-12, "weight_decay": 0, "warmup": 0, "schedule": "constant"},
        "loader": {"size": 4, "batch_size": 8}, "trainer": {"max_epochs": 1},
    }  # fmt: skip
    return FitSpec.read(plain).with_(**changes)


def layout(folder: Any) -> Layout:
    return checked(Layout, {
        "devices": {"accelerator": "cpu", "threads": 1}, "validation": {}, "loader": {"eval_batch_size": 8},
        "tracking": {"mode": "off"}, "pool": {"path": str(folder)}, "paths": {"output": str(folder)},
    })  # fmt: skip


def base() -> dict[str, Tensor]:
    weights = Half().state_dict()
    weights["head.weight"] = torch.tensor([[0.0], [math.log(3)]])
    return weights


def fitted(tmp_path: Any, **changes: Any) -> tuple[dict[str, Tensor], Any]:
    SEEN.clear()
    found, trainer = train(spec(**changes), layout(tmp_path), base(), splits())
    return found.module.state_dict(), trainer


def mirrored() -> float:
    """The share of training images that came mirrored."""
    images = torch.cat(SEEN)
    return float((images[..., 0] < images[..., -1]).flatten(1).all(dim=1).double().mean())


def test_augmentation_changes_training_images_and_nothing_else(tmp_path: Any) -> None:
    fitted(tmp_path)
    assert mirrored() == 0 and all(torch.equal(one, SEEN[0][:1].expand_as(one)) for one in SEEN)
    fitted(tmp_path, augment={"flip": True}, trainer={"max_epochs": 4})
    assert 0.25 < mirrored() < 0.75, "half of 64"
    fitted(tmp_path, augment={"num_ops": 2, "magnitude": 20})
    assert len(torch.unique(torch.cat(SEEN).flatten(1), dim=0)) > 1, "RandAugment changes equal images differently"


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_label_smoothing_is_in_the_loss(tmp_path: Any, smoothing: float) -> None:
    """Logits 0 and ln 3 (by the input of one): probabilities 1/4 and 3/4; half of the labels are each."""
    _, trainer = fitted(tmp_path, task={"label_smoothing": smoothing})
    each = [-math.log(1 / 4), -math.log(3 / 4)]
    expected = sum((1 - smoothing) * one + smoothing * sum(each) / 2 for one in each) / 2
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(expected, rel=1e-4)


def test_batchnorm_is_frozen_or_learns(tmp_path: Any) -> None:
    frozen, _ = fitted(tmp_path)
    assert torch.equal(frozen["norm.running_mean"], torch.zeros(3))
    free, _ = fitted(tmp_path, task={"freeze_batchnorm": False})
    # The images are half at 1 and half at −1: mean 0 and variance 1, unbiased over 8·4·4 values 128/127.
    after = 0.9**2 * 1 + (1 - 0.9**2) * 128 / 127
    assert free["norm.running_var"][0] == pytest.approx(after, rel=1e-4)
    assert int(free["norm.num_batches_tracked"]) == 2


def test_channels_last_is_the_memory_format_of_the_input(tmp_path: Any) -> None:
    fitted(tmp_path, task={"channels_last": True})
    assert all(one.is_contiguous(memory_format=torch.channels_last) for one in SEEN)
    fitted(tmp_path)
    assert not any(one.is_contiguous(memory_format=torch.channels_last) for one in SEEN)


def test_batches_epochs_and_size(tmp_path: Any) -> None:
    fitted(tmp_path, loader={"batch_size": 4, "size": 8}, trainer={"max_epochs": 3})
    assert len(SEEN) == 12 and {tuple(one.shape) for one in SEEN} == {(4, 3, 8, 8)}
    fitted(tmp_path, trainer={"max_steps": 1, "max_epochs": 5})
    assert len(SEEN) == 1


def test_the_optimizer_is_the_one_that_is_described(tmp_path: Any) -> None:
    """One step of plain SGD: the gradient of the mean loss is (softmax − one-hot)·input, −1/4 and 1/4 for the input 1."""
    changes: dict[str, Any] = {"loader": {"batch_size": COUNT}}
    moved, _ = fitted(tmp_path, optimizer={"lr": 0.1, "momentum": 0.0}, **changes)
    step = moved["head.weight"] - base()["head.weight"]
    assert step.flatten().tolist() == pytest.approx([0.1 * 0.25, -0.1 * 0.25], rel=1e-4)
    decayed, _ = fitted(tmp_path, optimizer={"lr": 0.1, "momentum": 0.0, "weight_decay": 0.5}, **changes)
    extra = decayed["head.weight"] - moved["head.weight"]
    assert extra.flatten().tolist() == pytest.approx([0.0, -0.1 * 0.5 * math.log(3)], abs=1e-6)


def test_a_fit_leaves_the_average_that_it_keeps(tmp_path: Any) -> None:
    callbacks = {"ema": {"_target_": "soups.callbacks.EMA", "decay": 0.5, "warmup": "none"}}
    changes: dict[str, Any] = {"optimizer": {"lr": 0.1}, "loader": {"batch_size": COUNT}, "trainer": {"max_epochs": 3}}
    raw, _ = fitted(tmp_path, callbacks=callbacks, **changes)
    kept, _ = fitted(tmp_path, callbacks=callbacks, keep="ema", **changes)
    start = base()["head.weight"]
    assert not torch.equal(kept["head.weight"], raw["head.weight"])
    between = (kept["head.weight"] - start) / (raw["head.weight"] - start)
    assert bool(((between > 0) & (between < 1)).all()), "between the base model and the end of the same run"
