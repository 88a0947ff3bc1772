"""Which points enter an average, in every way of training."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from torch import nn

from soups.callbacks import EMA, LAWA, SWA, Averages
from soups.errors import ConfigError
from tests.devices import DEVICE


def test_ema_is_the_closed_form_over_all_steps(tmp_path, toy):
    module, ema = toy.Toy(), EMA(decay=0.9)
    toy.trainer(tmp_path, ema).fit(module)
    assert len(module.points) == 18
    toy.close(ema.average(), toy.ema_of(module.points, 0.9))
    assert toy.same(toy.snapshot(module), module.points[-1]), "the module keeps its raw weights"


@pytest.mark.parametrize(
    ("start", "every", "epochs", "steps"),
    [
        ("75%", "1ep", 8, [36, 42, 48]),
        ("1ep", "1ep", 3, [6, 12, 18]),
        ("0st", "2ep", 5, [12, 24, 30]),  # the last point is in, though the spacing misses it
        ("4st", "5st", 2, [4, 9, 12]),
        ("1ep", "0.5ep", 2, [6, 9, 12]),
        ("50%", "25%", 2, [6, 9, 12]),
    ],
)
def test_swa_takes_the_points_its_schedule_names(tmp_path, toy, start, every, epochs, steps):
    module, swa = toy.Toy(), SWA(start=start, every=every)
    toy.trainer(tmp_path, swa, max_epochs=epochs).fit(module)
    toy.close(swa.average(), toy.mean_of([module.points[step - 1] for step in steps]))


@pytest.mark.parametrize(
    ("k", "every", "steps"), [(2, "1ep", [12, 18]), (4, "3st", [9, 12, 15, 18]), (5, "1st", [14, 15, 16, 17, 18])]
)
def test_lawa_is_the_mean_of_the_last_k(tmp_path, toy, k, every, steps):
    module, lawa = toy.Toy(), LAWA(k=k, every=every)
    toy.trainer(tmp_path, lawa).fit(module)
    toy.close(lawa.average(), toy.mean_of([module.points[step - 1] for step in steps]))


def test_every_eight_steps_uses_beta_to_the_eighth(tmp_path, toy):
    module, ema = toy.Toy(), EMA(decay=0.9, every="4st")
    toy.trainer(tmp_path, ema).fit(module)
    toy.close(ema.average(), toy.ema_of(module.points[3::4], 0.9**4))


def test_half_life_in_percent_of_the_run(tmp_path, toy):
    module, ema = toy.Toy(), EMA(half_life="10%")
    toy.trainer(tmp_path, ema).fit(module)
    toy.close(ema.average(), toy.ema_of(module.points, 2 ** (-1 / 1.8)))


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_batches_are_one_step(tmp_path, toy, accumulate):
    module, ema = toy.Toy(), EMA(decay=0.9)
    toy.trainer(tmp_path, ema, accumulate_grad_batches=accumulate).fit(module)
    steps = [e * 6 + b for e in range(3) for b in range(6) if (b + 1) % accumulate == 0 or b == 5]
    # between steps only BatchNorm's statistics move
    toy.close(ema.average(), toy.ema_of([module.points[step] for step in steps], 0.9))


class Manual:
    """Several optimizers under manual optimization, both stepped in every second batch."""

    automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[i].parameters(), lr=0.05) for i in (0, 2)]

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        optimizers = self.optimizers()
        self.manual_backward(loss)
        if batch_idx % 2:
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()


def test_several_optimizers_under_manual_optimization_are_one_step_a_batch(tmp_path, toy):
    class Two(Manual, toy.Toy):
        def __init__(self, **options):
            super().__init__(**options)
            self.automatic_optimization = False

    module, ema = Two(), EMA(decay=0.9)
    toy.trainer(tmp_path, ema).fit(module)
    toy.close(ema.average(), toy.ema_of(module.points[1::2], 0.9))


@pytest.mark.parametrize("fused", [False, True])
def test_steps_skipped_by_mixed_precision_do_not_count(tmp_path, toy, fused):
    # A gradient scaler leaves out optimizer.step when gradients overflow; fused optimizers are called and skip inside.
    class Scaled(toy.Toy):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.scaler = torch.amp.GradScaler(DEVICE.type, init_scale=4.0)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05, fused=fused)

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers().optimizer
            optimizer.zero_grad()
            loss = self.loss(batch) * (float("inf") if batch_idx in (2, 3) else 1.0)
            self.scaler.scale(loss).backward()
            self.scaler.step(optimizer)
            self.scaler.update()

    module, ema = Scaled(), EMA(decay=0.9)
    toy.trainer(tmp_path, ema).fit(module)
    kept = [point for number, point in enumerate(module.points) if number % 6 not in (2, 3)]
    assert not torch.equal(module.points[4]["net.0.weight"], module.points[3]["net.0.weight"])
    assert ema._session.tracked["ema"].mean.count == 12
    toy.close(ema.average(), toy.ema_of(kept, 0.9))


def test_start_that_is_never_reached_warns_and_changes_nothing(tmp_path, toy):
    module, ema = toy.Toy(), EMA(start="1000st", validate="average")
    with pytest.warns(UserWarning, match="never started"):
        toy.trainer(tmp_path, ema).fit(module)
    assert toy.same(toy.snapshot(module), module.points[-1])


def test_a_callback_starts_anew_in_a_second_fit(tmp_path, toy):
    ema = EMA(decay=0.9)
    for _ in range(2):
        module = toy.Toy()
        toy.trainer(tmp_path, ema).fit(module)
        toy.close(ema.average(), toy.ema_of(module.points, 0.9))


def test_max_epochs_minus_one(tmp_path, toy):
    module, ema, swa = toy.Toy(), EMA(decay=0.9), SWA(start="1ep", every="1ep")
    toy.trainer(tmp_path, ema, swa, max_epochs=-1, max_steps=15).fit(module)
    toy.close(ema.average(), toy.ema_of(module.points, 0.9))
    toy.close(swa.average(), toy.mean_of([module.points[i] for i in (5, 11, 14)]))


def test_a_share_of_a_run_without_end_is_refused(tmp_path, toy):
    class Endless(toy.Toy):
        def on_train_epoch_end(self):
            self.trainer.should_stop = True

    with pytest.raises(ConfigError, match="no planned length"):
        toy.trainer(tmp_path, EMA(half_life="1%"), max_epochs=-1).fit(Endless())
    module, ema = Endless(), EMA(half_life="10st")
    toy.trainer(tmp_path, ema, max_epochs=-1).fit(module)
    toy.close(ema.average(), toy.ema_of(module.points, 2 ** (-1 / 10)))


def test_frozen_parameters_take_no_memory_and_unfrozen_ones_join_exactly(tmp_path, toy):
    class Unfreeze(BaseFinetuning):
        def freeze_before_training(self, pl_module):
            self.freeze(pl_module.net[0])

        def finetune_function(self, pl_module, epoch, optimizer):
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=0.05)

    class Head(toy.Toy):
        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05)

    module, ema = Head(), EMA(decay=0.9)
    tracked = []

    class Look(toy.pl.Callback):
        def on_train_batch_end(self, *_):
            tracked.append(set(ema._session.tracked["ema"].mean.value()))

    toy.trainer(tmp_path, ema, Unfreeze(), Look()).fit(module)
    assert "net.0.weight" not in tracked[0] and "net.0.weight" in tracked[-1]
    assert not torch.equal(module.points[5]["net.0.weight"], module.points[-1]["net.0.weight"])
    toy.close(ema.average(), toy.ema_of(module.points, 0.9))


def test_tied_weights_are_averaged_once_and_stay_tied(tmp_path, toy):
    class Tied(toy.Toy):
        def __init__(self, **options):
            super().__init__(norm=False)
            self.first = nn.Linear(3, 3)
            self.second = nn.Linear(3, 3)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.net(self.second(torch.tanh(self.first(x))))

    module, ema = Tied(), EMA(decay=0.9)
    toy.trainer(tmp_path, ema).fit(module)
    average = ema.average()
    assert "second.weight" not in ema._session.tracked["ema"].mean.value()
    assert average["first.weight"] is average["second.weight"]
    toy.close(average, toy.ema_of(module.points, 0.9))
    fresh = Tied()
    fresh.load_state_dict(average)


def test_integer_buffers_are_the_raw_ones(tmp_path, toy):
    module, ema = toy.Toy(), EMA(decay=0.9)
    toy.trainer(tmp_path, ema).fit(module)
    assert ema.average()["net.1.num_batches_tracked"] == 18


def test_compiled_modules_are_matched_by_plain_names(tmp_path, toy):
    class Compiled(toy.Toy):
        def __init__(self, **options):
            super().__init__(**options)
            self.net = torch.compile(self.net, backend="eager")

        def loss(self, batch):
            return (self(batch[0]) - batch[1]).square().mean()

    module, ema = Compiled(), EMA(decay=0.9, validate="average")
    toy.trainer(tmp_path, ema).fit(module)
    average = ema.average()
    assert "net._orig_mod.0.weight" in average
    toy.close(average, toy.ema_of(module.points, 0.9))
    module.load_state_dict(average)


@pytest.mark.parametrize("seen", ["eager", "aot_eager"])
def test_compiled_modules_see_the_average_while_it_is_in_place(tmp_path, toy, seen):
    # A compiled graph must read the exchanged memory, not what it captured before.
    class Compiled(toy.Toy):
        def __init__(self, **options):
            super().__init__(norm=False)
            self.net = torch.compile(self.net, backend=seen)

        def loss(self, batch):
            return (self(batch[0]) - batch[1]).square().mean()

    module, ema = Compiled(), EMA(decay=0.9, validate="both")
    trainer = toy.trainer(tmp_path, ema, max_epochs=2)
    trainer.fit(module)
    for suffix, weights in (("", module.points[-1]), ("_ema", ema.average())):
        plain = {name.replace("_orig_mod.", ""): tensor for name, tensor in weights.items()}
        found = float(trainer.callback_metrics[f"val/loss{suffix}"])
        assert found == pytest.approx(toy.evaluate(toy.Toy(norm=False), plain), rel=1e-5)


def test_recurrent_layers_see_the_average_while_it_is_in_place(tmp_path, toy):
    # They keep a list of their weights beside the module's own.
    class Recurrent(toy.Toy):
        def __init__(self):
            super().__init__(norm=False)
            self.memory = nn.LSTM(3, 3)

        def forward(self, x):
            return self.net(self.memory(x)[0])

    module, ema = Recurrent(), EMA(decay=0.9, validate="average")
    trainer = toy.trainer(tmp_path, ema)
    trainer.fit(module)
    wanted = Recurrent()
    wanted.load_state_dict(ema.average())
    with torch.no_grad():
        losses = [wanted.loss(batch) for batch in wanted.val_dataloader()]
    assert float(trainer.callback_metrics["val/loss"]) == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)


def test_optimizers_that_step_in_turn(tmp_path, toy):
    # Under manual optimization each batch moves one part of the module only; each such batch is a step.
    class Turns(toy.Toy):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self):
            return [torch.optim.SGD(self.net[i].parameters(), lr=0.05) for i in (0, 2)]

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()[batch_idx % 2]
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    module, ema = Turns(), EMA(decay=0.9)
    toy.trainer(tmp_path, ema).fit(module)
    toy.close(ema.average(), toy.ema_of(module.points, 0.9))


def test_configure_model(tmp_path, toy):
    class Late(toy.Toy):
        def __init__(self):
            super().__init__()
            self.net = None

        def configure_model(self):
            if self.net is None:
                self.net = nn.Sequential(nn.Linear(3, 1))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    module, ema = Late(), EMA(decay=0.9)
    toy.trainer(tmp_path, ema).fit(module)
    toy.close(ema.average(), toy.ema_of(module.points, 0.9))


def test_bfloat16_weights_are_averaged_in_float32(tmp_path, toy):
    module, ema = toy.Toy(norm=False, dtype=torch.bfloat16), EMA(decay=0.99)
    toy.trainer(tmp_path, ema).fit(module)
    value = ema._session.value("ema")
    assert all(tensor.dtype == torch.float32 for tensor in value.values())
    toy.close(value, toy.ema_of(module.points, 0.99), 1e-5)
    assert ema.average()["net.0.weight"].dtype == torch.bfloat16


def test_several_averages_in_one_or_in_several_callbacks_are_the_same(tmp_path, toy):
    one, three = toy.Toy(), toy.Toy()
    together = Averages(ema=EMA(decay=0.9), lawa=LAWA(k=3, every="2st"), swa=SWA(start="1ep"))
    toy.trainer(tmp_path, together).fit(one)
    apart = [EMA(decay=0.9), LAWA(k=3, every="2st"), SWA(start="1ep")]
    toy.trainer(tmp_path, *apart).fit(three)
    for callback in apart:
        name = callback.settings.name
        assert toy.same(together.average(name), callback.average(name))
        assert toy.same(apart[0].average(name), callback.average(name))


def test_two_averages_of_one_name_are_refused(tmp_path, toy):
    with pytest.raises(ConfigError, match="Two averages are called 'ema'"):
        toy.trainer(tmp_path, EMA(decay=0.9), EMA(decay=0.99)).fit(toy.Toy())


def test_two_averages_with_names(tmp_path, toy):
    module, fast, slow = toy.Toy(), EMA(decay=0.5, name="fast"), EMA(decay=0.9, name="slow")
    toy.trainer(tmp_path, fast, slow).fit(module)
    toy.close(fast.average("fast"), toy.ema_of(module.points, 0.5))
    toy.close(fast.average("slow"), toy.ema_of(module.points, 0.9))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EMA(decay=0.9, half_life="1%"), "one length"),
        (lambda: EMA(half_life="10"), "not a length"),
        (lambda: EMA(decay=1.5), "between 0 and 1"),
        (lambda: EMA(validate="ema"), "not a choice"),
        (lambda: EMA(evry="1st"), "did you mean 'every'"),
        (lambda: EMA(name="raw"), "cannot be an average's name"),
        (lambda: EMA(dtype="float16"), "float16"),
        (lambda: LAWA(k=0), "leaves none"),
        (lambda: SWA(every="0ep"), "takes no points"),
        (lambda: Averages(), "nothing to keep"),
        (lambda: Averages(both=Averages(ema=EMA())), "itself an Averages"),
    ],
)
def test_wrong_settings_are_refused_at_once(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
