"""Modules that change in the middle of a fit, buffers that mean nothing averaged, and values that are not finite."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from soups.averaging import EMA as Average
from soups.averaging import LAWA as Window
from soups.averaging import SWA as Equal
from soups.averaging import PowerEMA, load_averaged
from soups.callbacks import EMA, LAWA, SWA


def changing(toy, change, at=2):
    """Return a class whose modules change themselves before batch `at` of the second epoch; it keeps the points."""

    class Changing(toy.Toy):
        def __init__(self):
            super().__init__(norm=False)

        def on_train_batch_start(self, batch, batch_idx):
            if self.current_epoch == 1 and batch_idx == at:
                change(self)

    return Changing


def new_head(module):
    torch.manual_seed(3)
    module.net[2] = nn.Linear(5, 1)
    module.trainer.optimizers[0].add_param_group({"params": list(module.net[2].parameters())})


def wider(module):
    torch.manual_seed(3)
    module.net[0], module.net[2] = nn.Linear(3, 7), nn.Linear(7, 1)
    module.trainer.optimizers[0].add_param_group({"params": [*module.net[0].parameters(), *module.net[2].parameters()]})


def new_layer(module):
    torch.manual_seed(3)
    module.net.append(nn.Linear(1, 1))
    module.trainer.optimizers[0].add_param_group({"params": list(module.net[3].parameters())})


def weight_norm(module):
    parametrizations.weight_norm(module.net[0])
    module.trainer.optimizers[0].add_param_group({"params": list(module.net[0].parametrizations.parameters())})


def closed_form(points, decay):
    """Return the EMA of each tensor over the points that have it, as if it had been constant before."""
    shares = [decay ** (len(points) - 1 - number) for number in range(len(points))]
    total = sum(shares)
    average = {}
    for name, tensor in points[-1].items():
        have = [number for number, point in enumerate(points) if name in point and point[name].shape == tensor.shape]
        first = next(n for n in have if all(m in have for m in range(n, len(points))))
        values = [points[max(number, first)][name].double() for number in range(len(points))]
        average[name] = sum(s / total * value for s, value in zip(shares, values, strict=True))
    return average


@pytest.mark.parametrize("change", [new_head, wider, new_layer, weight_norm])
@pytest.mark.parametrize("make", [EMA, LAWA, SWA], ids=["ema", "lawa", "swa"])
def test_changes_are_admitted_in_words(tmp_path, toy, change, make):
    module = changing(toy, change)()
    options = {"ema": {"decay": 0.9}, "lawa": {"k": 4, "every": "1st"}, "swa": {"start": "0st", "every": "1st"}}
    callback = make(validate="both", **options[make.__name__.lower()])
    losses = []

    class Look(toy.pl.Callback):
        def on_validation_end(self, trainer, pl_module):
            losses.append(float(trainer.callback_metrics[f"val/loss_{callback.settings.name}"]))

    trainer = toy.trainer(tmp_path, callback, Look())
    with pytest.warns(UserWarning, match=r"The module has changed after \d+ steps \(joined: net\."):
        trainer.fit(module)
    average = callback.average()
    assert average.keys() == module.state_dict().keys()
    with callback.applied() as held:
        held.eval()
        loss = torch.stack([held.loss(batch) for batch in held.val_dataloader()]).mean()
    assert losses[-1] == pytest.approx(float(loss), rel=1e-5), "the metric is that of the saved average"
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert toy.same(load_averaged(tmp_path / "a.ckpt", callback.settings.name), average)
    # names of new objects begin anew: their points before the change are another tensor's
    changed_at = 8
    new = {name for name, tensor in module.points[changed_at].items()} - module.points[0].keys()
    new |= {f"net.2.{key}" for key in ("weight", "bias")} if change in (new_head, wider) else set()
    new |= {f"net.0.{key}" for key in ("weight", "bias")} if change is wider else set()
    points = [
        {n: t for n, t in p.items() if number >= changed_at or n not in new} for number, p in enumerate(module.points)
    ]
    if make is EMA:
        # a tensor that joins is taken to have been what it was at its first point
        wanted = closed_form(points, 0.9)
        toy.close(average, wanted, 1e-5)
    if make is LAWA:
        toy.close(average, toy.mean_of([{n: p[n] for n in average} for p in module.points[-4:]]), 1e-5)


def test_a_parameter_that_is_wrapped_keeps_its_history(tmp_path, toy):
    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base_layer = base.requires_grad_(False)
            self.down, self.up = nn.Linear(3, 2, bias=False), nn.Linear(2, 5, bias=False)
            nn.init.zeros_(self.up.weight)

        def forward(self, x):
            return self.base_layer(x) + self.up(self.down(x))

    def adapt(module):
        torch.manual_seed(4)
        module.net[0] = Adapted(module.net[0])
        new = [*module.net[0].down.parameters(), *module.net[0].up.parameters()]
        module.trainer.optimizers[0].add_param_group({"params": new})

    module, ema = changing(toy, adapt)(), EMA(decay=0.9)
    module.loss = lambda batch: (module.net(batch[0]) - batch[1]).square().mean()
    with pytest.warns(UserWarning, match=r"renamed: net\.0\.weight → net\.0\.base_layer\.weight"):
        toy.trainer(tmp_path, ema).fit(module)
    old = [p.get("net.0.base_layer.weight", p.get("net.0.weight")) for p in module.points]
    wanted = toy.ema_of([{"w": tensor} for tensor in old], 0.9)["w"]
    toy.close(ema.average(), {"net.0.base_layer.weight": wanted}, 1e-5)


def test_peft_adapters_added_in_mid_fit(tmp_path, toy):
    peft = pytest.importorskip("peft")

    def adapt(module):
        torch.manual_seed(4)
        config = peft.LoraConfig(r=2, target_modules=["0", "2"])
        module.net = peft.get_peft_model(module.net, config)
        module.trainer.optimizers[0].add_param_group(
            {"params": [p for n, p in module.net.named_parameters() if "lora_" in n]}
        )

    module, ema = changing(toy, adapt)(), EMA(decay=0.9, validate="both")
    module.loss = lambda batch: (module.net(batch[0]) - batch[1]).square().mean()
    trainer = toy.trainer(tmp_path, ema)
    with pytest.warns(UserWarning, match="The module has changed"):
        trainer.fit(module)
    average = ema.average()
    lora = [name for name in average if "lora_B" in name]
    assert lora and all(not torch.equal(average[name], module.points[-1][name]) for name in lora)
    assert any("base_layer.weight" in name for name in average)
    with ema.applied() as held:
        loss = torch.stack([held.loss(batch) for batch in held.val_dataloader()]).mean()
    assert float(trainer.callback_metrics["val/loss_ema"]) == pytest.approx(float(loss), rel=1e-5)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert toy.same(load_averaged(tmp_path / "a.ckpt"), average)


def test_exchanged_optimizers_are_listened_to(tmp_path, toy):
    class Exchanges(toy.Toy):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.trainer.strategy.optimizers = [torch.optim.Adam(self.parameters(), lr=0.01)]

    module, ema = Exchanges(), EMA(decay=0.9)
    toy.trainer(tmp_path, ema).fit(module)
    assert ema._session.tracked["ema"].mean.count == 18
    toy.close(ema.average(), toy.ema_of(module.points, 0.9))


# Buffers --------------------------------------------------------------------------------------------------------------


class Buffered(nn.Module):
    """Buffers of all kinds; each forward pass in training changes those that change."""

    def __init__(self):
        super().__init__()
        self.linear = parametrizations.spectral_norm(nn.Linear(3, 5))
        self.norm, self.instance = nn.BatchNorm1d(5), nn.InstanceNorm1d(5, track_running_stats=True)
        self.register_buffer("mask", torch.full((5, 5), -torch.inf).triu(1))
        self.register_buffer("table", torch.randn(4))
        self.register_buffer("grown", torch.zeros(1))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, x):
        if self.training:
            self.table += 1
            self.grown = torch.zeros(len(self.grown) + 1)
        y = self.norm(self.linear(x))
        y = self.instance(y[:, :, None].expand(-1, -1, 3))[..., 0]
        return y @ (torch.zeros(5, 5) + self.mask).softmax(1).T


def test_running_statistics_are_averaged_and_all_else_is_copied(tmp_path, toy):
    class Many(toy.Toy):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(Buffered(), nn.Identity(), nn.Linear(5, 1))

        def loss(self, batch):
            return (self(batch[0]) - batch[1]).square().mean()

    module = Many()
    ema, swa, lawa = EMA(decay=0.5, validate="both"), SWA(start="0st", every="1st"), LAWA(k=2, every="1st")
    trainer = toy.trainer(tmp_path, ema, swa, lawa)
    trainer.fit(module)
    for name in ("ema", "swa", "lawa"):
        average, raw = ema.average(name), module.points[-1]
        copied = {key for key in average if torch.equal(average[key], raw[key])}
        assert {"net.0.mask", "net.0.table", "net.0.grown", "net.0.norm.num_batches_tracked"} <= copied
        assert {key for key in average if key.endswith(("_u", "_v"))} <= copied
        averaged = {f"net.0.{layer}.running_{what}" for layer in ("norm", "instance") for what in ("mean", "var")}
        assert not averaged & copied
        assert all(torch.isfinite(average[key]).all() for key in average if key != "net.0.mask")
    wanted = toy.ema_of([{key: p[key] for key in averaged} for p in module.points], 0.5)
    toy.close(ema.average(), wanted)
    # spectral norm of the average is close to one: the vectors belong to weights of nearly the same directions
    with swa.applied("swa") as held:
        weight = held.net[0].linear.eval().weight
    assert float(torch.linalg.matrix_norm(weight, 2)) == pytest.approx(1.0, abs=0.05)
    assert "val/loss_ema" in trainer.callback_metrics


@pytest.mark.parametrize(
    "make",
    [
        lambda: Average(decay=0.9), lambda: Average(decay=0.9, fused=True), lambda: Average(decay=0.9, dtype="bfloat16"),
        lambda: Equal(), lambda: Equal(dtype="bfloat16"), lambda: Window(k=2), lambda: PowerEMA(0.1),
        lambda: Average(decay=0.9, background=True),
    ],
)  # fmt: skip
@pytest.mark.parametrize("size", [5, 100, 400])
def test_equal_values_stay_as_they_are_infinite_ones_included(make, size):
    average = make()
    mask = torch.full((size, size), -torch.inf).triu(1)
    mask[0, 0] = torch.inf
    for step in range(5):
        average.update({"mask": mask, "w": torch.full((size, 3), float(step)), "same": torch.full((2,), 0.1)})
    assert torch.equal(average.value()["mask"].float(), mask)
    assert torch.equal(average.value()["same"], torch.full((2,), 0.1).to(average.value()["same"].dtype))
    assert 0 < float(average.value()["w"].float().mean()) < 4


def test_a_nan_born_in_an_average_is_told(tmp_path, toy):
    class Spikes(toy.Toy):
        def on_before_optimizer_step(self, optimizer):
            if self.trainer.global_step == 5:
                self.kept = self.net[2].weight.detach().clone()
                with torch.no_grad():
                    self.net[2].weight.fill_(torch.nan)

        def on_train_batch_start(self, batch, batch_idx):
            if hasattr(self, "kept"):
                with torch.no_grad():
                    self.net[2].weight.copy_(self.kept)
                del self.kept
                self.trainer.optimizers[0].state.clear()

    with pytest.warns(
        UserWarning, match=r"'ema' holds \d+ values that are not finite in 'net\.2\.weight' after \d+ steps"
    ):
        toy.trainer(tmp_path, EMA(decay=0.9, validate="both")).fit(Spikes())


def test_the_distance_of_complex_weights_counts_imaginary_parts(tmp_path, toy):
    class Phases(toy.Toy):
        def __init__(self):
            super().__init__(norm=False)
            self.phase = nn.Parameter(torch.ones(3, dtype=torch.complex64) * (1 + 2j))

        def loss(self, batch):
            return (self(batch[0]) - batch[1]).square().mean() + (self.phase.imag - 5).square().sum()

    module, ema = Phases(), EMA(decay=0.9, log_distance=True)
    trainer = toy.trainer(tmp_path, ema)
    trainer.fit(module)
    average = ema.average()
    wanted = sum(float((average[n] - p).abs().square().sum()) for n, p in module.points[-1].items()) ** 0.5
    imaginary = float((average["phase"] - module.points[-1]["phase"]).imag.abs().square().sum()) ** 0.5
    assert imaginary > 0.1
    assert float(trainer.callback_metrics["distance/ema"]) == pytest.approx(wanted, rel=1e-4)
