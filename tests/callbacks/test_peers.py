"""What other libraries' averages do, shown on them, beside ours doing the right thing.

Each test first reproduces the failure on the installed library. When a later version has repaired it, the test says so by
failing there: then the row in callbacks/README.md is out of date and should go.
"""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from soups import averaging
from soups.averaging import load_averaged
from soups.callbacks import EMA, SWA


def theirs(decay=0.9, **options):
    return EMAWeightAveraging(decay=decay, **options)


def equal(a, b, name="net.0.weight"):
    return torch.equal(a[name], b[name])


def test_lightning_tests_raw_weights_after_fit(tmp_path, toy):
    module = toy.Toy(lr=0.2)
    save = ModelCheckpoint(dirpath=tmp_path / "theirs", monitor="val/loss")
    trainer = toy.trainer(tmp_path, theirs(), save)
    trainer.fit(module)
    found = trainer.test(module, ckpt_path="best", verbose=False)[0]["test/loss"]
    held = torch.load(save.best_model_path, weights_only=True)
    assert found == pytest.approx(toy.evaluate(module, held["current_model_state"]), rel=1e-5)
    assert found != pytest.approx(float(save.best_model_score), rel=1e-3), "repaired in Lightning"

    module, ema = toy.Toy(lr=0.2), EMA(decay=0.9, validate="average", test="average")
    save = ModelCheckpoint(dirpath=tmp_path / "ours", monitor="val/loss")
    trainer = toy.trainer(tmp_path, ema, save)
    trainer.fit(module)
    found = trainer.test(module, ckpt_path="best", verbose=False)[0]["test/loss"]
    assert found == pytest.approx(float(save.best_model_score), rel=1e-5)


def test_lightning_saves_raw_weights_under_the_averages_metric(tmp_path, toy):
    module = toy.Toy(lr=0.2)
    save = ModelCheckpoint(dirpath=tmp_path / "theirs", save_weights_only=True, monitor="val/loss")
    toy.trainer(tmp_path, theirs(), save).fit(module)
    saved = torch.load(save.best_model_path, weights_only=True)["state_dict"]
    assert toy.evaluate(module, saved) != pytest.approx(float(save.best_model_score), rel=1e-3), "repaired in Lightning"

    module = toy.Toy(lr=0.2)
    save = ModelCheckpoint(dirpath=tmp_path / "ours", save_weights_only=True, monitor="val/loss")
    toy.trainer(tmp_path, EMA(decay=0.9, validate="average"), save).fit(module)
    saved = load_averaged(save.best_model_path, "ema")
    assert toy.evaluate(module, saved) == pytest.approx(float(save.best_model_score), rel=1e-5)


def test_lightning_throws_training_away_if_the_start_is_not_reached(tmp_path, toy):
    module = toy.Toy()
    initial = toy.snapshot(module)
    toy.trainer(tmp_path, theirs(update_starting_at_step=1000)).fit(module)
    assert equal(toy.snapshot(module), initial), "repaired in Lightning"

    module = toy.Toy()
    with pytest.warns(UserWarning, match="never started"):
        toy.trainer(tmp_path, EMA(start="1000st")).fit(module)
    assert equal(toy.snapshot(module), module.points[-1]) and not equal(module.points[-1], initial)


def test_lightning_validates_initial_weights_before_a_delayed_start(tmp_path, toy):
    def metrics(callback):
        rows = []

        class Record(pl.Callback):
            def on_validation_end(self, trainer, _):
                rows.append(float(trainer.callback_metrics["val/loss"]))

        module = toy.Toy()
        toy.trainer(tmp_path, callback, Record()).fit(module)
        return rows, module

    initial = toy.snapshot(toy.Toy())
    rows, module = metrics(theirs(update_starting_at_step=13))
    assert rows[0] == pytest.approx(toy.evaluate(module, initial), rel=1e-5), "repaired in Lightning"
    rows, module = metrics(EMA(decay=0.9, start="13st", validate="average"))
    assert rows[0] == pytest.approx(toy.evaluate(module, module.points[5]), rel=1e-5)


def test_lightning_makes_no_updates_in_a_second_fit(tmp_path, toy):
    callback = theirs()
    toy.trainer(tmp_path, callback).fit(toy.Toy())
    module = toy.Toy()
    initial = toy.snapshot(module)
    toy.trainer(tmp_path, callback, max_epochs=2).fit(module)
    assert equal(toy.snapshot(module), initial), "repaired in Lightning"

    ema = EMA(decay=0.9)
    toy.trainer(tmp_path, ema).fit(toy.Toy())
    module = toy.Toy()
    toy.trainer(tmp_path, ema, max_epochs=2).fit(module)
    toy.close(ema.average(), toy.ema_of(module.points, 0.9))


def test_lightning_makes_no_updates_with_two_optimizers(tmp_path, toy):
    class Two(toy.Toy):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self):
            return [torch.optim.SGD(self.net[i].parameters(), lr=0.05) for i in (0, 2)]

        def training_step(self, batch, batch_idx):
            optimizers = self.optimizers()
            self.manual_backward(self.loss(batch))
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

    module = Two()
    initial = toy.snapshot(module)
    toy.trainer(tmp_path, theirs(update_every_n_steps=2)).fit(module)
    assert equal(toy.snapshot(module), initial), "repaired in Lightning"

    module, ema = Two(), EMA(decay=0.9, every="2st")
    toy.trainer(tmp_path, ema).fit(module)
    toy.close(ema.average(), toy.ema_of(module.points[1::2], 0.9**2))


def test_lightning_leaves_the_average_in_place_after_an_exception(tmp_path, toy):
    class Fails(toy.Toy):
        def validation_step(self, batch, batch_idx):
            if self.current_epoch == 1:
                raise RuntimeError("stop")

    for callback, right in ((theirs(), False), (EMA(decay=0.9, validate="average"), True)):
        module = Fails()
        save = ModelCheckpoint(dirpath=tmp_path / str(right), save_on_exception=True, save_top_k=0)
        with pytest.raises(RuntimeError, match="stop"):
            toy.trainer(tmp_path, callback, save).fit(module)
        assert equal(toy.snapshot(module), module.points[-1]) == right
        (path,) = (tmp_path / str(right)).glob("*.ckpt")
        held = torch.load(path, weights_only=True)
        # Lightning's checkpoint has the raw weights and the average exchanged
        assert equal(held["state_dict"], module.points[-1]), "both put the raw weights there, Lightning by accident"
        assert ("current_model_state" in held and not equal(held["current_model_state"], module.points[-1])) != right


def test_lightning_loses_the_raw_weights_with_two_averages_or_after_the_fit(tmp_path, toy):
    class Slow(EMAWeightAveraging):
        pass

    def holds_raw(path, module):
        return any(
            isinstance(part, dict) and "net.0.weight" in part and equal(part, module.points[-1])
            for part in torch.load(path, weights_only=True).values()
        )

    module = toy.Toy()
    save = ModelCheckpoint(dirpath=tmp_path / "two", filename="a")
    trainer = toy.trainer(tmp_path, theirs(), Slow(decay=0.99), save, limit_val_batches=0)
    trainer.fit(module)
    assert not holds_raw(tmp_path / "two/a.ckpt", module), "repaired in Lightning"
    module = toy.Toy()
    trainer = toy.trainer(tmp_path, theirs())
    trainer.fit(module)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert not holds_raw(tmp_path / "after.ckpt", module), "repaired in Lightning"

    module = toy.Toy()
    trainer = toy.trainer(tmp_path, EMA(decay=0.9), EMA(decay=0.99, name="slow"))
    trainer.fit(module)
    trainer.save_checkpoint(tmp_path / "ours.ckpt")
    assert holds_raw(tmp_path / "ours.ckpt", module)
    for name, decay in (("ema", 0.9), ("slow", 0.99)):
        toy.close(load_averaged(tmp_path / "ours.ckpt", name), toy.ema_of(module.points, decay))


def test_lightning_averages_integer_buffers(tmp_path, toy):
    module = toy.Toy()
    toy.trainer(tmp_path, theirs(), max_epochs=4).fit(module)
    assert int(module.net[1].num_batches_tracked) < 24, "repaired in Lightning"
    module, ema = toy.Toy(), EMA(decay=0.9)
    toy.trainer(tmp_path, ema, max_epochs=4).fit(module)
    assert ema.average()["net.1.num_batches_tracked"] == 24


def test_lightning_refuses_torchs_multi_avg_fn(tmp_path, toy):
    with pytest.raises((ValueError, TypeError, AssertionError)):
        toy.trainer(tmp_path, EMAWeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(0.9))).fit(toy.Toy())


def test_lightnings_swa_misses_the_last_epoch_and_trains_one_more(tmp_path, toy):
    class Counting(toy.Toy):
        steps = 0

        def training_step(self, batch, batch_idx):
            self.steps += 1
            return super().training_step(batch, batch_idx)

    module = Counting()
    schedule = toy.trainer(
        tmp_path, StochasticWeightAveraging(0.05, swa_epoch_start=5, annealing_epochs=1), max_epochs=8
    )
    schedule.fit(module)
    assert module.steps == 54, "repaired in Lightning"
    final = toy.mean_of([module.points[6 * e - 1] for e in (5, 6, 7, 8)])
    assert not torch.allclose(module.net[0].weight.double(), final["net.0.weight"]), "repaired in Lightning"

    module, swa = Counting(), SWA(start="5ep", buffers="reestimate", forward=lambda module, batch: module.loss(batch))
    toy.trainer(tmp_path, swa, max_epochs=8).fit(module)
    assert module.steps == 48
    final = toy.mean_of([module.points[6 * e - 1] for e in (5, 6, 7, 8)])
    torch.testing.assert_close(swa.average()["net.0.weight"].double(), final["net.0.weight"], rtol=1e-6, atol=1e-6)


def test_lightnings_swa_replaces_the_users_schedule(tmp_path, toy):
    class Scheduled(toy.Toy):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]

    rates = []
    for callback in (StochasticWeightAveraging(0.4, swa_epoch_start=1, annealing_epochs=1), SWA(start="1ep")):
        trainer = toy.trainer(tmp_path, callback)
        trainer.fit(Scheduled())
        rates.append(trainer.optimizers[0].param_groups[0]["lr"])
    assert rates[0] != pytest.approx(0.05 * 0.5**3), "repaired in Lightning"
    assert rates[1] == pytest.approx(0.05 * 0.5**3)


def tensor_bytes(tree, seen):
    """Return the bytes of all tensors in a checkpoint's part, memory that is shared once."""
    if isinstance(tree, torch.Tensor):
        known = tree.untyped_storage().data_ptr() in seen
        seen.add(tree.untyped_storage().data_ptr())
        return 0 if known else tree.untyped_storage().nbytes()
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return sum(tensor_bytes(part, seen) for part in parts)


def test_lightnings_checkpoint_is_twice_the_parameters_and_state_dict_is_not_raw(tmp_path, toy):
    def saved(callback, folder):
        module = toy.Toy(norm=False)
        save = ModelCheckpoint(dirpath=tmp_path / folder, filename="a")
        toy.trainer(tmp_path, callback, save).fit(module)
        held = torch.load(tmp_path / folder / "a.ckpt", weights_only=True)
        copies = {name: part for name, part in held.items() if name not in ("optimizer_states", "callbacks")}
        seen = set()
        once = tensor_bytes(held["state_dict"], seen)
        return module, held, once, tensor_bytes(copies, set())

    module, held, once, everything = saved(theirs(), "theirs")
    assert everything == 2 * once + 8, "and its counter"
    assert not equal(held["state_dict"], module.points[-1]), "repaired in Lightning"
    # An average that can be resumed cannot be smaller than one copy; nothing else is added.
    module, held, once, everything = saved(EMA(decay=0.9), "ours")
    assert everything == 2 * once
    assert equal(held["state_dict"], module.points[-1])


# torch, timm, ema-pytorch -------------------------------------------------------------------------------------------


def jump(model, update, steps):
    """Let all weights jump from 0 to 1, and return how far the average has come after `steps` updates."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    for _ in range(steps):
        update()


def test_torch_averages_stand_still_in_bfloat16(toy):
    model = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    nn.init.zeros_(model.weight)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9995))
    average.update_parameters(model)
    full, rounded = averaging.EMA(0.9995, warmup="none"), averaging.EMA(0.9995, warmup="none", dtype="bfloat16")
    weights = dict(model.named_parameters())
    full.update(weights)
    rounded.update(weights)
    jump(
        model,
        lambda: (average.update_parameters(model), averaging.update([full], weights), rounded.update(weights)),
        2000,
    )
    exact = 1 - 0.9995**2000
    assert float(average.module.weight.float().mean()) < 0.2, "repaired in torch"
    assert float(full.value()["weight"].mean()) == pytest.approx(exact, abs=1e-3)
    assert float(rounded.value()["weight"].float().mean()) == pytest.approx(exact, abs=0.01)
    assert rounded.value()["weight"].dtype == torch.bfloat16


def test_averages_without_warm_up_keep_the_initial_weights(toy):
    timm = pytest.importorskip("timm.utils")
    model = nn.Linear(4, 4, bias=False)
    nn.init.zeros_(model.weight)
    start = {"weight": model.weight.detach().clone()}
    theirs = timm.ModelEmaV3(model, decay=0.9999)
    ours = averaging.EMA(0.9999)
    weights = dict(model.named_parameters())
    jump(model, lambda: (theirs.update(model), ours.update(weights)), 500)
    assert float(theirs.module.weight.mean()) < 0.06, "timm's default has changed"
    assert float(ours.value()["weight"].mean()) == pytest.approx(1.0, abs=1e-6)
    assert not torch.equal(start["weight"], model.weight)


def test_diffusers_and_torch_ema_stand_still_in_bfloat16():
    training_utils, torch_ema = pytest.importorskip("diffusers.training_utils"), pytest.importorskip("torch_ema")
    model = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    nn.init.zeros_(model.weight)
    # `min_decay` and `use_num_updates=False` leave out their warm-ups, so that all decays are equal
    diffusers = training_utils.EMAModel(model.parameters(), decay=0.9995, min_decay=0.9995)
    other = torch_ema.ExponentialMovingAverage(model.parameters(), decay=0.9995, use_num_updates=False)
    ours, weights = averaging.EMA(0.9995, warmup="none"), dict(model.named_parameters())
    diffusers.step(model.parameters())
    ours.update(weights)

    def update():
        diffusers.step(model.parameters())
        other.update()
        ours.update(weights)

    jump(model, update, 2000)
    assert float(diffusers.shadow_params[0].float().mean()) < 0.3, "repaired in diffusers"
    assert float(other.shadow_params[0].float().mean()) < 0.3, "repaired in torch-ema"
    assert float(ours.value()["weight"].mean()) == pytest.approx(1 - 0.9995**2000, abs=1e-3)


def test_diffusers_and_torch_ema_pair_by_position_and_leave_buffers_out():
    training_utils, torch_ema = pytest.importorskip("diffusers.training_utils"), pytest.importorskip("torch_ema")
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2, affine=False))
    diffusers = training_utils.EMAModel(model.parameters(), decay=0.5)
    other = torch_ema.ExponentialMovingAverage(model.parameters(), decay=0.5)
    first = model[0].weight.detach().clone()
    reordered = [model[1].weight, model[0].weight]
    for _ in range(40):
        diffusers.step(reordered)
        other.update(reordered)
    for shadows in (diffusers.shadow_params, other.shadow_params):
        assert len(shadows) == 2, "no buffers"
        torch.testing.assert_close(shadows[0], model[1].weight.detach())  # the average of another tensor
        assert not torch.allclose(shadows[0], first)
    ours = averaging.EMA(0.5)
    everything = dict(model.named_parameters()) | dict(model.named_buffers())
    ours.update(everything)
    for _ in range(40):
        ours.update(dict(reversed(everything.items())))
    torch.testing.assert_close(ours.value()["0.weight"], first)
    assert set(ours.value()) == {"0.weight", "1.weight", "2.running_mean", "2.running_var"}


def test_windows_that_keep_references_average_nothing_on_cpu(toy):
    # The published script of arXiv:2209.14981 keeps `tensor.cpu()` of every point, which on CPU is the tensor itself.
    module = toy.Toy()
    kept, lawa = [], averaging.LAWA(3)
    for value in range(1, 7):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.fill_(float(value))
        kept = [*kept, {name: tensor.cpu() for name, tensor in module.named_parameters()}][-3:]
        lawa.update(module.state_dict())
    faulty = {name: torch.stack([point[name] for point in kept]).mean(0) for name in kept[0]}
    assert float(faulty["net.0.weight"].mean()) == 6.0
    assert float(lawa.value()["net.0.weight"].mean()) == 5.0
    with pytest.raises(RuntimeError):  # and the mean of an integer buffer of BatchNorm is an error in it
        torch.stack([module.net[1].num_batches_tracked] * 3).mean(0)
    assert "net.1.num_batches_tracked" not in lawa.value() and "net.1.running_mean" in lawa.value()


def test_torch_pairs_tensors_by_position_and_we_by_name():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    average, ours = AveragedModel(model), averaging.SWA()
    average.update_parameters(model)
    ours.update(dict(model.named_parameters()))
    swapped = nn.Module()
    swapped.add_module("1", model[1])
    swapped.add_module("0", model[0])
    average.update_parameters(swapped)
    ours.update(dict(swapped.named_parameters()))
    assert not torch.equal(average.module[0].weight, model[0].weight), "repaired in torch"
    assert torch.equal(ours.value()["0.weight"], model[0].weight)


def test_ema_pytorchs_posthoc_profile_ignores_its_interval(tmp_path):
    ema_pytorch = pytest.importorskip("ema_pytorch")
    model = nn.Linear(1, 1, bias=False)
    theirs = ema_pytorch.PostHocEMA(
        model,
        sigma_rels=(0.05, 0.1),
        update_every=100,
        checkpoint_every_num_steps=10**9,
        checkpoint_folder=str(tmp_path),
    )
    ours = averaging.PowerEMA(0.05, interval=100)
    for step in range(1, 5001):
        with torch.no_grad():
            model.weight.fill_(step / 5000)  # the average is then the mean position in training
        theirs.update()
        if step % 100 == 0:
            ours.update({"weight": model.weight})
    wanted = (averaging.power.gamma_of(0.05) + 1) / (averaging.power.gamma_of(0.05) + 2)
    assert float(theirs.ema_models[0].ema_model.weight) < 0.5, "repaired in ema-pytorch"
    assert float(ours.value()["weight"]) == pytest.approx(wanted, abs=0.02)


def test_weight_averaging_warns_of_configure_model_and_cannot_shard(tmp_path, toy):
    class Late(toy.Toy):
        def configure_model(self):
            pass

    with pytest.warns(UserWarning, match="doesn't support sharding"):
        toy.trainer(tmp_path, WeightAveraging()).fit(Late())
