"""What hooks of a module do in an evaluation of an average: it counts for the average, and for nothing else."""

from __future__ import annotations

import csv
import sys
import warnings
from collections import deque
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from soups.averaging import load_averaged
from soups.callbacks import EMA, LAWA, SWA
from soups.errors import ConfigError


def per_validation(toy, module, ema):
    """Return a callback and its list: raw and averaged validation loss, worked out by hand at each validation."""
    rows = []

    class Look(toy.pl.Callback):
        def on_validation_start(self, trainer, pl_module):
            rows.append((toy.evaluate(module, toy.snapshot(pl_module)), toy.evaluate(module, ema.average())))

    return Look(), rows


@pytest.mark.parametrize("hook", ["on_validation_epoch_end", "on_validation_end"])
@pytest.mark.parametrize("start", ["0st", "2ep"])
def test_bests_kept_in_python_do_not_mix(tmp_path, toy, hook, start):
    logged = []

    class Best(toy.Toy):
        def __init__(self):
            super().__init__(lr=0.05)
            self.best, self.history, self.recent, self.facts = None, [], deque(maxlen=2), {"count": 0}

        def keep(self):
            loss = float(self.trainer.callback_metrics["val/loss"])
            self.best = loss if self.best is None else min(self.best, loss)
            self.history.append(loss)
            self.recent.append(loss)
            self.facts["count"] += 1
            logged.append((self.best, list(self.history), list(self.recent), self.facts["count"]))

    setattr(Best, hook, lambda self: self.keep())
    module = Best()
    ema = EMA(decay=0.8, validate="both", start=start, every="1ep")
    rows = []

    class Look(toy.pl.Callback):
        def on_validation_start(self, trainer, pl_module):
            held = ema._session.tracked["ema"].mean.count
            average = toy.evaluate(module, ema.average()) if held else None
            rows.append((toy.evaluate(module, toy.snapshot(pl_module)), average))

    toy.trainer(tmp_path, ema, Look(), max_epochs=5).fit(module)
    raw, averaged = [row[0] for row in rows], [row[1] for row in rows if row[1] is not None]
    assert len(raw) == 5 and len(averaged) == (5 if start == "0st" else 4)
    assert module.history == pytest.approx(raw) and module.best == pytest.approx(min(raw))
    assert module.facts == {"count": 5} and list(module.recent) == pytest.approx(raw[-2:])
    last_of_average = [row for row in logged if row[1][-1] == pytest.approx(averaged[-1])][-1]
    best, history, recent, count = last_of_average
    assert history == pytest.approx(averaged) and best == pytest.approx(min(averaged))
    assert recent == pytest.approx(averaged[-2:]) and count == len(averaged)


def test_hooks_read_the_metrics_of_their_own_evaluation_under_plain_names(tmp_path, toy):
    class Reads(toy.Toy):
        def on_validation_epoch_end(self):
            self.log("val/twice", 2 * self.trainer.callback_metrics["val/loss"])

    module, ema = Reads(), EMA(decay=0.9, validate="both")
    look, rows = per_validation(toy, module, ema)
    trainer = toy.trainer(tmp_path, ema, look)
    trainer.fit(module)
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert found["val/twice"] == pytest.approx(2 * rows[-1][0]) and found["val/loss"] == pytest.approx(rows[-1][0])
    assert found["val/twice_ema"] == pytest.approx(2 * rows[-1][1]) and found["val/loss_ema"] == pytest.approx(
        rows[-1][1]
    )


def test_values_logged_by_hand_have_the_averages_name(tmp_path, toy):
    written = []

    class Writer:
        def add_scalar(self, tag, value, step=None):
            written.append(("scalar", tag, value))

        def add_figure(self, tag, figure):
            written.append(("figure", tag, figure))

        def log(self, values):
            written.append(("log", *values))

        def upload(self, path):
            written.append(("upload", path))

    class Tracker(Logger):
        name = version = "tracker"
        experiment = Writer()

        def log_metrics(self, metrics, step=None):
            written.append(("metrics", *(name for name in metrics if "hand" in name)))

        def log_hyperparams(self, params):
            pass

    class Hand(toy.Toy):
        def on_validation_epoch_end(self):
            assert isinstance(self.logger, Tracker)
            self.logger.log_metrics({"hand": 1.0, "epoch": 0}, step=3)
            self.logger.experiment.add_scalar("val/hand", 1.0, 3)
            self.logger.experiment.add_figure(tag="val/figure", figure=None)
            self.logger.experiment.log({"hand": 2.0})
            self.logger.experiment.upload("a file")

    with pytest.warns(UserWarning, match=r"Writer\.upload"):
        toy.trainer(tmp_path, EMA(validate="both"), max_epochs=1, logger=Tracker()).fit(Hand())
    raw = [
        ("metrics", "hand"),
        ("scalar", "val/hand", 1.0),
        ("figure", "val/figure", None),
        ("log", "hand"),
        ("upload", "a file"),
    ]
    assert [row for row in written if row != ("metrics",)] == [
        *raw, ("metrics", "hand_ema"), ("scalar", "val/hand_ema", 1.0), ("figure", "val/figure_ema", None), ("log", "hand_ema"),
    ]  # fmt: skip


def test_the_loggers_files_hold_every_metric_once(tmp_path, toy):
    class Steps(toy.Toy):
        def validation_step(self, batch, batch_idx):
            self.log("val/loss", self.loss(batch), on_step=True, on_epoch=True)

        def val_dataloader(self):
            return [super(Steps, self).val_dataloader() for _ in range(1)]

    logger = CSVLogger(tmp_path)
    toy.trainer(tmp_path, EMA(validate="both"), max_epochs=2, logger=logger).fit(Steps())
    with Path(logger.log_dir, "metrics.csv").open() as file:
        names = set(next(csv.reader(file)))
    assert names - {"epoch", "step", "train/loss"} == {
        "val/loss_step", "val/loss_epoch", "val/loss_ema_step", "val/loss_ema_epoch",
    }  # fmt: skip


def test_several_loaders_keep_their_numbers_at_the_end(tmp_path, toy):
    class Two(toy.Toy):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self.log("val/loss", self.loss(batch))

        def val_dataloader(self):
            return [super().val_dataloader(), super().val_dataloader()]

    trainer = toy.trainer(tmp_path, EMA(validate="both"), max_epochs=1)
    trainer.fit(Two())
    assert {"val/loss_ema/dataloader_idx_0", "val/loss_ema/dataloader_idx_1"} <= trainer.callback_metrics.keys()


def test_a_hook_that_steps_an_optimizer_is_refused_for_the_average_only(tmp_path, toy):
    class Trains(toy.Toy):
        def on_validation_epoch_end(self):
            self.trainer.optimizers[0].step()

    toy.trainer(tmp_path, EMA(), max_epochs=1).fit(Trains())
    with pytest.raises(ConfigError, match="would train twice"):
        toy.trainer(tmp_path, EMA(validate="both"), max_epochs=1).fit(Trains())


def test_callbacks_are_in_their_place_while_an_average_is_evaluated(tmp_path, toy):
    calls = []

    class Looks(toy.Toy):
        def on_validation_epoch_end(self):
            self.trainer.checkpoint_callback.best_model_path  # noqa: B018
            calls.append(len(self.trainer.callbacks))

    class Counts(toy.pl.Callback):
        ends = 0

        def on_validation_epoch_end(self, *_):
            self.ends += 1

    counts, stop = Counts(), EarlyStopping("val/loss_ema", patience=9)
    save = ModelCheckpoint(dirpath=tmp_path, monitor="val/loss_ema")
    toy.trainer(tmp_path, save, counts, stop, EMA(validate="both")).fit(Looks())
    assert len(calls) == 6 and len(set(calls)) == 1 and counts.ends == 3


def test_rich_progress_bars_survive(tmp_path, toy):
    pytest.importorskip("rich")
    bar = RichProgressBar(refresh_rate=1)
    callbacks = [bar, ModelCheckpoint(dirpath=tmp_path), EMA(validate="both"), LAWA(k=2, validate="both")]
    with warnings.catch_warnings():
        warnings.simplefilter("error", pytest.PytestUnhandledThreadExceptionWarning)
        trainer = toy.trainer(tmp_path, *callbacks, enable_progress_bar=True, max_epochs=2)
        trainer.fit(toy.Toy())
    assert {"val/loss_ema", "val/loss_lawa"} <= trainer.callback_metrics.keys()


@pytest.mark.parametrize("choice", ["average", "both"])
def test_weights_written_in_an_evaluation_are_told(tmp_path, toy, choice):
    class Clips(toy.Toy):
        def on_validation_start(self):
            if not self.trainer.sanity_checking:
                with torch.no_grad():
                    self.net[0].weight.clamp_(-0.1, 0.1)

    with pytest.warns(UserWarning, match=r"wrote into \['net\.0\.weight'\]"):
        toy.trainer(tmp_path, EMA(validate=choice), max_epochs=1).fit(Clips())


def test_buffers_filled_in_validation_stay_in_the_module(tmp_path, toy):
    class Fills(toy.Toy):
        def __init__(self):
            super().__init__()
            self.register_buffer("bank", torch.zeros(4, 3))

        def validation_step(self, batch, batch_idx):
            self.bank.add_(batch[0])

    plain, module = Fills(), Fills()
    toy.trainer(tmp_path).fit(plain)
    ema = EMA(validate="average")
    toy.trainer(tmp_path, ema).fit(module)
    assert torch.equal(module.bank, plain.bank) and float(module.bank.abs().sum()) > 0
    assert torch.equal(ema.average()["bank"], module.bank)


# Measuring BatchNorm statistics ---------------------------------------------------------------------------------------


def reestimating(**options):
    return SWA(start="0st", every="1ep", buffers="reestimate", batches=3, **options)


def test_what_training_step_collects_does_not_double(tmp_path, toy):
    class Collects(toy.Toy):
        def __init__(self):
            super().__init__()
            self.outputs, self.total = [], torch.zeros(())

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.outputs.append(loss.detach())
            self.total += loss.detach()
            return loss

    plain, module = Collects(), Collects()
    toy.trainer(tmp_path).fit(plain)
    toy.trainer(tmp_path, reestimating()).fit(module)
    assert len(module.outputs) == 18 and torch.equal(module.total, plain.total)
    assert all(map(torch.equal, module.outputs, plain.outputs))


def test_networks_with_other_outputs_in_evaluation_get_a_hint(tmp_path, toy):
    class Auxiliary(toy.Toy):
        def training_step(self, batch, batch_idx):
            main, aux = (self.net(batch[0]), self.net(batch[0])) if self.net.training else self.net(batch[0])
            return (main + aux - batch[1]).square().mean()

    with pytest.raises(ConfigError, match="auxiliary heads") as told:
        toy.trainer(tmp_path, reestimating()).fit(Auxiliary())
    assert "forward=lambda" in str(told.value) and isinstance(told.value.__cause__, ValueError)
    module = Auxiliary()
    swa = reestimating(forward=lambda module, batch: module.net(batch[0]))
    toy.trainer(tmp_path, swa).fit(module)
    assert torch.isfinite(swa.average()["net.1.running_var"]).all()


def test_training_data_that_can_be_read_only_once_is_refused(tmp_path, toy):
    class Once(IterableDataset):
        def __init__(self):
            self.rows = ((x, y) for x, y in toy.data())

        def __iter__(self):
            return self.rows

    class Streams(toy.Toy):
        def train_dataloader(self):
            return DataLoader(Once(), batch_size=4)

    with pytest.raises(ConfigError, match=r"rows is an iterator that cannot be read again"):
        toy.trainer(tmp_path, reestimating(), max_epochs=1).fit(Streams())

    class Listed(IterableDataset):
        """An iterator that can be copied is lent a copy."""

        def __init__(self):
            self.rows = iter(list(toy.data()))

        def __iter__(self):
            return self.rows

    class Copies(toy.Toy):
        def train_dataloader(self):
            return DataLoader(Listed(), batch_size=4)

    plain, module = Copies(), Copies()
    toy.trainer(tmp_path, max_epochs=1).fit(plain)
    with pytest.raises(Exception, match="no training batches"):
        toy.trainer(tmp_path, reestimating(), max_epochs=1).fit(module)  # nothing is left at the end of the epoch
    assert toy.same(toy.snapshot(module), toy.snapshot(plain))


# The other Lightning package ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["raw", "average", "both"])
def test_the_package_pytorch_lightning_is_served(tmp_path, toy, choice):
    other = pytest.importorskip("pytorch_lightning")

    class Theirs(other.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(7)
            self.net = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 1))
            self.points, self.best = [], 9.0

        loss = toy.Toy.loss
        forward = toy.Toy.forward
        training_step = toy.Toy.training_step
        test_step = toy.Toy.test_step
        on_train_batch_end = toy.Toy.on_train_batch_end
        train_dataloader, val_dataloader, test_dataloader = (
            toy.Toy.train_dataloader, toy.Toy.val_dataloader, toy.Toy.val_dataloader,
        )  # fmt: skip

        def validation_step(self, batch, batch_idx):
            self.log("val/loss", self.loss(batch))

        def on_validation_epoch_end(self):
            self.best = min(self.best, float(self.trainer.callback_metrics["val/loss"]))
            self.log("val/best", self.best)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    def trainer(*callbacks, **options):
        return other.Trainer(
            default_root_dir=tmp_path, callbacks=list(callbacks), logger=False, enable_progress_bar=False,
            enable_model_summary=False, num_sanity_val_steps=0, accelerator="cpu", **{"max_epochs": 3, **options},
        )  # fmt: skip

    plain, module = Theirs(), Theirs()
    trainer(enable_checkpointing=False).fit(plain)
    ema = EMA(decay=0.9, validate=choice, test="both")
    swa = SWA(start="0st", every="2st", buffers="reestimate", validate="both")
    save = other.callbacks.ModelCheckpoint(dirpath=tmp_path, filename="last", save_weights_only=False)
    fit = trainer(ema, swa, save)
    fit.fit(module)
    assert toy.same(toy.snapshot(module), toy.snapshot(plain))
    toy.close(ema.average(), toy.ema_of(module.points, 0.9))
    found = {name: float(value) for name, value in fit.callback_metrics.items()}
    raw, average = toy.evaluate(module, module.points[-1]), toy.evaluate(module, ema.average())
    assert found["val/loss"] == pytest.approx(average if choice == "average" else raw, rel=1e-5)
    assert ("val/loss_ema" in found) == (choice == "both") and "val/best_swa" in found
    if choice == "both":
        assert found["val/loss_ema"] == pytest.approx(average, rel=1e-5)
    assert toy.same(load_averaged(tmp_path / "last.ckpt"), ema.average())
    resumed, again = Theirs(), EMA(decay=0.9)
    trainer(again, max_epochs=4, enable_checkpointing=False).fit(resumed, ckpt_path=str(tmp_path / "last.ckpt"))
    toy.close(again.average(), toy.ema_of([*module.points, *resumed.points], 0.9))
    fit.test(module, verbose=False)
    assert float(fit.callback_metrics["test/loss_ema"]) == pytest.approx(average, rel=1e-5)


def test_nothing_of_a_second_evaluation_is_kept_after_the_fit(tmp_path, toy):
    ema = EMA(validate="both")
    toy.trainer(tmp_path, ema).fit(toy.Toy())
    branches = vars(ema._session._branches)
    assert not any(value for name, value in branches.items() if name != "_take"), SimpleNamespace(**branches)


def test_wandbs_own_log_has_the_averages_names(tmp_path, toy, monkeypatch):
    written = []
    run = SimpleNamespace(log=lambda values, **_: written.append(dict(values)))
    wandb = ModuleType("wandb")
    wandb.run, wandb.log = run, run.log
    monkeypatch.setitem(sys.modules, "wandb", wandb)

    class Logs(toy.Toy):
        def on_validation_epoch_end(self):
            wandb.log({"hand": 1.0, "epoch": 2}, step=3)

    toy.trainer(tmp_path, EMA(validate="both"), max_epochs=1).fit(Logs())
    assert written == [{"hand": 1.0, "epoch": 2}, {"hand_ema": 1.0, "epoch": 2}] and wandb.log is run.log
