"""Mixout: the formula, its gradient, and training with it."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from soups.averaging import mixout
from soups.callbacks import Mixout
from soups.errors import ConfigError
from soups.seeding import generator


@pytest.mark.parametrize("share", ["column", "element"])
def test_forward_and_gradient_are_the_papers_formula(share):
    p = 0.7
    theta = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    anchor = torch.randn(4, 6, dtype=torch.float64)
    mixed = mixout(theta, anchor, p, share=share, generator=generator(0, "test"))
    shape = (6,) if share == "column" else (4, 6)
    keep = torch.empty(shape, dtype=torch.float64).bernoulli_(1 - p, generator=generator(0, "test"))
    torch.testing.assert_close(mixed, (keep * theta + (1 - keep) * anchor - p * anchor) / (1 - p))
    upstream = torch.randn(4, 6, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(mixed, theta, upstream)
    # the published code leaves out 1/(1 - p): 0.3 times this
    torch.testing.assert_close(gradient, (upstream * keep / (1 - p)).expand(4, 6))


def test_its_expected_value_is_the_weight():
    theta, anchor = torch.randn(8, 50), torch.randn(8, 50)
    draw = torch.Generator().manual_seed(0)
    mean = torch.stack([mixout(theta, anchor, 0.5, generator=draw) for _ in range(4000)]).mean(0)
    torch.testing.assert_close(mean, theta, atol=0.12, rtol=0)


def test_wrong_settings():
    with pytest.raises(ConfigError, match=r"\[0, 1\)"):
        Mixout(p=1.0)
    with pytest.raises(ConfigError, match="share"):
        Mixout(share="row")


def test_p_zero_is_plain_training_and_parameters_stay_parameters(tmp_path, toy):
    plain, module = toy.Toy(), toy.Toy()
    toy.trainer(tmp_path).fit(plain)
    names = list(module.state_dict())
    toy.trainer(tmp_path, Mixout(p=0.0)).fit(module)
    assert toy.same(toy.snapshot(module), toy.snapshot(plain)) and list(module.state_dict()) == names
    mixed = toy.Toy()
    toy.trainer(tmp_path, Mixout(p=0.7)).fit(mixed)
    assert list(mixed.state_dict()) == names and not toy.same(toy.snapshot(mixed), toy.snapshot(plain))
    assert isinstance(mixed.net[0].weight, torch.nn.Parameter)


def test_evaluation_uses_the_weights_themselves(tmp_path, toy):
    seen = []

    class Look(toy.Toy):
        def validation_step(self, batch, batch_idx):
            seen.append(torch.equal(self.net[0](batch[0]), batch[0] @ self.net[0].weight.T + self.net[0].bias))

    toy.trainer(tmp_path, Mixout(p=0.9)).fit(Look(norm=False))
    assert seen and all(seen)


def test_resume_is_bit_identical(tmp_path, toy):
    class Stop(toy.pl.Callback):
        def on_train_epoch_end(self, trainer, *_):
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    whole, part = toy.Toy(lr=0.002), toy.Toy(lr=0.002)
    toy.trainer(tmp_path, Mixout(p=0.5), Stop()).fit(whole)
    toy.trainer(tmp_path, Mixout(p=0.5)).fit(part, ckpt_path=tmp_path / "0.ckpt")
    assert len(part.points) == 12
    assert torch.isfinite(whole.net[0].weight).all()
    assert toy.same(toy.snapshot(part), toy.snapshot(whole))


def test_activation_checkpointing_draws_the_same_masks(tmp_path, toy):
    class Recomputed(toy.Toy):
        def forward(self, x):
            return checkpoint(self.net, x, use_reentrant=False)

    plain, module = toy.Toy(norm=False, lr=0.002), Recomputed(norm=False, lr=0.002)
    toy.trainer(tmp_path, Mixout(p=0.5)).fit(plain)
    toy.trainer(tmp_path, Mixout(p=0.5)).fit(module)
    toy.close(toy.snapshot(module), toy.snapshot(plain))


def test_an_exception_in_forward_brings_the_parameter_back(tmp_path, toy):
    class Fails(toy.Toy):
        def training_step(self, batch, batch_idx):
            return self.net[0](batch[0][:, :2]).sum()

    module = Fails()
    with pytest.raises(RuntimeError):
        toy.trainer(tmp_path, Mixout(p=0.5)).fit(module)
    assert isinstance(module.net[0]._parameters["weight"], torch.nn.Parameter)
    assert not module.net[0]._forward_pre_hooks
