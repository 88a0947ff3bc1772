"""What is saved, what comes back, and that a resumed run is the uninterrupted one to the last bit."""

from __future__ import annotations

import copy
import pickle

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.tuner.tuning import Tuner

from soups.averaging import averages, export, load_averaged
from soups.averaging.checkpoint import KEY
from soups.callbacks import EMA, LAWA, SWA, PostHocEMA
from soups.errors import ConfigError, DataError, StorageError
from soups.stores import read_safetensors


def callbacks(tmp_path, folder="snapshots"):
    return [
        EMA(decay=0.9),
        EMA(half_life="20%", name="slow", warmup="power", every="2st"),
        SWA(start="25%", every="1ep"),
        LAWA(k=3, every="4st"),
        EMA(decay=0.99, name="rounded", dtype="bfloat16"),
        EMA(decay=0.5, name="behind", background=True),
        PostHocEMA(snapshot_every="5st", folder=tmp_path / folder),
    ]


def by_step(toy):
    """A module whose batches depend on the step alone, as with a loader that resumes where it was."""

    class ByStep(toy.Toy):
        def training_step(self, batch, batch_idx):
            x, y = (tensor.to(self.device) for tensor in toy.data(batches=30).tensors)
            at = 4 * self.trainer.global_step
            return self.loss((x[at : at + 4], y[at : at + 4]))

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.02)

    return ByStep


def full_state(callback):
    session = callback._session
    return {
        f"{name}/{plane}/{key}": tensor
        for name, tracked in session.tracked.items()
        for plane, tensors in tracked.mean.state_dict()["planes"].items()
        for key, tensor in tensors.items()
    }


@pytest.mark.parametrize("crash", [1, 3, 6, 7, 12, 16, 23])
def test_resume_is_bit_identical_at_any_step(tmp_path, toy, crash):
    module_type = by_step(toy)
    whole = callbacks(tmp_path, "whole")
    reference = module_type()
    toy.trainer(tmp_path, *whole, max_epochs=4).fit(reference)

    class Crash(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == crash:
                trainer.save_checkpoint(tmp_path / "crash.ckpt")
            if trainer.global_step == min(crash + 2, 24):
                raise RuntimeError("crash")

    parts = callbacks(tmp_path, "parts")
    with pytest.raises(RuntimeError, match="crash"):
        toy.trainer(tmp_path, *parts, Crash(), max_epochs=4).fit(module_type())
    parts = callbacks(tmp_path, "parts")
    module = module_type()
    toy.trainer(tmp_path, *parts, max_epochs=4).fit(module, ckpt_path=tmp_path / "crash.ckpt")
    assert toy.same(toy.snapshot(module), toy.snapshot(reference))
    assert toy.same(full_state(parts[0]), full_state(whole[0]))
    for tracked in whole[0]._session.tracked.values():
        other = parts[0]._session.tracked[tracked.name]
        assert (other.mean.count, other.last_point) == (tracked.mean.count, tracked.last_point)
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "parts").iterdir())
    assert all(
        toy.same(read_safetensors(tmp_path / "whole" / f), read_safetensors(tmp_path / "parts" / f)) for f in files
    )


def test_resume_with_a_start_that_the_checkpoint_had_not_reached(tmp_path, toy):
    module_type = by_step(toy)

    def keep():
        return SWA(start="3ep", every="1ep")

    whole, first, rest = keep(), keep(), keep()
    toy.trainer(tmp_path, whole, max_epochs=5).fit(module_type())

    class Crash(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 8:
                trainer.save_checkpoint(tmp_path / "early.ckpt")
                raise RuntimeError("crash")

    with pytest.raises(RuntimeError, match="crash"):
        toy.trainer(tmp_path, first, Crash(), max_epochs=5).fit(module_type())
    assert first._session.tracked["swa"].mean.count == 0
    toy.trainer(tmp_path, rest, max_epochs=5).fit(module_type(), ckpt_path=tmp_path / "early.ckpt")
    assert rest._session.tracked["swa"].mean.count == 3
    assert toy.same(rest.average(), whole.average())


def test_saving_after_the_fit_has_raw_weights_and_averages_wherever_it_is_called(tmp_path, toy):
    module, ema = toy.Toy(), EMA(decay=0.9)
    trainer = toy.trainer(tmp_path, ema)
    trainer.fit(module)
    average = ema.average()
    trainer.save_checkpoint(tmp_path / "raw.ckpt")
    with ema.applied():
        trainer.save_checkpoint(tmp_path / "inside.ckpt")
    for name in ("raw.ckpt", "inside.ckpt"):
        assert toy.same(load_averaged(tmp_path / name, "raw"), module.points[-1])
        assert toy.same(load_averaged(tmp_path / name), average)


def test_state_dict_is_raw_and_the_average_loads_strictly(tmp_path, toy):
    module, ema = toy.Toy(), EMA(decay=0.9, validate="both")
    trainer = toy.trainer(tmp_path, ema)
    trainer.fit(module)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert toy.same(checkpoint["state_dict"], module.points[-1])
    average = load_averaged(tmp_path / "a.ckpt", which="ema")
    assert toy.same(average, ema.average())
    toy.Toy().load_state_dict(average, strict=True)
    plain = toy.Toy()
    toy.trainer(tmp_path, max_epochs=4).fit(plain, ckpt_path=tmp_path / "a.ckpt")  # without the callback


def test_weights_only_checkpoints_hold_the_averages(tmp_path, toy):
    module, ema, lawa = toy.Toy(), EMA(decay=0.9), LAWA(k=4, every="1st")
    save = ModelCheckpoint(dirpath=tmp_path, save_weights_only=True, filename="w")
    toy.trainer(tmp_path, ema, lawa, save).fit(module)
    checkpoint = torch.load(tmp_path / "w.ckpt", weights_only=True)
    assert "optimizer_states" not in checkpoint
    assert toy.same(checkpoint["state_dict"], module.points[-1])
    assert "state" not in checkpoint[KEY]["averages"]["lawa"], "the ring is for resuming only"
    for name in ("ema", "lawa"):
        assert toy.same(load_averaged(tmp_path / "w.ckpt", name), ema.average(name))


@pytest.mark.parametrize("weights_only", [False, True])
def test_best_by_the_averages_metric_is_what_the_metric_was_computed_on(tmp_path, toy, weights_only):
    module, ema = toy.Toy(lr=0.3), EMA(decay=0.8, validate="both")
    save = ModelCheckpoint(dirpath=tmp_path, monitor="val/loss_ema", save_weights_only=weights_only, filename="best")
    trainer = toy.trainer(tmp_path, ema, save, max_epochs=5)
    trainer.fit(module)
    best = load_averaged(save.best_model_path, "ema")
    assert toy.evaluate(module, best) == pytest.approx(float(save.best_model_score), rel=1e-5)


def test_fit_then_test_best_uses_the_weights_that_the_user_names(tmp_path, toy):
    module, ema = toy.Toy(lr=0.3), EMA(decay=0.8, validate="both", test="average")
    save = ModelCheckpoint(dirpath=tmp_path, monitor="val/loss_ema")
    trainer = toy.trainer(tmp_path, ema, save, max_epochs=5)
    trainer.fit(module)
    found = trainer.test(module, ckpt_path="best", verbose=False)[0]["test/loss"]
    assert found == pytest.approx(toy.evaluate(module, load_averaged(save.best_model_path)), rel=1e-5)
    raw = load_averaged(save.best_model_path, "raw")
    assert toy.same(toy.snapshot(module), raw), "after the test the module holds the checkpoint's raw weights"
    found = toy.trainer(tmp_path, EMA()).test(module, ckpt_path=save.best_model_path, verbose=False)[0]["test/loss"]
    assert found == pytest.approx(toy.evaluate(module, raw), rel=1e-5), "raw unless said otherwise"


def test_test_and_predict_in_a_new_process(tmp_path, toy):
    module, ema = toy.Toy(), EMA(decay=0.8)
    trainer = toy.trainer(tmp_path, ema)
    trainer.fit(module)
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    average = ema.average()
    fresh = toy.Toy()
    chosen = EMA(test="both", predict="average")
    tester = toy.trainer(tmp_path, chosen)
    tester.test(fresh, ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert float(tester.callback_metrics["test/loss"]) == pytest.approx(
        toy.evaluate(module, module.points[-1]), rel=1e-5
    )
    assert float(tester.callback_metrics["test/loss_ema"]) == pytest.approx(toy.evaluate(module, average), rel=1e-5)
    predictions = tester.predict(fresh, ckpt_path=tmp_path / "a.ckpt")
    wanted = toy.Toy().eval()
    wanted.load_state_dict(average)
    with torch.no_grad():
        for found, batch in zip(predictions, fresh.val_dataloader(), strict=True):
            torch.testing.assert_close(found, wanted(batch[0]))
    with pytest.raises(ConfigError, match="no average called 'ema'"):
        toy.trainer(tmp_path, EMA(test="average")).test(toy.Toy(), verbose=False)


def test_a_checkpoint_without_the_average_is_not_tested_on_another(tmp_path, toy):
    plain = toy.trainer(tmp_path)
    plain.fit(toy.Toy())
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    module, ema = toy.Toy(), EMA(test="average")
    trainer = toy.trainer(tmp_path, ema)
    trainer.fit(module)
    trainer.save_checkpoint(tmp_path / "ema.ckpt")
    with pytest.raises(ConfigError, match="checkpoint that was loaded"):
        trainer.test(module, ckpt_path=tmp_path / "plain.ckpt", verbose=False)
    trainer.test(module, ckpt_path=tmp_path / "ema.ckpt", verbose=False)
    trainer.save_checkpoint(tmp_path / "again.ckpt")
    assert toy.same(load_averaged(tmp_path / "again.ckpt"), load_averaged(tmp_path / "ema.ckpt"))


def test_saving_while_an_average_is_in_place_saves_raw_weights(tmp_path, toy):
    class Save(pl.Callback):
        def on_validation_batch_end(self, trainer, *_):
            trainer.save_checkpoint(tmp_path / "mid.ckpt")

    module = toy.Toy()
    toy.trainer(tmp_path, Save(), EMA(decay=0.9, validate="average")).fit(module)
    saved = torch.load(tmp_path / "mid.ckpt", weights_only=True)
    assert toy.same(saved["state_dict"], module.points[-1])
    assert not torch.equal(load_averaged(tmp_path / "mid.ckpt")["net.0.weight"], module.points[-1]["net.0.weight"])


def test_resume_without_the_average_in_the_checkpoint_says_so(tmp_path, toy):
    trainer = toy.trainer(tmp_path, max_epochs=1)
    trainer.fit(toy.Toy())
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    trainer = toy.trainer(tmp_path, EMA(decay=0.9), max_epochs=1)
    trainer.fit(toy.Toy())
    trainer.save_checkpoint(tmp_path / "ema.ckpt")
    module, swa = toy.Toy(), SWA(start="0st", every="1st")
    with pytest.warns(UserWarning, match="holds no average called 'swa'"):
        toy.trainer(tmp_path, swa, max_epochs=2).fit(module, ckpt_path=tmp_path / "ema.ckpt")
    module, ema = toy.Toy(), EMA(decay=0.9)
    toy.trainer(tmp_path, ema, max_epochs=2).fit(module, ckpt_path=tmp_path / "plain.ckpt")
    toy.close(ema.average(), toy.ema_of(module.points, 0.9))


def test_learning_rate_finder_leaves_the_average_alone(tmp_path, toy):
    module, ema = toy.Toy(), EMA(decay=0.9)
    trainer = toy.trainer(tmp_path, ema)
    before = toy.snapshot(module)
    Tuner(trainer).lr_find(module, num_training=5, min_lr=1e-3, max_lr=1e-2, attr_name="lr")
    assert toy.same(toy.snapshot(module), before)
    module.points.clear()
    trainer.fit(module)
    toy.close(ema.average(), toy.ema_of(module.points, 0.9))


def test_learning_rate_finder_in_the_middle_of_training(tmp_path, toy):
    class Finder(pl.callbacks.LearningRateFinder):
        def on_fit_start(self, *_):
            pass

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1 and trainer.global_step == 6:
                pl_module.points_before = list(pl_module.points)
                self.lr_find(trainer, pl_module)
                pl_module.points[:] = pl_module.points_before

    module, ema = toy.Toy(), EMA(decay=0.9)
    toy.trainer(tmp_path, Finder(num_training_steps=3, update_attr=False), ema).fit(module)
    count = ema._session.tracked["ema"].mean.count
    toy.close(ema.average(), toy.ema_of(module.points[-count:], 0.9))


def test_batch_size_finder(tmp_path, toy):
    class Sized(toy.Toy):
        batch_size = 2

        def train_dataloader(self):
            return torch.utils.data.DataLoader(toy.data(), batch_size=self.batch_size)

    module, ema = Sized(), EMA(decay=0.9)
    trainer = toy.trainer(tmp_path, ema)
    Tuner(trainer).scale_batch_size(module, max_trials=2, steps_per_trial=1)
    module.points.clear()
    trainer.fit(module)
    toy.close(ema.average(), toy.ema_of(module.points, 0.9))


def test_modules_can_be_copied_and_pickled_after_a_fit(tmp_path, toy):
    module, ema = toy.Toy(), EMA(decay=0.9)
    toy.trainer(tmp_path, ema).fit(module)
    twin = copy.deepcopy(module)
    checkpoint = {"state_dict": {}}
    twin.on_save_checkpoint(checkpoint)
    assert KEY not in checkpoint and twin.on_save_checkpoint.module is twin
    module.__class__ = pl.LightningModule  # the test's classes cannot be pickled by name
    pickle.loads(pickle.dumps(module.on_save_checkpoint.__getstate__()["session"]))


def test_lightnings_own_checkpoints(tmp_path, toy):
    module = toy.Toy()
    theirs = pl.callbacks.EMAWeightAveraging(decay=0.9, update_starting_at_step=0)
    save = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", every_n_epochs=1, save_top_k=-1)
    toy.trainer(tmp_path, theirs, save, max_epochs=2).fit(module)
    path = tmp_path / "epoch=1.ckpt"
    held = torch.load(path, map_location="cpu", weights_only=True)
    assert [row.name for row in averages(path)] == ["raw", "ema"]
    assert toy.same(load_averaged(path, "raw"), held["current_model_state"])
    average = load_averaged(path, "ema")
    assert torch.equal(average["net.0.weight"], held["state_dict"]["net.0.weight"])
    resumed, ema = toy.Toy(), EMA(decay=0.9, warmup="none")
    toy.trainer(tmp_path, ema, max_epochs=3).fit(resumed, ckpt_path=path)
    assert len(resumed.points) == 6
    assert torch.equal(resumed.points[0]["net.1.num_batches_tracked"], torch.tensor(13)), "resumed from raw weights"
    wanted = average["net.0.weight"].double()
    for point in resumed.points:
        wanted = 0.9 * wanted + 0.1 * point["net.0.weight"].double()
    torch.testing.assert_close(ema.average()["net.0.weight"].double(), wanted, rtol=1e-6, atol=1e-6)


def test_export(tmp_path, toy):
    module, ema = toy.Toy(), EMA(decay=0.9)
    trainer = toy.trainer(tmp_path, ema)
    trainer.fit(module)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    export(tmp_path / "a.ckpt", "ema", to=tmp_path / "m.safetensors")
    assert toy.same(read_safetensors(tmp_path / "m.safetensors"), ema.average())
    export(tmp_path / "a.ckpt", "ema", to=tmp_path / "m.ckpt")
    assert toy.same(toy.snapshot(toy.Toy.load_from_checkpoint(tmp_path / "m.ckpt")), ema.average())
    export(tmp_path / "a.ckpt", "raw", to=tmp_path / "m.pt")
    assert toy.same(torch.load(tmp_path / "m.pt", weights_only=True), module.points[-1])
    with pytest.raises(ConfigError, match="must end in"):
        export(tmp_path / "a.ckpt", "ema", to=tmp_path / "m.bin")


def test_errors_name_the_file_and_what_it_holds(tmp_path, toy):
    trainer = toy.trainer(tmp_path, EMA())
    trainer.fit(toy.Toy())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(DataError, match=r"a\.ckpt holds no average called 'emma'. Did you mean 'ema'"):
        load_averaged(tmp_path / "a.ckpt", "emma")
    with pytest.raises(StorageError, match="There is no file"):
        load_averaged(tmp_path / "b.ckpt")
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "a.ckpt").read_bytes()[:500])
    with pytest.raises(StorageError, match="not a whole torch archive"):
        load_averaged(tmp_path / "cut.ckpt")
