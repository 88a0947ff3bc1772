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


def reached(module, batch):
    """Return the names of the matrices that a training forward pass mixes, and all matrices."""
    mixout_ = Mixout(p=0.9)
    mixout_.on_train_start(None, module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)  # away from the anchor, so that a mixed matrix differs
    batch(module.train())
    mixed = set(mixout_._mixed)
    mixout_._detach()
    matrices = {
        name: p for name, p in module.named_parameters()
        if p.dim() >= 2 and not any(word in name for word in ("bias", "embed", "emb"))
    }  # fmt: skip
    return mixed, matrices


def test_every_matrix_of_torchs_transformer_encoder_is_reached():
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    encoder = torch.nn.TransformerEncoder(layer, 2)
    mixed, matrices = reached(encoder, lambda module: module(torch.randn(2, 5, 8)))
    assert mixed == set(matrices) and len(mixed) == 8
    # what the forward pass computes with is mixed: it differs from the plain one, and returns to it
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8)
    plain = encoder.train()(x)
    callback = Mixout(p=0.9, layers=lambda name, module: name.endswith("out_proj"))
    callback.on_train_start(None, encoder)
    with torch.no_grad():
        for layer in encoder.layers:
            layer.self_attn.out_proj.weight.mul_(3.0)
    assert not torch.allclose(encoder(x), plain)
    callback._detach()
    assert [name for name, _ in encoder.layers[0].self_attn.out_proj.named_parameters()] == ["weight", "bias"]


def test_every_matrix_of_xlnet_is_reached():
    transformers = pytest.importorskip("transformers")
    config = transformers.XLNetConfig(vocab_size=20, d_model=16, n_layer=2, n_head=2, d_inner=32)
    model = transformers.XLNetModel(config)
    mixed, matrices = reached(model, lambda module: module(torch.randint(0, 20, (2, 5))))
    assert mixed == set(matrices) and "layer.0.rel_attn.q" in mixed
    # one draw an input, whichever dimensions run over inputs: q maps d_model, o maps heads
    q = model.layer[0].rel_attn.q
    drawn = mixout(torch.ones_like(q), torch.zeros_like(q), 0.5, inputs=(0,), generator=generator(0, "x"))
    assert torch.equal(drawn, drawn[:, :1, :1].expand_as(drawn)) and len(drawn.unique()) == 2


def test_gpt2s_linear_layers_share_draws_down_their_inputs():
    transformers = pytest.importorskip("transformers")
    model = transformers.GPT2Model(transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11, n_positions=8))
    mixed, _ = reached(model, lambda module: module(torch.randint(0, 11, (1, 4))))
    assert mixed == {f"h.0.{name}.weight" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}


def test_matrices_out_of_reach_are_named(tmp_path, toy):
    class Recurrent(toy.Toy):
        def __init__(self):
            super().__init__(norm=False, lr=0.001)
            self.memory = torch.nn.LSTM(3, 3)
            self.head = torch.nn.Linear(1, 1)

        def forward(self, x):
            y = self.net(self.memory(x)[0])
            return torch.nn.functional.linear(y, self.head.weight)

    with pytest.warns(UserWarning, match="leaves out") as told:
        toy.trainer(tmp_path, Mixout(p=0.5)).fit(Recurrent())
    words = " ".join(str(warning.message) for warning in told)
    assert "leaves out 2 matrices (memory.weight_ih_l0, memory.weight_hh_l0)" in words
    assert "leaves out 1 matrices (head.weight)" in words
